"""Degenerate loads: whatever is stored, or asked for, an operation neither hangs nor explodes nor goes wrong.

All in one channel, no room or too much, windows above the grid, huge grids with next to nothing in them,
lines longer than a kernel's buffer, ties everywhere, nothing but NaN. Numbers are small integers, so that
results are compared exactly with NumPy loops.

What the CPU kernels do only where a problem is large (entries that have no room at once, a stage that
overflows, a sample cut into many parts) they do here on small ones, by a plan that leaves less room.
"""

import contextlib
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples
from ilajax.ffi import plans, routes
from ops import test_conv, test_convert, test_k_select, test_pool, test_submanifold

SELECTS = ("value", "positive", "magnitude")
NAN = np.nan


@pytest.fixture
def native(monkeypatch):
    """The native backend, for what is too much for the reference."""
    if not routes.native_platforms():
        pytest.skip("no kernels are installed")
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    return "native"


@pytest.fixture
def squeeze(native, monkeypatch):
    """A function that plans with other numbers; it returns the plans made from then on, by target."""
    if samples.platform() != "cpu":
        pytest.skip("only the CPU's kernels are planned so")
    made = {}

    def record(platform, target, *problem, make=plans.plan):
        made[target] = make(platform, target, *problem)
        return made[target]

    def change(**numbers):
        tuned.enter_context(plans.tuned("cpu", **numbers))
        return made

    # A program that has been compiled under one plan keeps it.
    test_conv.program.cache_clear()
    monkeypatch.setattr(plans, "plan", record)
    with contextlib.ExitStack() as tuned:
        yield change
    test_conv.program.cache_clear()


class ForwardPlan(NamedTuple):
    """The numbers of xla_kernels/conv/cpu.cc's."""

    block: int
    line_sites: int
    max_planes: int
    dense_planes: int
    dense_percent: int
    max_entries: int
    stage: int
    parts: int
    workers: int


class GradientPlan(NamedTuple):
    """The numbers of xla_kernels/lines/gradient.h's."""

    block: int
    line_sites: int
    spread_lines: int
    slab_planes: int
    dense_planes: int
    dense_percent: int
    max_entries: int
    parts: int
    workers: int


def plans_of_conv(made):
    forward, backward = (made[f"ilajax_conv_{direction}"] for direction in ("fwd", "bwd"))
    return ForwardPlan(*forward.numbers), GradientPlan(*backward.numbers)


# --- Entries in few places, and capacities of any size ---------------------------------------------

GRID = (5, 6)
FULL = {k: (-1.0) ** k * (k % 4 + 1) for k in range(30)}
SOME = {0: 2.0, 7: -1.0, 13: 3.0, 22: 4.0, 29: -2.0}

LOADS = {
    "all-in-one-channel": [[{}, {}, SOME, {}], [{}, {}, {}, SOME]],
    "one-full-channel": [[{}, FULL, {}, {}], [FULL, {}, {}, {}]],
    "one-full-sample": [[FULL, FULL, FULL, FULL], [{}, {}, {}, {}]],
    "one-entry": [[{}, {}, {}, {}], [{}, {}, {29: 1.0}, {}]],
}


@pytest.mark.crossed(24)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("capacity", [1, 7, 30, 41])
@pytest.mark.parametrize("select", SELECTS)
def test_uneven_loads(backend, select, capacity, load):
    """Catches room or work that is shared out evenly, and a capacity of one, of all sites or of more."""
    x = samples.from_entries(GRID, LOADS[load], 30)
    kernel, bias = samples.kernel(0, (3, 3), 4, 3), jnp.array([1.0, 0.0, -2.0])
    run = test_conv.program(backend, capacity, select)
    test_conv.check(run, x, kernel, bias, oracles.Geometry(GRID, (3, 3)), capacity, select)


