"""How the CUDA kernels cut their work, and what they cannot do on which device.

tests/cuda_on_host sees that their handlers agree.
"""

import importlib.util
import json
import shutil

import jax.numpy as jnp
import pytest

from cuda_on_host import build
from ilajax.ffi import gpus, plans, registry
from ilajax.ffi.calls import result
from ilajax.geometry import conv_window, pool_window

RESOURCES = build.REPOSITORY / "benchmarks" / "results" / "kernel_resources.json"

pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason="needs g++")

# Bytes of shared memory that a block may have: of compute capability 8.6, 8.9 and 12.0; of 8.0; of 9.0.
GAMING, A100, H100 = 99 << 10, 163 << 10, 227 << 10


@pytest.fixture(scope="module", autouse=True)
def planner():
    """The plans of the kernels as they are compiled for the host."""
    build.PLAIN.make("_cuda_on_host")
    spec = importlib.util.spec_from_file_location("_cuda_on_host", build.PLAIN.module)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        extension = registry.Extension(frozenset(), module, "")
        patch.setitem(registry.extensions, "cuda", extension)
        patch.setattr(gpus, "shared_memory", lambda: GAMING)
        yield


def plan(target, *shapes, batch=1, groups=1, window=None):
    arrays = [result(shape, jnp.float32) for shape in shapes]
    return plans.plan("cuda", target, arrays, jnp.float32, batch, groups, window)


def forward(
    shape, grid=(256,) * 3, batch=1, cin=1, slots=1 << 20, cout=8, capacity=1 << 20, weights=9
):
    window = conv_window(grid, shape)
    x, y = (batch, cin, slots), (batch, cout, capacity)
    shapes = (x, x, (weights,), (weights,), (cout,), y, y, y[:2])
    return plan("ilajax_conv_fwd", *shapes, batch=batch, window=window)


def backward(
    shape, grid=(256,) * 3, batch=1, cin=1, slots=1 << 20, cout=8, capacity=1 << 20, weights=9
):
    window = conv_window(grid, shape)
    x, y = (batch, cin, slots), (batch, cout, capacity)
    shapes = (x, x, (weights,), (weights,), y, y, x, (1, weights), (1, cout))
    return plan("ilajax_conv_bwd", *shapes, batch=batch, window=window)


def limit(of, shared, *arguments, **sizes):
    with plans.tuned("cuda", shared_memory=shared):
        return of(*arguments, **sizes).limit


directions = pytest.mark.parametrize("of", [forward, backward])


@directions
@pytest.mark.parametrize("channels", [1, 8, 64, 256])
@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 5, 5), (7, 7, 7), (9, 9, 9)])
def test_usual_windows_run_on_every_device(of, shape, channels):
    """Catches a limit that sends usual work to the reference."""
    assert limit(of, GAMING, shape, cin=channels, cout=channels) == ""


def test_large_windows_need_a_large_device():
    """Catches a limit that does not ask the device, and a reason that does not say what is missing."""
    large = (13, 13, 13)
    assert limit(forward, GAMING, large) == "needs 129 KB of shared memory, the device has 99 KB"
    assert limit(forward, A100, large) == limit(forward, H100, large) == ""
    assert limit(backward, GAMING, large) == ""
    larger = limit(backward, GAMING, (17, 17, 17))
    assert larger == "needs 175 KB of shared memory, the device has 99 KB"
    assert "shared memory" in limit(forward, H100, (19, 19, 19))
    assert "shared memory" in limit(backward, H100, (23, 19, 19))
    # Lists of taps are wider above three axes.
    line, volume = (1500,), (1500, 1, 1, 1)
    grids = (1 << 16,), (1 << 16, 1, 1, 1)
    assert limit(forward, GAMING, line, grids[0]) != limit(forward, GAMING, volume, grids[1])


