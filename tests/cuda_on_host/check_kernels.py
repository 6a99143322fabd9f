"""Small cases of all ops, by which every CUDA kernel runs: a minute on the host. See README.md.

Run by check_harness.py, with the plugin that makes "native" mean the CUDA kernels. The cases are
those of tests/ops, of sizes and types that between them reach every instantiation and every way to cut.
"""

import bisect
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import samples
from ilajax.ffi import calls, gpus, plans
from ilajax.geometry import conv_window
from ops import (
    test_conv,
    test_conv_at,
    test_conv_by_site,
    test_convert,
    test_k_select,
    test_memory_safety,
    test_pool,
    test_submanifold,
)

GRIDS = {1: (17,), 2: (5, 6), 3: (4, 3, 5), 4: (2, 3, 2, 3)}
DTYPES = pytest.mark.parametrize("dtype", samples.DTYPES)
SELECTS = dict(zip(samples.DTYPES, test_conv.SELECTS, strict=True))


@pytest.fixture
def workspace():
    """A function that sets the bytes of a workspace to which work is cut."""
    # A program that has been compiled under one plan keeps it.
    for programs in (test_conv, test_conv_by_site, test_pool, test_submanifold):
        programs.program.cache_clear()
    with contextlib.ExitStack() as tuned:
        yield lambda size: tuned.enter_context(plans.tuned("cuda", workspace=size))
    for programs in (test_conv, test_conv_by_site, test_pool, test_submanifold):
        programs.program.cache_clear()


def conv(backend, axes, dtype, *, channels, capacity, select, strides=1, shared=False, batch=2):
    cin, cout = channels
    grid, window = GRIDS[axes], (3, 2, 3, 2)[:axes]
    x = samples.tensor(
        axes, batch, cin, grid, capacity=20, density=0.6, dtype=dtype, shared=shared, zeros=True
    )
    kernel = samples.kernel(axes, window, cin, cout, density=0.6, dtype=dtype, zeros=True)
    run = test_conv.program(backend, capacity, select, ("SAME", strides, 1))
    geometry = oracles.Geometry(grid, window, strides)
    bias = samples.integers(axes, (cout,), dtype)
    test_conv.check(run, x, kernel, bias, geometry, capacity, select)


def submanifold(backend, axes, dtype, *, channels):
    cin, cout = channels
    x = samples.tensor(
        axes, 2, cin, GRIDS[axes], capacity=20, density=0.6, dtype=dtype, shared=True
    )
    kernel = samples.kernel(axes, (3, 2, 3, 2)[:axes], cin, cout, dtype=dtype, zeros=True)
    test_submanifold.check(backend, x, kernel, samples.integers(axes, (cout,), dtype))


@DTYPES
@pytest.mark.parametrize("axes", [3, 4])
def test_conv_that_cuts(backend, axes, dtype):
    """Catches a kernel for up to three axes, or for more, that is wrong in some type."""
    conv(backend, axes, dtype, channels=(3, 9), capacity=4, select=SELECTS[dtype])


@pytest.mark.parametrize("select", test_conv.SELECTS)
def test_conv_of_one_channel(backend, select):
    """Catches the way of narrow inputs, which looks sites up first, under any selection."""
    conv(backend, 2, "float32", channels=(1, 3), capacity=5, select=select, strides=(1, 2))


def test_conv_of_a_flat_grid(backend):
    """Catches rows of taps told apart by their flat offset only: two grid rows up is one plane up here."""
    grid, window = (4, 2, 5), (3, 3, 3)
    x = samples.tensor(7, 2, 1, grid, capacity=4, density=0.05)
    run = test_conv.program(backend, 40, "value", ("SAME", 1, 1))
    kernel, bias = samples.kernel(7, window, 1, 3), samples.integers(7, (3,))
    test_conv.check(run, x, kernel, bias, oracles.Geometry(grid, window, 1), 40, "value")


def test_conv_that_keeps_all(backend):
    """Catches the way without counting again, and a shared support of many channels."""
    conv(backend, 1, "float32", channels=(34, 2), capacity=20, select="value", shared=True)


@pytest.mark.parametrize("size", [1, 1 << 17])
def test_conv_in_parts(backend, workspace, size):
    """Catches slabs, chunks of the batch, and responses that are computed again for want of room."""
    workspace(size)
    conv(backend, 3, "float32", channels=(2, 3), capacity=4, select="positive", batch=3)