# grid, window, strides, padding, dilation
WINDOWS = {
    "1x1-1d": ((30,), (1,), 1, "SAME", 1),
    "1x1-2d": ((5, 6), (1, 1), 1, "VALID", 1),
    "1x1-3d": ((3, 4, 5), (1, 1, 1), 1, "SAME", 1),
    "1x1-4d": ((2, 3, 2, 3), (1, 1, 1, 1), 1, "SAME", 1),
    "1x1-dilated": ((5, 6), (1, 1), 1, "SAME", (7, 1)),
    "1x1-stride-above-the-grid": ((5, 6), (1, 1), (9, 7), "SAME", 1),
    "one-site": ((1, 1), (3, 3), 1, "SAME", 1),
    "one-site-3d": ((1, 1, 1), (1, 1, 1), 1, "SAME", 1),
    "above-1d": ((3,), (9,), 1, "SAME", 1),
    "above-1d-dilated": ((4,), (3,), 1, "SAME", 7),
    "above-2d": ((2, 3), (5, 7), 1, "SAME", 1),
    "above-2d-strided": ((2, 3), (7, 5), 2, "SAME", 1),
    "above-2d-padded": ((2, 3), (4, 5), 1, ((3, 3), (4, 4)), 1),
    "above-2d-one-output": ((2, 3), (5, 5), 1, ((2, 1), (1, 1)), 1),
    "above-3d": ((2, 2, 2), (3, 5, 3), 1, "SAME", 2),
    "sites-out-of-reach": ((3, 4), (3, 2), 1, ((9, 8), (7, 9)), 1),
    "sites-out-of-reach-strided": ((3, 4), (2, 3), (4, 3), ((9, 8), (7, 9)), 1),
}


@pytest.mark.crossed(18)
@pytest.mark.parametrize("capacity", ["one", "sites", "above"])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(backend, name, capacity):
    """Catches taps out of bounds or left out where a window has one site, or more than the grid."""
    grid, window, strides, padding, dilation = WINDOWS[name]
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    slots = {"one": 1, "sites": geometry.sites, "above": geometry.sites + 3}[capacity]
    select = SELECTS[len(name) % 3]
    x = samples.tensor(1, 2, 3, grid, capacity=math.prod(grid), density=0.8)
    run = test_conv.program(backend, slots, select, (padding, strides, dilation))
    kernel, bias = samples.kernel(1, window, 3, 2), jnp.array([2.0, -1.0])
    test_conv.check(run, x, kernel, bias, geometry, slots, select)


# --- Huge grids with next to nothing in them -------------------------------------------------------

# grid, window, strides, dilation, (batch, channels) to time
HUGE = {
    "1d": ((10**7,), (3,), 1, 1, (4, 8)),
    "1d-strided": ((10**7,), (5,), 2, 3, (4, 8)),
    "2d-row": ((1, 10**7), (3, 3), 1, 1, (4, 8)),
    "2d": ((2500, 4000), (3, 3), 1, 1, (4, 8)),
    "2d-strided": ((2500, 4000), (3, 3), (1, 2), 1, (4, 8)),
    "3d": ((200, 250, 200), (3, 3, 3), 1, 1, (4, 8)),
    # A line along the last axis has one site here, and each line costs a little.
    "2d-column": ((10**7, 1), (3, 3), 1, 1, (1, 8)),
}
# Most take a hundredth of that. A pass over the grid for each sample, pair of channels and tap takes more,
# and whatever is quadratic in the sites does not end.
SECONDS = 5.0