@directions
def test_counts(of):
    """Catches a number that does not fit into the kernels' 32 bits."""
    most = (1 << 26) - 1
    grid = (1 << 27,)
    assert limit(of, H100, (3,), grid, slots=most) == ""
    assert "2^26" in limit(of, H100, (3,), grid, slots=most + 1)
    assert "2^26" in limit(of, H100, (3,), grid, capacity=most + 1)
    assert "2^31 channels" in limit(of, H100, (1,), (8,), batch=1 << 28, slots=1, capacity=1)
    assert "taps" in limit(of, H100, ((1 << 24) + 1,), ((1 << 24) + 1,), slots=1, cout=1)
    with pytest.raises(ValueError, match=r"2\^31 weights"):
        of((1,), (8,), cin=1 << 16, cout=1 << 15, slots=1)


def test_static_shared_memory_is_allowed_for():
    """Catches a kernel whose static shared memory outgrows what the limits take it to have."""
    record = json.loads(RESOURCES.read_text())
    dynamic = [
        row["shared"]
        for row in record["kernels"]
        if row["kernel"].startswith(("PrepareKernel", "TileKernel", "GradientKernel"))
    ]
    assert dynamic
    assert max(dynamic) <= 2 << 10  # kStaticShared in xla_kernels/common/cuda.h


# --- Where jax.export leaves the batch open --------------------------------------------------------

WINDOW = conv_window((64, 64), (3, 3), strides=1, padding="SAME", dilation=1)
CELLS = pool_window((64, 64), 2)


def submanifold_gradient(b):
    x, y = (b, 2, 500), (b, 8, 500)
    no_map = (0, 0, 0)  # a kernel on a GPU takes none
    shapes = ((b, 1, 500), x, (144,), (144,), y, no_map, x, (1, 144), (1, 8))
    return plan("ilajax_submanifold_bwd", *shapes, batch=b, window=WINDOW)


def conv_gradient_of_each(b):
    """As vmap of a gradient with respect to the filter makes it: a group for each sample."""
    x, y = (b, 2, 500), (b, 8, 400)
    shapes = (x, x, (144,), (144,), y, y, x, (b, 144), (b, 8))
    return plan("ilajax_conv_bwd", *shapes, batch=b, groups=b, window=WINDOW)


def select(b, slots=500):
    x, y = (b, 2, slots), (b, 2, 40)
    return plan("ilajax_k_select_fwd", x, x, y, y, batch=b)


def pool(b, capacity):
    x, y = (b, 2, 500), (b, 2, capacity)
    return plan("ilajax_pool_fwd", x, x, y, y, batch=b, window=CELLS)


OPEN = {
    "conv": lambda b: forward((3, 3), (64, 64), b, 2, 500, 8, 400),
    "conv-gradient": lambda b: backward((3, 3), (64, 64), b, 2, 500, 8, 400),
    "conv-gradient-of-each": conv_gradient_of_each,
    "submanifold-gradient": submanifold_gradient,
    "select": select,
    "select-long": lambda b: select(b, 50000),
    "pool": lambda b: pool(b, 1000),
    "pool-cut": lambda b: pool(b, 40),
}


class Open:
    """A size that nobody knows yet, as jax.export has it, and what it will be."""

    def __init__(self, value):
        self.value = value

    def __rmul__(self, factor):
        return factor * self.value

    def __floordiv__(self, other):
        return self.value // other.value if isinstance(other, Open) else self


@pytest.mark.parametrize("name", OPEN)
def test_a_plan_for_an_open_batch(name):
    """Catches a workspace that is too small for some batch: a kernel takes any batch with any plan."""
    plan = OPEN[name]
    # A plan for a batch of the size that open ones are planned for, which a kernel is known to take.
    with plans.tuned("cuda", open_batch=1):
        known = plan(plans.OPEN_BATCH)
    for batch in (1, 2, 63, 64, 65, 500):
        found = plan(Open(batch))
        assert found.numbers.tolist() == known.numbers.tolist()
        if batch == plans.OPEN_BATCH:
            # Each array may take 63 bytes more.
            assert known.workspace <= found.workspace <= known.workspace + batch * 63 * 4
        assert found.workspace >= known.workspace * min(batch / plans.OPEN_BATCH, 1)
