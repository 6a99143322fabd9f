"""The kernels that are installed. Their handlers are registered with XLA when ilajax is imported.

So a program that `jax.export` wrote finds them in a process that has done nothing else.
"""

import importlib
from typing import Any, NamedTuple

import jax

# A platform as jax.lax.platform_dependent names it -> as XLA names it, and the module with its kernels.
PLATFORMS = {"cpu": ("cpu", "ilajax._cpu"), "cuda": ("CUDA", "ilajax._cuda")}


class Extension(NamedTuple):
    """What there is for one platform."""

    targets: frozenset[str]  # names of the FFI targets that are registered
    module: Any  # the extension; None where it could not be imported
    missing: str  # why no target is registered, and what to do; "" where they are


def _load(platform: str) -> Extension:
    xla_name, module_name = PLATFORMS[platform]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        return Extension(frozenset(), None, _not_built(platform))
    except ImportError as error:
        # Built for another Python, or against libraries that are not here.
        return Extension(frozenset(), None, f"{module_name} cannot be imported: {error}.")
    if platform == "cuda" and (unfit := _unfit_driver(module)):
        return Extension(frozenset(), module, unfit)
    registrations = module.registrations()
    for target, handler in registrations.items():
        jax.ffi.register_ffi_target(target, handler, platform=xla_name)
    return Extension(frozenset(registrations), module, "")


def _not_built(platform: str) -> str:
    what, tool = {"cpu": ("C++", "a C++20 compiler"), "cuda": ("CUDA", "nvcc")}[platform]
    try:
        said = importlib.import_module("ilajax._build").MISSING.get(platform)
    except ModuleNotFoundError:
        said = "This copy of ilajax was never built."
    reason = f" The build said:\n{said}\n" if said else " "
    advice = f"Install ilajax again where {tool} is found."
    return f"The {what} kernels are not installed.{reason}{advice}"


def _unfit_driver(module: Any) -> str:
    """Why CUDA code as it was built cannot run here; "" if it can.

    Asked before a handler is registered, and without starting CUDA: that would settle which GPUs are visible.
    """
    if not hasattr(module, "driver_version"):
        return "The CUDA extension is older than ilajax: install it again."
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return "There is no NVIDIA driver here."
    if driver // 1000 < runtime // 1000:
        return (
            f"The CUDA kernels were built with CUDA {_cuda_version(runtime)}, but the driver supports CUDA "
            f"{_cuda_version(driver)} at most. Update the driver, or install ilajax again with its nvcc."
        )
    return ""


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


extensions = {platform: _load(platform) for platform in PLATFORMS}