def three_entries(batch, channels, grid, shared=False):
    """The first site, the last one and one in the middle, moved a little from channel to channel."""
    last = math.prod(grid) - 1

    def segment(c):
        return {c: 1.0 + c, last // 2 + c: -2.0, last - c: 3.0}

    x = samples.from_entries(
        grid, [[segment(0 if shared else c) for c in range(channels)]] * batch, 4
    )
    return ilajax.SparseTensor(x.keys[:, :1], x.values, grid) if shared else x


def assert_fast(run, *arguments):
    jax.block_until_ready(run(*arguments))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    assert time.perf_counter() - start < SECONDS


@pytest.mark.parametrize("name", HUGE)
def test_conv_on_a_huge_grid(native, name):
    """Catches work that follows the grid, not what is stored, and a key or a size that overflows."""
    grid, window, strides, dilation, (batch, channels) = HUGE[name]
    run = test_conv.program(native, 9, "value", ("SAME", strides, dilation))
    kernel = samples.kernel(2, window, channels, channels)
    g = jnp.ones((batch, channels, 9))
    assert_fast(run, three_entries(batch, channels, grid), kernel, jnp.zeros(channels), g)
    geometry = oracles.Geometry(grid, window, strides, "SAME", dilation)
    x, kernel = three_entries(1, 2, grid), samples.kernel(2, window, 2, 1)
    test_conv.check(run, x, kernel, jnp.zeros(1), geometry, 9, "value")


@pytest.mark.parametrize("grid", [(10**7,), (10**7, 1), (1, 10**7), (2500, 4000)], ids=str)
def test_other_operations_on_a_huge_grid(native, grid):
    """Catches the same in the submanifold convolution, selection and pooling."""
    kernel = samples.kernel(3, (3,) * len(grid), 2, 2)
    shared = three_entries(1, 2, grid, shared=True)
    run = test_submanifold.program(native)
    assert_fast(run, shared, kernel, jnp.zeros(2), shared.values)
    test_submanifold.check(native, shared, kernel, jnp.zeros(2))

    many, x = three_entries(4, 8, grid), three_entries(1, 2, grid)
    assert_fast(test_k_select.program(native, 2, "magnitude"), many, many.values[..., :2])
    test_k_select.check(native, x, 2, "magnitude")
    for kind in ("max", "avg"):
        assert_fast(test_pool.program(native, kind, 2, 2), many)
        test_pool.check(native, kind, x, 2, 2)


# --- Plans that leave little space ------------------------------------------------------------------

PLANS = {
    # Entries are read as they lie where not even a row of them is sorted at once.
    "few-entries": {"entries": 8, "dense_share": 0},
    # Planes of the grid, each selected from on its own.
    "many-parts": {"tasks": 64},
    # Twice a line and one more: what a stage must take in.
    "small-stage": {"stage": 24, "tasks": 1},
    "all": {"entries": 8, "dense_share": 0, "tasks": 64, "stage": 24},
    # The dense form, a few planes at once; whatever it costs, also where most lines are empty.
    "small-slabs": {"dense_bytes": 2048, "tasks": 2},
    "dense-lines": {"dense_percent": 10**9, "dense_share": 10**9},
}


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        (name, plan)
        for i, name in enumerate(test_conv.GEOMETRIES)
        for j, plan in enumerate(PLANS)
        if (i + j) % 2 == 0  # half of the plans each
    ],
)
def test_plans(squeeze, name, plan):
    """Catches a result that depends on how the work is cut up, in any crossing of the options."""
    made = squeeze(**PLANS[plan])
    number = list(test_conv.GEOMETRIES).index(name) + 1000 * list(PLANS).index(plan)
    test_conv.cross("native", name, test_conv.draw(number))
    forward, backward = plans_of_conv(made)
    if "entries" in PLANS[plan]:
        assert forward.max_entries == backward.max_entries == PLANS[plan]["entries"]
    if "stage" in PLANS[plan]:
        assert forward.stage == PLANS[plan]["stage"]
    grid, *_ = test_conv.GEOMETRIES[name]
    if PLANS[plan].get("tasks") == 64 and len(grid) > 1 and name != "2d-one-output":
        assert forward.parts > 1