@DTYPES
@pytest.mark.parametrize("channels", [(2, 3), (9, 10)], ids=["narrow", "wide"])
def test_conv_at_the_sites(backend, channels, dtype):
    """Catches a wrong tile of channels of either width, forward or transposed."""
    submanifold(backend, 3, dtype, channels=channels)


def test_conv_at_the_sites_in_parts(backend, workspace):
    """Catches a block of channels that is left out, or added twice."""
    workspace(1)
    submanifold(backend, 2, "float32", channels=(3, 34))


def strided(axes, transposed):
    """A window that strides, and its strides."""
    strides = (1, 1, 2, 1)[-axes:]
    geometry = oracles.Geometry((2, 3, 6, 5)[-axes:], (2, 1, 3, 2)[-axes:], strides)
    return oracles.Transposed(geometry) if transposed else geometry, strides


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("axes", [2, 4])
def test_conv_at_given_sites(backend, axes, transposed):
    """Catches a site that is looked for among the wrong keys, forward or backward, or at the wrong step."""
    geometry, strides = strided(axes, transposed)
    for dtype in samples.DTYPES:
        case = test_conv_at.operands(5, geometry.grid, geometry.shape, geometry.window, dtype)
        test_conv_at.check(backend, *case, geometry, strides=strides)


@DTYPES
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("axes", [2, 4])
def test_the_strongest_sites(backend, axes, transposed, dtype):
    """Catches a site that is not marked, scored by some of its channels, or takes another one's key."""
    geometry, strides = strided(axes, transposed)
    options = {"strides": strides, "padding": "SAME"}
    if transposed:
        options["output_shape"] = geometry.shape
    channels = 5 if transposed else 9  # in a narrow tile, and in a wide one
    case = test_conv_by_site.operands(5, geometry.grid, geometry.window, dtype, cout=channels)
    for capacity in (4, 40):
        test_conv_by_site.check(backend, *case, geometry, capacity, **options)


def test_the_strongest_sites_in_parts(backend, workspace):
    """Catches a block of channels that is left out of the scores, and sites of a second span."""
    workspace(1)
    geometry = oracles.Geometry((70, 60), (3, 3))
    case = test_conv_by_site.operands(4, geometry.grid, (3, 3), cout=34, density=0.02)
    test_conv_by_site.check(backend, *case, geometry, 50, "magnitude")


@pytest.mark.nans
def test_nan_and_inf(backend):
    """Catches a careful loop, for what is not finite, that is wrong."""
    for contents in ("inf-against-stored-zero", "inf-minus-inf", "all-nan"):
        test_conv.test_nan_and_inf(backend, contents, "value")
    test_submanifold.test_nan_and_inf(backend)


@DTYPES
@pytest.mark.parametrize("slots", [7, 12, 400], ids=["whole", "chunks", "more-chunks-than-threads"])
def test_selection(backend, slots, dtype):
    """Catches a selection by one block, or by several, and its gradient."""
    x = samples.tensor(slots, capacity=slots, density=0.7, dtype=dtype, zeros=True)
    test_k_select.check(backend, x, 3, SELECTS[dtype])


@DTYPES
@pytest.mark.parametrize("grid", [(8,), (5, 6)], ids=["whole", "chunks"])
def test_dense_arrays(backend, grid, dtype):
    """Catches a conversion to or from a dense array that is wrong in some type."""
    dense = samples.integers(1, (2, *grid, 3), dtype)
    test_convert.check(backend, jnp.asarray(dense), 4, SELECTS[dtype])
    test_convert.test_to_dense(backend, grid, dtype, shared=dtype == "float32")


@DTYPES
@pytest.mark.parametrize("strides", [None, 1], ids=["cells", "overlapping"])
@pytest.mark.parametrize("kind", test_pool.POOLS)
@pytest.mark.parametrize("capacity", [None, 3], ids=["all", "cut"])
def test_pooling(backend, capacity, kind, strides, dtype):
    """Catches a wrong cell, value or gradient, with a selection of the cells and without."""
    x = samples.tensor(3, capacity=20, density=0.6, dtype=dtype, shared=capacity is None)
    test_pool.check(backend, kind, x, 2, capacity, strides)


def test_pooling_in_parts(backend, workspace):
    """Catches segments that are lost between two runs of them."""
    workspace(1)
    test_pool.check(backend, "max", samples.tensor(3, 2, 3, capacity=20, density=0.6), 2, 3)


