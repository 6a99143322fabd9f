"""A pytest plugin that runs the ops' tests through the CUDA kernels, on the host.

    pytest -p cuda_on_host.plugin tests/ops

JAX then sees the handlers of build/cuda_on_host/kernels.so as those of its CPU platform, and the ops plan for
them as for "cuda". Run it as tests/test_cuda_on_host.py does, with libasan preloaded.
"""

import ctypes
import re
import types

import jax

from cuda_on_host import build
from ilajax import _ffi
from ilajax.ops import _plans_cuda_ops


def registrations() -> dict[str, object]:
    """FFI target name -> capsule of its handler, for all targets that have a CUDA kernel."""
    library = ctypes.CDLL(str(build.LIBRARY))
    targets = re.findall(r"^TARGET\((\w+), ", (build.KERNELS / "targets.def").read_text(), re.M)
    return {target: jax.ffi.pycapsule(getattr(library, target)) for target in targets}


def pytest_configure(config):
    build.build()
    module = types.SimpleNamespace(registrations=registrations)
    _ffi._PLATFORMS = (("cpu", "cuda", "cuda_on_host"),)
    _ffi.importlib = types.SimpleNamespace(import_module=lambda name: module)
    _ffi._platforms_here = lambda: {"cuda"}
    # Such that small problems are cut, too.
    _plans_cuda_ops._SELECT_WHOLE = 8
    _plans_cuda_ops._SELECT_CHUNK = 4


def pytest_collection_modifyitems(config, items):
    # The reference needs no test here.
    kept = [item for item in items if "reference" not in item.keywords and "[reference" not in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
