"""A pytest plugin that records the calls of CPU handlers which tests make; see check_handlers.py.

    pytest -p thread_sanitizer.plugin

JAX then sees the handlers of record.cc as those of its CPU platform, and these run ilajax's own.
"""

import collections
import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import jax
import pytest

# Found before ilajax is imported, which would register its handlers.
_PACKAGE = importlib.util.find_spec("ilajax").submodule_search_locations
_CPU = importlib.machinery.PathFinder.find_spec("ilajax._cpu", _PACKAGE)
sys.modules["ilajax._cpu"] = None

from ilajax.ffi import registry

BUILD = Path(__file__).resolve().parents[2] / "build" / "thread_sanitizer"

# Small calls that reach all targets, every way to cut their work, every dtype: of each test every n-th case.
# n is no multiple of 2 or 3, or a parameter of that many values would stand still.
EVERY = {
    "tests/ffi/test_site_map.py::test_the_same_bits": 5,
    "tests/ops/test_conv.py::test_algorithms_1_and_2": 5,
    "tests/ops/test_conv.py::test_contents": 5,
    "tests/ops/test_conv.py::test_forms_of_a_line": 5,
    "tests/ops/test_conv.py::test_nan_and_inf": 5,
    "tests/ops/test_conv_at.py::test_loops": 5,
    "tests/ops/test_conv_at.py::test_supports_of_each_channel": 1,
    "tests/ops/test_conv_at.py::test_without_room_and_in_parts": 1,
    "tests/ops/test_conv_by_site.py::test_channels": 1,
    "tests/ops/test_conv_by_site.py::test_loops": 5,
    "tests/ops/test_conv_by_site.py::test_without_room_and_in_parts": 1,
    "tests/ops/test_convert.py::test_from_dense": 7,
    "tests/ops/test_convert.py::test_to_dense": 5,
    "tests/ops/test_degenerate.py::test_all_nan": 5,
    "tests/ops/test_degenerate.py::test_long_lines": 5,
    "tests/ops/test_degenerate.py::test_plans": 5,
    "tests/ops/test_degenerate.py::test_selections_from_dense_arrays": 5,
    "tests/ops/test_degenerate.py::test_selections_of_cells": 5,
    "tests/ops/test_degenerate.py::test_stages_full_of_nan": 1,
    "tests/ops/test_degenerate.py::test_stages_that_overflow": 5,
    "tests/ops/test_degenerate.py::test_uneven_loads": 7,
    "tests/ops/test_degenerate.py::test_windows": 7,
    "tests/ops/test_k_select.py::test_contents": 5,
    "tests/ops/test_k_select.py::test_loops": 5,
    "tests/ops/test_memory_safety.py::test_garbage_keys": 7,
    "tests/ops/test_pool.py::test_capacity": 5,
    "tests/ops/test_pool.py::test_contents": 5,
    "tests/ops/test_pool.py::test_loops": 5,
    "tests/ops/test_pool.py::test_overlapping_windows": 5,
    "tests/ops/test_submanifold.py::test_contents": 1,
    "tests/ops/test_submanifold.py::test_loops": 5,
    "tests/ops/test_submanifold.py::test_nan_and_inf": 1,
    "tests/ops/test_submanifold_forms.py::test_a_large_grid_that_is_nearly_empty": 3,
    "tests/ops/test_submanifold_forms.py::test_chunks_and_parts": 1,
    "tests/ops/test_submanifold_forms.py::test_nan_and_inf": 5,
    "tests/ops/test_submanifold_forms.py::test_places": 5,
    "tests/ops/test_submanifold_forms.py::test_vmap": 1,
    "tests/ops/test_submanifold_forms.py::test_waves_and_workers_do_not_show": 1,
    "tests/thread_sanitizer/much_work.py::test_many_entries": 1,
}


def pytest_configure(config):
    library = ctypes.CDLL(str(BUILD / "record.so"))
    library.RecordInto(os.fsencode(os.environ["THREAD_SANITIZER_CALLS"]))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    cpu = importlib.util.module_from_spec(_CPU)
    _CPU.loader.exec_module(cpu)
    handlers = cpu.registrations()
    for target, handler in handlers.items():
        ctypes.c_void_p.in_dll(library, f"{target}_handler").value = pointer(handler, None)
        recording = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, recording, platform="cpu")
    registry.extensions["cpu"] = registry.Extension(frozenset(handlers), cpu, "")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out the reference, and of the rest all but every n-th case of each test."""
    seen: collections.Counter[str] = collections.Counter()
    kept, dropped = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        keep = parameters.get("backend") != "reference"
        if keep:
            keep = seen[test] % EVERY[test] == 0
            seen[test] += 1
        (kept if keep else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
