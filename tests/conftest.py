"""Fixtures of the whole suite: the backends, and NaN as an error."""

import collections
import functools
import gc
import importlib
import inspect
import os
import pkgutil

# Tests compile small programs for most of their time: XLA's optimizer would take twice as long as it saves,
# its older emitters are quicker, and small programs need not be split among threads. Set before JAX is
# imported; the kernels are compiled by their own compiler, and as they are shipped.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import beartype
import hypothesis
import jax
import jaxtyping
import pytest
from jax._src.interpreters import mlir

from ilajax import ops
from ilajax.ffi import routes

# Each program's lowering would load all of MLIR's dialects anew, for a tenth of the tests' time; JAX has no
# public way to keep them.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# Test files that take half a minute and more.
LONGEST = (
    *("test_ffi", "test_mnist", "test_segmentation", "test_residual"),
    *("test_data_parallel", "test_pool", "test_conv_by_site", "test_build", "test_benchmarks"),
    *("test_demo", "test_loader", "test_fill_in", "test_kills", "test_classification"),
)

if not routes.native_platforms():
    # Where no kernel could be built, tests run on the reference, and it is no surprise.
    os.environ.setdefault("ILAJAX_BACKEND", "reference")

# Shapes in annotations (ilajax/ops/_shapes.py) hold in every test.
for found in pkgutil.iter_modules(ops.__path__, "ilajax.ops."):
    module = importlib.import_module(found.name)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if any(hasattr(a, "dim_str") for a in function.__annotations__.values()):
            setattr(module, name, jaxtyping.jaxtyped(function, typechecker=beartype.beartype))

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile("ilajax", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("ilajax")


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="run every crossing of the options on the reference too, which compiles for many minutes",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "nans: NaN is expected here, so it does not raise")
    config.addinivalue_line(
        "markers", "crossed(n): the reference runs every n-th case only, unless --full is given"
    )


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        # test_ffi.py says where kernels must be installed.
        native = ["native"] if routes.native_platforms() else []
        metafunc.parametrize("backend", [*native, "reference"], indirect=True)


def pytest_collection_modifyitems(config, items):
    """Thins out `crossed` tests: a kernel compiles in 20 ms, the reference in 1 to 2 s."""
    if config.getoption("--full"):
        return
    seen = collections.Counter()
    kept, dropped = [], []
    for item in items:
        marker = item.get_closest_marker("crossed")
        keep = True
        if marker and item.callspec.params["backend"] == "reference":
            name = (item.path, item.originalname)
            keep = seen[name] % marker.args[0] == 0
            seen[name] += 1
        (kept if keep else dropped).append(item)
    # A file is one worker's (--dist loadfile): the longest must not begin last.
    items[:] = sorted(kept, key=lambda item: item.path.stem not in LONGEST)
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that a test runs on, each in turn: "native" where kernels are installed, "reference".

    It is read at trace time: jit a fresh function in each test, or keep one for each backend.
    """
    # "native" raises where a kernel is missing; "auto" would quietly run the reference.
    monkeypatch.setenv("ILAJAX_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _cached_programs_are_not_searched():
    """What a module leaves in JAX's caches stays: the collector would go through millions of objects."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nans_raise(request):
    """A NaN that no test expects raises where it arises."""
    with jax.debug_nans(request.node.get_closest_marker("nans") is None):
        yield
