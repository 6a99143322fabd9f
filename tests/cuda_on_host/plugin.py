"""A pytest plugin that runs the ops' tests through the CUDA kernels, on the host.

    pytest -p cuda_on_host.plugin tests/ops

JAX then sees the handlers of the module in build/cuda_on_host/ as those of its CPU platform, and the ops plan
for them as for "cuda". CUDA_ON_HOST_BUILD says which build: "plain", or "sanitized" with libasan preloaded.
"""

import collections
import importlib.util
import os
import sys

import jax
import pytest

from cuda_on_host import build, machine_code

# Its handlers would take the names that the CUDA handlers get here.
sys.modules["ilajax._cpu"] = None

from ilajax.ffi import gpus, plans, registry, routes, stamp

REPEATED_KEYS = [
    f"through_the_public_operations[native-{keys}]"
    for keys in ("sorted-with-duplicates", "all-0", "all-1")
]
# Such that small problems are cut, too.
SMALL = {"select_whole": 8, "select_chunk": 4, "min_tile": 32}


def use(chosen, shared_memory):
    """Lets JAX's CPU platform run the CUDA handlers of a build; returns its module."""
    spec = importlib.util.spec_from_file_location("_cuda_on_host", chosen.module)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handlers = module.registrations()
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    registry.extensions["cuda"] = registry.Extension(frozenset(handlers), module, "")
    routes.platforms = lambda: ("cuda",)
    routes.default_platform = lambda: "cuda"
    gpus.unfit = stamp.unchecked = lambda: ""
    gpus.shared_memory = lambda: shared_memory
    return module


def pytest_configure(config):
    chosen = build.BUILDS[os.environ.get("CUDA_ON_HOST_BUILD", "plain")]
    module = use(chosen, 99 << 10)  # the least of all that the kernels are built for
    if machine_code.WANTED:
        machine_code.load(module)
    tuned = plans.tuned("cuda", **SMALL)
    tuned.__enter__()
    config.add_cleanup(lambda: tuned.__exit__(None, None, None))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out the reference, and of the rest all but every n-th case of each test function."""
    every = int(os.environ.get("CUDA_ON_HOST_EVERY", "1"))
    seen: collections.Counter[str] = collections.Counter()
    kept, dropped = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        own = item.path.parent == build.HERE and "backend" not in parameters
        keep = own or parameters.get("backend") == "native"
        # Too slow here, and the cases above reach the same kernels.
        keep &= item.get_closest_marker("hypothesis") is None and "larger" not in item.name
        # Which of the entries with one key wins, where keys break their contract, is open.
        keep &= not any(name in item.name for name in REPEATED_KEYS)
        if keep:
            function = item.nodeid.partition("[")[0]
            keep = seen[function] % every == 0 or item.path.parent == build.HERE
            seen[function] += 1
        (kept if keep else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
