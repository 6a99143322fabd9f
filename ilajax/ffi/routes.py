"""Which operation runs where: a kernel or its jax.numpy reference, and one warning where that surprises."""

import dataclasses
import os
import platform as host
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax
from jax.extend.backend import backends, get_backend

from ilajax.ffi import gpus, stamp
from ilajax.ffi.registry import extensions

CHOICES = ("auto", "native", "reference")
# Operations with kernels, as ilajax/ops declares them; all others are plain jax.numpy, everywhere.
OPERATIONS: list[str] = []
PACKAGES = ("ilajax", "jax", "jaxlib", "flax", "optax", "numpy")

_warned: set[str] = set()


class Route(NamedTuple):
    """Where one operation runs.

    Attributes:
      runs: "kernel" or "reference".
      why: in words; "" for a kernel that nothing speaks against.
      asked: whether the user asked for the reference.
    """

    runs: str
    why: str = ""
    asked: bool = False


@dataclasses.dataclass(frozen=True)
class Backend:
    """What `ilajax.backend` returns; as text, what `python -m ilajax` prints.

    Attributes:
      versions: package -> version, Python's too.
      devices: JAX's devices, in words.
      operations: platform -> operation -> `Route`, the default platform first.
      elsewhere: platform without a device here -> why its kernels are not installed, "" where they are.
    """

    versions: Mapping[str, str]
    devices: tuple[str, ...]
    operations: Mapping[str, Mapping[str, Route]]
    elsewhere: Mapping[str, str]

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {number}" for name, number in self.versions.items())]
        lines += [f"devices: {', '.join(self.devices)}"]
        width = max(map(len, OPERATIONS))
        for platform, routes in self.operations.items():
            lines += ["", f"on {platform}:"]
            lines += [f"  {name:{width}}  {route.runs}" for name, route in routes.items()]
            for why in dict.fromkeys(route.why for route in routes.values() if route.why):
                names = [name for name, route in routes.items() if route.why == why]
                some = "all" if len(names) == len(routes) else ", ".join(names)
                lines += [f"  {some}: {why}".replace("\n", "\n    ")]
        for platform, missing in self.elsewhere.items():
            said = missing or "Its kernels are installed."
            lines += ["", f"no device of {platform} here. {said}".replace("\n", "\n    ")]
        return "\n".join(lines)


def declare(operation: str) -> tuple[str, str]:
    """Makes an operation one that has kernels; returns the names of its targets, forward and backward."""
    OPERATIONS.append(operation)
    OPERATIONS.sort()
    return f"ilajax_{operation}_fwd", f"ilajax_{operation}_bwd"


def backend() -> Backend:
    """Says what runs where: versions, devices, and for each operation a kernel or the reference, and why.

    Environment variables choose, read when a program is traced: `ILAJAX_BACKEND` is "auto" (kernels where
    there are any that fit the device; the default), "native" (an error where there is none) or "reference";
    `ILAJAX_REFERENCE=conv,pool` sends single operations to the reference. A compiled program stays as it is.

    Returns:
      A `Backend`. `print(ilajax.backend())` is `python -m ilajax`.

    Raises:
      ValueError: if a variable has another value.

    Example:
      >>> ilajax.backend().operations["cpu"]["conv"].runs
      'kernel'
    """
    default = default_platform()
    here = sorted(platforms(), key=lambda platform: platform != default)
    return Backend(
        {**{name: _version(name) for name in PACKAGES}, "Python": host.python_version()},
        tuple(f"{device.device_kind} ({device})" for device in jax.devices()),
        {platform: {name: route(name, platform) for name in OPERATIONS} for platform in here},
        {name: extension.missing for name, extension in extensions.items() if name not in here},
    )


def route(operation: str, platform: str, limit: Callable[[], str] = lambda: "") -> Route:
    """Where an operation runs on a platform.

    Args:
      operation: one of OPERATIONS.
      platform: as in `platforms`.
      limit: says why the kernel cannot do what is asked of it here; "" if it can.
    """
    wanted = choice()
    if wanted == "reference":
        return Route("reference", "ILAJAX_BACKEND=reference asks for it.", asked=True)
    if operation in _sent_to_reference():
        return Route("reference", f"ILAJAX_REFERENCE names {operation}.", asked=True)
    if platform not in extensions:
        return Route("reference", f"ilajax has no kernels for {platform}.")
    extension = extensions[platform]
    if extension.missing:
        return Route("reference", extension.missing)
    if {f"ilajax_{operation}_fwd", f"ilajax_{operation}_bwd"}.isdisjoint(extension.targets):
        return Route("reference", "The installed extension is older than ilajax: install it again.")
    if why := (gpus.unfit() if platform == "cuda" else "") or limit():
        return Route("reference", why)
    if platform == "cuda" and wanted == "auto" and (unchecked := stamp.unchecked()):
        return Route("reference", unchecked)
    return Route("kernel")


def kernel_runs(operation: str, platform: str, limit: Callable[[], str]) -> bool:
    """Whether the kernel runs; a warning, once, where the default platform goes without and nobody asked.

    Raises:
      RuntimeError: if ILAJAX_BACKEND=native and there is no kernel.
    """
    found = route(operation, platform, limit)
    if found.runs == "kernel":
        return True
    if not found.asked and platform == default_platform():
        if choice() == "native":
            raise RuntimeError(
                f"ILAJAX_BACKEND=native, but {operation} has no kernel here. {found.why} Or set "
                f"ILAJAX_BACKEND=auto, to run the reference."
            )
        if found.why not in _warned:
            _warned.add(found.why)
            this_alone = route(operation, platform).runs == "kernel"
            subject = f"This {operation}" if this_alone else "ilajax"
            warnings.warn(
                f"{subject} runs its reference on {platform}, which is much slower than a kernel. "
                f"{found.why} (`python -m ilajax` tells more; ILAJAX_BACKEND=reference asks for the "
                f"reference, without a warning.)",
                stacklevel=2,
            )
    return False


def platforms() -> tuple[str, ...]:
    """The platforms that JAX has devices of, such as "cpu", "cuda", "rocm" and "tpu"."""
    return tuple(backends())


def default_platform() -> str:
    """The platform that JAX computes on unless it is told otherwise."""
    default = get_backend()
    return next(name for name, client in backends().items() if client is default)


def native_platforms() -> tuple[str, ...]:
    """The platforms whose kernels are installed, of "cpu" and "cuda"."""
    return tuple(platform for platform, extension in extensions.items() if extension.targets)


def choice() -> str:
    """The value of ILAJAX_BACKEND."""
    given = os.environ.get("ILAJAX_BACKEND", "auto")
    if given not in CHOICES:
        raise ValueError(f"ILAJAX_BACKEND must be one of {CHOICES}, got {given!r}.")
    return given


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a folder on the path
        return "not installed"


def _sent_to_reference() -> frozenset[str]:
    given = os.environ.get("ILAJAX_REFERENCE", "")
    names = frozenset(name.strip() for name in given.split(",") if name.strip())
    if unknown := names - set(OPERATIONS):
        raise ValueError(
            f"ILAJAX_REFERENCE must list some of {tuple(OPERATIONS)}, separated by commas, got {given!r}: "
            f"{', '.join(sorted(unknown))} is none of them."
        )
    return names
