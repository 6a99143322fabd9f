"""Small cases of all ops, by which every CUDA kernel runs: a minute on the host. See README.md.

Run by tests/test_cuda_on_host.py, with the plugin that makes "native" mean the CUDA kernels. The cases are
those of tests/ops, of sizes and types that between them reach every instantiation and every way to cut.
"""

import bisect
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import samples
from ilajax import ffi
from ilajax.geometry import conv_window
from ilajax.ops import _plans_cuda, _plans_cuda_ops
from ilajax.ops import conv as conv_op
from ops import (
    test_conv,
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
def workspace(monkeypatch):
    """A function that sets the bytes of a workspace to which work is cut."""

    def set_budget(size):
        for plans in (_plans_cuda, _plans_cuda_ops):
            monkeypatch.setattr(plans, "budget", lambda window: size)

    # A program that has been compiled under one plan keeps it.
    for programs in (test_conv, test_pool, test_submanifold):
        programs.program.cache_clear()
    yield set_budget
    for programs in (test_conv, test_pool, test_submanifold):
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


@DTYPES
@pytest.mark.parametrize("slots", [7, 12], ids=["whole", "chunks"])
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
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("capacity", [None, 3], ids=["all", "cut"])
def test_pooling(backend, capacity, kind, dtype):
    """Catches a wrong cell, value or gradient, with a selection of the cells and without."""
    x = samples.tensor(3, capacity=20, density=0.6, dtype=dtype, shared=capacity is None)
    test_pool.check(backend, kind, x, 2, capacity)


def test_pooling_in_parts(backend, workspace):
    """Catches segments that are lost between two runs of them."""
    workspace(1)
    test_pool.check(backend, "max", samples.tensor(3, 2, 3, capacity=20, density=0.6), 2, 3)


# --- What a handler refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("program", test_memory_safety.SELECTING)
def test_capacity_zero(backend, program):
    """Catches a handler that looks for a cut for ever."""
    test_memory_safety.test_a_selection_of_nothing_is_refused(program)


def test_responses_without_input_channels(backend):
    """Catches results that nobody writes where a filter has no rows."""
    window = window_of(3, 1)
    plan = _plans_cuda_ops.submanifold_forward(window, 0, 2)
    outputs = (
        jax.ShapeDtypeStruct((1, 2, 4), jnp.float32),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
        jax.ShapeDtypeStruct((max(1, plan.workspace),), jnp.uint8),
    )
    features, responses, _ = ffi.call(
        "ilajax_submanifold_fwd",
        outputs,
        *(jnp.arange(4)[None, None], jnp.zeros((1, 0, 4)), jnp.zeros(0, int), jnp.zeros(0)),
        jnp.ones(2),
        **ffi.window_attributes(window),
        **plan.attributes,
    )
    np.testing.assert_array_equal(features, 0)
    np.testing.assert_array_equal(responses, 0)


LEAST = 99 << 10  # of shared memory, of the devices that the kernels are for


def window_of(taps, axes):
    return conv_window((*(1,) * (axes - 1), 8), (*(1,) * (axes - 1), taps))


def run_conv(window, backward):
    x = samples.tensor(0, 1, 1, window.input_shape, capacity=4)
    keys = jnp.arange(0, window.taps, 97)  # a few of the taps are live
    config, operands = (
        conv_op._Config(window, 4, "value"),
        (x.keys, x.values, keys, jnp.ones(keys.size)),
    )
    if backward:
        return conv_op._backward_native(config, "cuda", 1, *operands, x.keys, x.values)
    return conv_op._forward_native(config, "cuda", 1, *operands, jnp.ones(1))


run_forward = functools.partial(run_conv, backward=False)
run_backward = functools.partial(run_conv, backward=True)


@pytest.mark.parametrize("axes", [1, 4])
@pytest.mark.parametrize(
    ("run", "limit", "shape"),
    [
        (run_forward, _plans_cuda.conv_forward_limit, (1, 1, 4, 1, 4)),
        (run_backward, _plans_cuda.conv_backward_limit, (1, 1, 1, 4, 1, 4)),
    ],
    ids=["forward", "backward"],
)
def test_windows_beyond_shared_memory(backend, run, limit, shape, axes, monkeypatch):
    """Catches a plan that takes a tap more than the handler does, or leaves one to the reference."""
    monkeypatch.setenv("CUDA_ON_HOST_SHARED", str(LEAST))
    refused = range(1, 1 << 14)
    most = bisect.bisect_left(
        refused, True, key=lambda taps: limit(window_of(taps, axes), *shape, LEAST) is not None
    )
    jax.block_until_ready(run(window_of(most, axes)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="bytes of shared memory, the device has"):
        jax.block_until_ready(run(window_of(most + 1, axes)))


@pytest.mark.parametrize("more", [0, 1])
def test_sums_in_shared_memory_or_not(backend, more):
    """Catches a plan whose workspace is not for the sums that the handler puts there."""
    most = bisect.bisect_left(
        range(1, 1 << 14), True, key=lambda t: not _plans_cuda._sums_in_shared(window_of(t, 1), 1)
    )
    jax.block_until_ready(run_backward(window_of(most + more, 1)))
