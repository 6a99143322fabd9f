"""Cases of real size under the plans of real calls, so that every loop of every kernel goes round twice.

check_kernels.py has the dtypes and the options, on grids of some 60 sites. Here is what only size shows: runs
of tiles, chunks of maps, strips of entries, long segments. Run by check_ops.py.
"""

import os

import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import samples
from cuda_on_host import check_kernels, machine_code
from ilajax.ffi import calls, plans
from ops import (
    test_conv,
    test_conv_at,
    test_conv_by_site,
    test_convert,
    test_k_select,
    test_pool,
    test_submanifold,
)

REAL = {"select_whole": 16384, "select_chunk": 4096, "min_tile": 512}


@pytest.fixture(autouse=True)
def planned():
    """A function that sets the bytes of a workspace; all plans are those of real calls."""
    programs = (test_conv, test_conv_by_site, test_k_select, test_pool, test_submanifold)
    with plans.tuned("cuda", **REAL):
        yield
    # A program that has been compiled under one plan keeps it.
    for each in programs:
        each.program.cache_clear()


# batch, channels, grid, window, strides, capacity, density of the input, selection, bytes of the workspace
CONVS = {
    # 71 tiles, so that a run of 64 is whole, five chunks of the map, and two strips for the bias.
    "runs": (1, (1, 2), (33, 33, 33), (3, 3, 3), 1, 10_000, 0.01, "value", 0),
    "runs-cut": (1, (3, 2), (33, 33, 33), (3, 3, 3), 1, 400, 0.01, "positive", 0),
    # Responses are computed again in each pass, and a block's sums take several strips.
    "no-room": (1, (3, 9), (24, 50), (3, 3), 1, 300, 0.5, "magnitude", 1),
    "samples": (70, (2, 3), (4, 5), (3, 3), 1, 6, 0.5, "positive", 0),
    # More channels than a group of the map has, on both sides.
    "wide": (2, (35, 41), (7, 9), (3, 3), 1, 20, 0.3, "positive", 0),
    # More taps than a warp has lanes.
    "window": (1, (1, 2), (9, 40), (7, 7), 1, 60, 0.2, "value", 0),
    # The padding of a tile's share of the slots is more than its threads.
    "strided": (1, (2, 3), (90, 80), (3, 3), 2, 1800, 0.01, "positive", 0),
    # Taps of a row that one line of 64 sites does not hold, beyond the ends of the grid too.
    "long-window": (1, (1, 2), (5, 100), (2, 49), 1, 300, 0.01, "value", 0),
    # Most chunks of the map are empty, and so are most tiles.
    "far": (4, (1, 2), (33, 33, 33), (3, 3, 3), 1, 300, 1e-4, "value", 0),
    "far-strided": (3, (1, 2), (70, 45, 33), (4, 5, 5), (3, 2, 2), 300, 5e-5, "value", 0),
    # A tile reads more than 256 words of the map.
    "4d": (1, (1, 2), (9, 9, 9, 9), (3, 3, 3, 3), 1, 100, 0.005, "positive", 0),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv_of_size(backend, name):
    """Catches a tile, run, chunk, strip or part that is left out, taken twice, or ahead of its time."""
    batch, (cin, cout), grid, window, strides, capacity, density, select, workspace = CONVS[name]
    slots = int(np.prod(grid) * density * 1.1) + 2
    x = samples.tensor(1, batch, cin, grid, capacity=slots, density=density, zeros=True)
    kernel = samples.kernel(2, window, cin, cout, density=0.7, zeros=True)
    geometry = oracles.Geometry(grid, window, strides)
    run = test_conv.program(backend, capacity, select, ("SAME", strides, 1))
    with plans.tuned("cuda", workspace=workspace):
        test_conv.check(run, x, kernel, samples.integers(4, (cout,)), geometry, capacity, select)


@pytest.mark.parametrize("name", test_submanifold.LARGE)
def test_submanifold_of_size(backend, name):
    """Catches a block of sites or channels that is left out."""
    test_submanifold.test_larger_problems(backend, name)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_given_sites_of_size(backend, transposed):
    """Catches the second block of sites, and of channels."""
    geometry = oracles.Geometry((40, 45), (3, 2), (2, 1))
    geometry = oracles.Transposed(geometry) if transposed else geometry
    case = test_conv_at.operands(5, geometry.grid, geometry.shape, (3, 2), "float32")
    test_conv_at.check(backend, *case, geometry, strides=(2, 1))


def test_the_strongest_sites_of_size(backend):
    """Catches spans of sites, and blocks of channels, behind the first; and more spans than threads."""
    geometry = oracles.Geometry((70, 60), (3, 3))
    case = test_conv_by_site.operands(4, geometry.grid, (3, 3), cout=34, density=0.1)
    test_conv_by_site.check(backend, *case, geometry, 500, "magnitude")

    geometry = oracles.Geometry((1100, 480), (1, 1))
    x = samples.tensor(4, 1, 1, geometry.grid, capacity=60, density=1e-4, shared=True)
    kernel, bias = samples.kernel(4, (1, 1), 1, 1), samples.integers(4, (1,))
    test_conv_by_site.check(backend, x, kernel, bias, geometry, 40, "magnitude")


@pytest.mark.parametrize("slots", [2500, 20_000], ids=["whole", "chunks"])
def test_selection_of_size(backend, slots):
    """Catches the second round of a block's threads over a segment, with its buffers, and a later chunk."""
    x = samples.tensor(3, 2, 2, (slots,), capacity=slots, density=0.9, zeros=True)
    for capacity in (slots // 3, 2 * slots):
        test_k_select.check(backend, x, capacity, "value")


@pytest.mark.parametrize("sites", [2500, 20_000], ids=["whole", "chunks"])
def test_dense_arrays_of_size(backend, sites):
    """Catches a conversion's second round over a channel."""
    dense = samples.integers(1, (2, sites, 3), "float32")
    test_convert.check(backend, dense, sites // 3, "value")
    test_convert.test_to_dense(backend, (sites,), "float32", shared=False)


@pytest.mark.parametrize("capacity", [None, 100], ids=["all", "cut"])
def test_pooling_of_size(backend, capacity):
    """Catches a cell, a word of the bitmap or a chunk behind the first."""
    x = samples.tensor(3, 2, 3, (33, 33, 33), capacity=3000, density=0.08)
    test_pool.check(backend, "max", x, 2, capacity)
    test_pool.check(backend, "sum", x, 3, capacity, 1)


# --- Results of more than 2^31 elements, in the memory of a few: see handlers.cc ---------------------


def last_of(kernel, channels, operands):
    """Calls a kernel whose last channel alone has anything to keep; returns what that one has."""
    keys, values, *_ = kernel.call("cuda", 1, *operands)
    return [np.asarray(result)[0, channels - 1, :8] for result in (keys, values)]


@pytest.mark.skipif(
    "CUDA_ON_HOST_CALLS" in os.environ or machine_code.WANTED,
    reason="too large to be recorded, and to be run instruction by instruction",
)
@pytest.mark.parametrize("op", ["conv", "k_select"])
def test_more_than_2_31_elements(backend, op):
    """Catches an index of 32 bits."""
    channels, capacity = 2080, 1 << 20
    each = (
        calls.result((channels, capacity), jnp.int32),
        calls.result((channels, capacity), jnp.float32),
    )
    if op == "conv":
        window = check_kernels.window_of(1, 1)  # 8 sites
        kernel = check_kernels.kernel_of(
            "ilajax_conv_fwd",
            window,
            (*each, calls.result((channels,), jnp.int32)),
            (True, True, False, False, False),
            select="value",
        )
        x = jnp.array([[[2, 5, 8]]]), jnp.array([[[3.0, 4.0, 0.0]]])
        operands = (*x, jnp.array([channels - 1]), jnp.ones(1), jnp.zeros(channels))
    else:
        kernel = check_kernels.kernel_of(
            "ilajax_k_select_fwd", None, each, (True, True), sites=8, select="value"
        )
        keys = jnp.full((1, channels, 3), 8).at[0, -1].set(jnp.array([2, 5, 8]))
        operands = keys, jnp.zeros(keys.shape).at[0, -1].set(jnp.array([3.0, 4.0, 0.0]))
    keys, values = last_of(kernel, channels, operands)
    np.testing.assert_array_equal(keys, [2, 5, *[8] * 6])
    np.testing.assert_array_equal(values, [3, 4, *[0] * 6])