LINE_BYTES = 256 << 10
# grid, window, strides, padding, dilation, cin, cout
LONG_LINES = {
    "1d": ((70_000,), (5,), 1, "SAME", 1, 2, 3),
    "1d-strided": ((70_000,), (3,), 2, "SAME", 1, 2, 3),
    "1d-strided-dilated": ((70_000,), (4,), 3, "VALID", 2, 1, 20),
    "1d-dilated": ((70_000,), (3,), 1, ((40, 0),), 19, 2, 3),
    "1d-dilated-beyond-a-piece": ((70_000,), (3,), 1, "SAME", 8_200, 1, 2),
    "1d-wide": ((20_000,), (3,), 1, "SAME", 1, 1, 33),
    "2d": ((5, 20_000), (3, 3), 1, "SAME", 1, 2, 3),
    "2d-strided": ((5, 20_000), (3, 3), (1, 2), "SAME", 1, 2, 3),
    "2d-strided-dilated": ((5, 40_000), (2, 3), 2, "VALID", (1, 5), 2, 3),
    "2d-row": ((1, 20_000), (1, 3), 1, "SAME", 2, 2, 3),
    "3d": ((2, 3, 20_000), (2, 3, 3), 1, "SAME", 1, 1, 2),
}


def around_pieces(grid, stride, channels, piece):
    """Entries on either side of where a line's buffer ends, more than in other places."""
    rng = np.random.default_rng(4)
    *lead, length = grid
    keys = [
        line * length + place
        for line in range(math.prod(lead))
        for edge in range(0, length + 1, piece * stride)
        for place in [*range(edge - 4, edge + 5), rng.integers(length)]
        if 0 <= place < length
    ]
    keys = np.unique(keys)
    return samples.from_entries(
        grid,
        [
            [
                dict(
                    zip(
                        (own := keys[rng.random(keys.size) < 0.7]).tolist(),
                        samples.small_integers(rng, own.size).tolist(),
                        strict=True,
                    )
                )
                for _ in range(channels)
            ]
        ],
        keys.size,
    )


@pytest.mark.parametrize("plan", ["few-entries", None])
@pytest.mark.parametrize("name", LONG_LINES)
def test_long_lines(squeeze, name, plan):
    """Catches a response, or a gradient, lost or counted twice where one piece of a line meets the next."""
    grid, window, strides, padding, dilation, cin, cout = LONG_LINES[name]
    made = squeeze(line_bytes=LINE_BYTES, **PLANS.get(plan, {}))
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    block = math.ceil(cout / math.ceil(cout / 32) / 8) * 8
    piece = LINE_BYTES // (4 * block)
    x = around_pieces(grid, geometry.strides[-1], cin, piece)
    select = SELECTS[len(name) % 3]
    run = test_conv.program("native", 300, select, (padding, strides, dilation))
    kernel, bias = samples.kernel(4, window, cin, cout), samples.integers(4, (cout,))
    test_conv.check(run, x, kernel, bias, geometry, 300, select)
    assert [made.line_sites for made in plans_of_conv(made)] == [piece] * 2
    assert geometry.shape[-1] > piece


# --- Selections that cut hard ----------------------------------------------------------------------