def test_pooling_over_whole_axes(backend):
    """Catches a wrong run of keys where a cell spans the trailing axes."""
    test_pool.check(backend, "sum", samples.tensor(3, 2, 3, (5, 4, 3), capacity=40), (2, 4, 3))


# --- What a handler refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("program", test_memory_safety.SELECTING)
def test_capacity_zero(backend, program):
    """Catches a handler that looks for a cut for ever."""
    test_memory_safety.test_a_selection_of_nothing_is_refused(program)


def test_responses_without_input_channels(backend):
    """Catches results that nobody writes where a filter has no rows."""
    kernel = kernel_of(
        "ilajax_submanifold_fwd",
        window_of(3, 1),
        (calls.result((2, 4), jnp.float32), calls.result((2,), jnp.int32)),
        (True, True, False, False, False),
        mapped=calls.SiteMap(window_of(3, 1), 0, 0),
    )
    operands = (jnp.arange(4)[None, None], jnp.zeros((1, 0, 4)), jnp.zeros(0, int), jnp.zeros(0))
    features, responses = kernel.call("cuda", 1, *operands, jnp.ones(2))
    np.testing.assert_array_equal(features, 0)
    np.testing.assert_array_equal(responses, 0)


LEAST = 99 << 10  # of shared memory, of the devices that the kernels are for


def window_of(taps, axes):
    return conv_window((*(1,) * (axes - 1), 8), (*(1,) * (axes - 1), taps))


def kernel_of(target, window, each, batched, sums=(), mapped=None, **attributes):
    """A kernel that is called past the limits by which `dispatch` goes to the reference."""
    return calls._Kernel(target, batched, each, sums, window, attributes, mapped)


def forward(window):
    """A kernel and its operands, the least that a convolution can have."""
    kernel = kernel_of(
        "ilajax_conv_fwd",
        window,
        (
            calls.result((1, 4), jnp.int32),
            calls.result((1, 4), jnp.float32),
            calls.result((1,), jnp.int32),
        ),
        (True, True, False, False, False),
        select="value",
    )
    return kernel, (*operands_of(window), jnp.ones(1))


def backward(window):
    x, *rest = operands_of(window)
    kernel = kernel_of(
        "ilajax_conv_bwd",
        window,
        (calls.result((1, 4), jnp.float32),),
        (True, True, False, False, True, True),
        (calls.result(rest[-1].shape, jnp.float32), calls.result((1,), jnp.float32)),
    )
    return kernel, (x, *rest, x, rest[0])


def operands_of(window):
    x = samples.tensor(0, 1, 1, window.input_shape, capacity=4)
    keys = jnp.arange(0, window.taps, 97)  # a few of the taps are live
    return x.keys, x.values, keys, jnp.ones(keys.size)


def run(make, window):
    kernel, operands = make(window)
    return jax.block_until_ready(kernel.call("cuda", 1, *operands))


@pytest.mark.parametrize("axes", [1, 4])
@pytest.mark.parametrize("make", [forward, backward])
def test_windows_beyond_shared_memory(backend, make, axes, monkeypatch):
    """Catches a plan that takes a tap more than the handler does, or leaves one to the reference."""
    monkeypatch.setenv("CUDA_ON_HOST_SHARED", str(LEAST))
    monkeypatch.setattr(gpus, "shared_memory", lambda: LEAST)

    def is_refused(taps):
        kernel, operands = make(window_of(taps, axes))
        return bool(kernel.limit("cuda", operands))

    most = bisect.bisect_left(range(1, 1 << 14), True, key=is_refused)
    run(make, window_of(most, axes))
    with pytest.raises(jax.errors.JaxRuntimeError, match="bytes of shared memory, the device has"):
        run(make, window_of(most + 1, axes))


def test_sums_in_shared_memory_or_not(backend):
    """Catches a plan whose workspace is not for the sums that the handler puts there."""

    def workspace(taps):
        kernel, operands = backward(window_of(taps, 1))
        return kernel._plan("cuda", 1, operands)[1].workspace

    # Four copies of the sums in the place of one.
    sizes = [workspace(taps) for taps in range(1, 1 << 10)]
    jumps = [t for t in range(1, len(sizes)) if sizes[t] - sizes[t - 1] > 4096]
    assert len(jumps) == 1
    for taps in (jumps[0], jumps[0] + 1):
        run(backward, window_of(taps, 1))