FIELD = (40, 50)
SITE = np.arange(2000)
# Integers that bfloat16 represents, each kind in a channel of its own.
PATTERNS = {
    "ties": np.full(2000, 3),
    "ties-of-either-sign": 5 * (-1) ** SITE,
    "ascending": SITE // 8 - 125,  # each one beats all before it
    "descending": 125 - SITE // 8,
    "a-late-one-above-ties": np.where(SITE == 1990, 4, 3),
    "some-above-ties": np.where((SITE // 30 == 40) | (SITE > 1995), 4, 3),
    "waves": SITE * 7 % 101 - 50,
    # Selections look at the first eleven bits of a float first: these have the same.
    "close": 64 + SITE * 5 % 13,
    "close-and-negative": -64 - SITE * 5 % 13,
    "stored-zeros": np.where(SITE % 9, 0, SITE // 16),
}
CENTRES = [((1, 1), 0), ((3, 3), 4)]
GEOMETRY = {window: oracles.Geometry(FIELD, window) for window, _ in CENTRES}


def patterns(dtype, values=None):
    values = np.stack(list(PATTERNS.values())) if values is None else values
    keys = jnp.broadcast_to(jnp.arange(2000, dtype=jnp.int32), (1, *values.shape))
    return ilajax.SparseTensor(
        keys, jnp.asarray(values[None].astype(np.float32), samples.DTYPES[dtype]), FIELD
    )


def identity(window, centre, channels):
    """A kernel that has each channel's own entries as its responses."""
    taps = math.prod(window)
    keys = [(c * channels + c) * taps + centre for c in range(channels)]
    return ilajax.SparseKernel(
        jnp.array(keys, jnp.int32), jnp.ones(channels), (*window, channels, channels)
    )


@pytest.mark.parametrize("tasks", [1, 64])
@pytest.mark.parametrize("capacity", [1, 60])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("select", SELECTS)
def test_stages_that_overflow(squeeze, select, dtype, capacity, tasks):
    """Catches an entry lost, or a tie broken otherwise, where a stage is emptied again and again."""
    made = squeeze(tasks=tasks, stage=102)
    x, bias = patterns(dtype), jnp.zeros(len(PATTERNS))
    window, centre = CENTRES[(capacity + tasks) % 2]
    kernel = identity(window, centre, x.channels)
    run = test_conv.program("native", capacity, select)
    test_conv.check(run, x, kernel, bias, GEOMETRY[window], capacity, select)
    forward, _ = plans_of_conv(made)
    assert (forward.stage, forward.parts) == (102, {1: 1, 7: 7, 64: 40}[tasks])


@pytest.mark.crossed(9)
@pytest.mark.parametrize("capacity", [1, 60])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("select", SELECTS)
def test_selections_from_dense_arrays(backend, select, dtype, capacity):
    """Catches the same in from_dense, whose stage has 64 entries."""
    dense = np.stack(list(PATTERNS.values()), axis=-1).reshape(1, *FIELD, -1)
    dense = jnp.asarray(dense.astype(np.float32), samples.DTYPES[dtype])
    test_convert.check(backend, dense, capacity, select)


def test_an_output_larger_than_its_stage(native):
    """Catches ties that are cut to the capacity, and are all gone when some that are better come."""
    dense = np.full((1, 137_000, 1), 3, np.float32)
    dense[:, 60_000:77_000] = 4
    test_convert.check(native, jnp.asarray(dense), 20_000, "value")


@pytest.mark.crossed(6)
@pytest.mark.parametrize("capacity", [1, 60])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_selections_of_cells(backend, dtype, capacity):
    """Catches the same in pooling, with cells of one site."""
    test_pool.check(backend, "max", patterns(dtype), 1, capacity)


@pytest.mark.nans
@pytest.mark.crossed(18)
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("select", SELECTS)
def test_all_nan(backend, select, dtype):
    """Catches NaN that breaks an order, is no candidate, or makes a selection cut to nothing or never end."""
    x = patterns(dtype, np.full((2, 2000), NAN))
    kernel = identity((3, 3), 4, 2)
    run = test_conv.program(backend, 60, select)
    test_conv.check(run, x, kernel, jnp.ones(2), GEOMETRY[3, 3], 60, select)
    test_k_select.check(backend, x, 60, select)
    test_convert.check(backend, jnp.moveaxis(x.values, 1, 2).reshape(1, *FIELD, 2), 60, select)
    test_pool.check(backend, "max", x, 1, 60)


@pytest.mark.nans
@pytest.mark.parametrize("tasks", [1, 7, 64])
@pytest.mark.parametrize("select", SELECTS)
def test_stages_full_of_nan(squeeze, select, tasks):
    """Catches the same where a stage overflows, and NaN among numbers that must rank behind it."""
    squeeze(tasks=tasks, stage=102)
    values = np.stack([np.full(2000, NAN), np.where(SITE % 40, 250 - SITE // 8, NAN)])
    run = test_conv.program("native", 60, select)
    kernel, bias = identity((3, 3), 4, 2), jnp.zeros(2)
    test_conv.check(run, patterns("float32", values), kernel, bias, GEOMETRY[3, 3], 60, select)
