"""Pooling against loops over cells, and global pooling against dense NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import oracles_pooling
import samples

NAN, INF = np.nan, np.inf


POOLS = {
    "max": ilajax.max_pool,
    "sum": ilajax.sum_pool,
    "avg": ilajax.avg_pool,
    "stored": functools.partial(ilajax.avg_pool, count="stored"),
}


@functools.cache
def program(backend, kind, window, capacity, strides=None, padding=None):
    """jit of a pooling and its gradient; the cotangent is a function of the output's shape."""
    pool = functools.partial(POOLS[kind], strides=strides, padding=padding)

    @jax.jit
    def run(x):
        def values(values):
            y = pool(x.with_values(values), window, capacity=capacity)
            return y.values, y

        pooled, pull, y = jax.vjp(values, x.values, has_aux=True)
        g = (jnp.arange(pooled.size) % 7 - 3).astype(pooled.dtype).reshape(pooled.shape)
        return y, g, pull(g)[0]

    return run


def check(backend, kind, x, window, capacity=None, strides=None, padding=None):
    """Compares with NumPy loops, exactly but for a division, which not every device rounds correctly."""
    sizes = (window,) * len(x.spatial_shape) if isinstance(window, int) else window
    most = x.capacity
    if strides is padding is None:
        geometry = oracles_pooling.side_by_side(x.spatial_shape, sizes)
    else:
        steps = sizes if strides is None else strides
        geometry = oracles.Geometry(x.spatial_shape, sizes, steps, padding or "SAME")
        most *= math.prod(-(-w // s) for w, s in zip(sizes, geometry.strides, strict=True))
    divides = kind in ("avg", "stored")
    tolerance = 2 * float(jnp.finfo(x.dtype).eps) if divides else 0.0
    y, g, gradient = program(backend, kind, window, capacity, strides, padding)(x)
    slots = min(most, geometry.sites) if capacity is None else capacity
    keys, values = oracles_pooling.pool(x, geometry, slots, kind)
    assert y.spatial_shape == geometry.shape
    oracles.assert_tensor(y, keys, values, tolerance=tolerance)
    assert y.dtype == x.dtype
    assert (gradient.shape, gradient.dtype) == (x.values.shape, x.values.dtype)
    want = oracles_pooling.pool_backward(x, geometry, kind, keys, g)
    oracles.assert_close(gradient, want.astype(np.float32).astype(gradient.dtype), tolerance)
    return y


# grid, window: dividing, not dividing, above the grid, one site
SHAPES = [
    ((8,), 2),
    ((7,), (3,)),
    ((4, 6), 2),
    ((5, 7), (2, 4)),
    ((3, 2), 5),
    ((5, 6), 1),
    ((4, 5, 3), (2, 2, 2)),
    ((3, 2, 3, 4), (2, 1, 2, 3)),
]


@pytest.mark.crossed(5)
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops(backend, shape, kind):
    """Catches a wrong cell, size of a border cell, value or gradient, in any dimension."""
    grid, window = shape
    seed = sum(grid)
    dtype = list(samples.DTYPES)[seed % 3]
    x = samples.tensor(
        seed, 2, 3, grid, capacity=math.prod(grid), dtype=dtype, shared=seed % 2 == 0, zeros=True
    )
    check(backend, kind, x, window)


@pytest.mark.crossed(5)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("capacity", [1, 5, 12, 20])
def test_capacity(backend, capacity, kind, shared):
    """Catches a selection not by value, ties to the higher key, and gradients to cells that were cut."""
    x = samples.tensor(capacity, shared=shared, capacity=20, density=0.6)
    y = check(backend, kind, x, 2, capacity)
    assert y.shared == (shared and capacity >= 9), "shared where nothing can be cut, and only there"


@pytest.mark.crossed(2)
@pytest.mark.parametrize("kind", POOLS)
def test_the_default_capacity(backend, kind):
    """Catches a default that loses cells, or that stores more than it can need."""
    few = samples.tensor(1, capacity=4)
    assert check(backend, kind, few, 2).capacity == 4
    many = samples.tensor(2, capacity=30)
    assert check(backend, kind, many, 2).capacity == 9


CONTENTS = {
    "empty": {},
    "one": {13: -2.0},
    "full": {k: float((7 * k) % 11 - 5) for k in range(30)},
    "ties": dict.fromkeys(range(30), 1.0),
    "negative": {k: -1.0 - k for k in range(0, 30, 2)},
    "zeros": dict.fromkeys(range(10), 0.0),
    "signed-zeros": {k: -0.0 if k % 2 == 0 else 0.0 for k in range(30)},
    "cancelling": {0: 2.0, 1: -2.0, 6: 1.0, 7: -1.0, 29: 4.0},
    "infinite": {0: INF, 1: 1.0, 8: -INF, 16: -INF, 17: 5.0},
}


@pytest.mark.crossed(5)
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("contents", CONTENTS)
def test_contents(backend, contents, kind):
    """Catches a negative maximum clipped at 0, a tie that gets the gradient twice, a lost zero."""
    first = CONTENTS[contents]
    second = {29 - k: v for k, v in first.items()}
    x = samples.from_entries((5, 6), [[first, second], [second, first]], 30)
    check(backend, kind, x, 2, 5)


@pytest.mark.crossed(2)
@pytest.mark.nans
@pytest.mark.parametrize("kind", POOLS)
def test_nan_is_propagated(backend, kind):
    """Catches a maximum that drops NaN, or a selection that cuts it."""
    first = {0: 5.0, 1: NAN, 2: INF, 20: 1.0, 29: NAN}
    second = dict.fromkeys(range(30), 3.0) | {29: NAN}
    third = {3: INF, 8: NAN, 9: NAN}
    x = samples.from_entries((5, 6), [[first, second], [third, {}]], 30)
    values = np.array(x.values)
    values[0, 0, 1] = np.array(0xFFC00000, np.uint32).view(np.float32)
    y = check(backend, kind, x.with_values(jnp.asarray(values)), 2, 2)
    np.testing.assert_array_equal(np.isnan(np.asarray(y.values)).sum(axis=2), [[2, 1], [1, 0]])


@pytest.mark.crossed(4)
@pytest.mark.parametrize("kind", POOLS)
def test_padding_changes_nothing(backend, kind):
    """Catches empty slots that count, or that receive a gradient."""
    x = samples.tensor(3)
    run = program(backend, kind, 2, 6)
    y, _, gradient = run(x)
    wide, _, wide_gradient = run(samples.with_padding(x, 7))
    jax.tree.map(np.testing.assert_array_equal, wide, y)
    np.testing.assert_array_equal(wide_gradient[..., :12], gradient)
    np.testing.assert_array_equal(wide_gradient[..., 12:], 0)


@pytest.mark.crossed(4)
@pytest.mark.nans
@pytest.mark.parametrize("kind", POOLS)
def test_cotangents_at_padding_are_ignored(backend, kind):
    """Catches a cotangent that leaks out of an empty slot."""
    pool = POOLS[kind]
    x = samples.tensor(4, density=0.15)

    @jax.jit
    def gradients(x):
        _, pull = jax.vjp(lambda v: pool(x.with_values(v), 2).values, x.values)
        stored = pool(x, 2).keys < 9
        return pull(jnp.where(stored, 1.0, 0.0))[0], pull(jnp.where(stored, 1.0, jnp.nan))[0]

    clean, dirty = gradients(x)
    np.testing.assert_array_equal(dirty, clean)


def test_a_full_grid_is_dense_pooling(backend):
    """Catches a cell border off by one: a full grid pools as `lax.reduce_window` does."""
    x = samples.tensor(5, 2, 2, (6, 7), capacity=42, density=1.0, exact=False)
    full = oracles.dense(x).astype(np.float32)

    def reduce(init, op):
        cells = (1, 2, 3, 1)  # of the last, which ours fills and "VALID" drops, nothing is compared
        return oracles.on_cpu(
            lambda a: jax.lax.reduce_window(a, init, op, cells, cells, "VALID"), full
        )

    y, _, _ = program(backend, "max", (2, 3), None)(x)
    np.testing.assert_array_equal(oracles.dense(y)[:, :, :2], reduce(-INF, jax.lax.max))
    y, _, _ = program(backend, "avg", (2, 3), None)(x)
    want = reduce(0.0, jax.lax.add) / 6
    np.testing.assert_allclose(oracles.dense(y)[:, :, :2], want, rtol=1e-5, atol=1e-6)


def test_half_precision_sums_are_float32(backend):
    """Catches an average accumulated in the storage dtype: 300 ones average to 1."""
    x = samples.from_entries((300,), [[dict.fromkeys(range(300), 1)]], 300, "bfloat16")
    y, _, _ = program(backend, "avg", 300, None)(x)
    assert y.values[0, 0, 0] == 1
    assert jax.jit(ilajax.global_avg_pool)(x)[0, 0] == 1


@pytest.mark.crossed(4)
@pytest.mark.parametrize("kind", POOLS)
def test_any_data(backend, kind):
    """Catches output that breaks the contract or differs from NumPy's on some data."""

    @settings(max_examples=25)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
    def holds(seed, density, zeros):
        check(backend, kind, samples.tensor(seed, density=density, zeros=zeros), 2, 4)

    holds()


@pytest.mark.crossed(4)
@pytest.mark.parametrize("kind", POOLS)
def test_a_larger_problem(backend, kind):
    """Catches what only many sites show: slabs of a grid, more than one word of a bitmap."""
    x = samples.tensor(6, 2, 3, (700, 503), capacity=1500, density=0.004)
    check(backend, kind, x, (2, 1), 700)
    check(backend, kind, x, (3, 40))


# --- Windows that overlap, or leave sites out -------------------------------------------------------

# grid, window, strides, padding
WINDOWS = [
    ((8,), 3, 2, None),
    ((9,), 3, 1, "VALID"),
    ((7,), 2, 3, "VALID"),  # sites between the windows, and behind them
    ((6, 7), 3, 2, "SAME"),
    ((6, 7), (2, 3), None, ((1, 0), (2, 3))),
    ((5, 6), 3, 1, ((-1, 2), (0, -2))),  # sites cut off
    ((4, 3), 1, 2, ((3, 3), (0, 1))),  # windows in the padding
    ((4, 5), (5, 7), (2, 3), "SAME"),  # larger than the grid
    ((5, 4, 6), 3, 2, "SAME"),
    ((4, 5, 3), 2, 1, "SAME"),
    ((3, 4, 3, 4), (2, 3, 1, 2), (1, 2, 1, 2), "SAME"),
]


@pytest.mark.crossed(7)
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_overlapping_windows(backend, shape, kind):
    """Catches an entry that a window lacks or has twice, and a gradient that is not the sum over windows."""
    grid, window, strides, padding = shape
    seed = sum(grid)
    dtype = list(samples.DTYPES)[seed % 3]
    options = {"dtype": dtype, "shared": seed % 2 == 0, "zeros": True}
    x = samples.tensor(seed, 2, 3, grid, capacity=math.prod(grid), **options)
    check(backend, kind, x, window, None, strides, padding)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("capacity", [1, 5, 12, 40])
def test_capacity_of_overlapping_windows(backend, capacity, kind):
    """Catches gradients to windows that were cut, or a selection that is not by value."""
    x = samples.tensor(capacity, shared=capacity == 12, capacity=20, density=0.6)
    y = check(backend, kind, x, 3, capacity, 2)
    assert y.shared == (x.shared and capacity >= 9)


@pytest.mark.crossed(7)
@pytest.mark.nans  # infinities of both signs meet
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("contents", CONTENTS)
def test_contents_of_overlapping_windows(backend, contents, kind):
    """Catches a maximum that several windows share, ties, and infinities that leak into other windows."""
    first = CONTENTS[contents]
    second = {29 - k: v for k, v in first.items()}
    x = samples.from_entries((5, 6), [[first, second]], 30)
    check(backend, kind, x, 3, 20, 1, "SAME")


@pytest.mark.crossed(4)
@pytest.mark.parametrize("kind", POOLS)
def test_overlapping_windows_in_slabs(backend, kind):
    """Catches entries at the edge of a slab that the next one's windows lack."""
    x = samples.tensor(6, 1, 2, (700, 503), capacity=3000, density=0.008)
    check(backend, kind, x, (3, 2), None, (2, 1), "SAME")
    check(backend, kind, x, (9, 4), 500, (2, 5), "VALID")


def test_overlapping_windows_are_dense_pooling(backend):
    """Catches windows that lie elsewhere than those of Flax's pooling."""
    x = samples.tensor(5, 2, 2, (6, 7), capacity=42, density=1.0, exact=False)
    full = oracles.dense(x).astype(np.float32)
    where = {"strides": (2, 1), "padding": "SAME"}
    y, _, _ = program(backend, "max", 3, None, *where.values())(x)
    np.testing.assert_array_equal(
        oracles.dense(y), oracles.on_cpu(lambda a: nnx.max_pool(a, (3, 3), **where), full)
    )
    y, _, _ = program(backend, "avg", 3, None, *where.values())(x)
    dense = oracles.on_cpu(
        lambda a: nnx.avg_pool(a, (3, 3), **where, count_include_pad=False), full
    )
    np.testing.assert_allclose(oracles.dense(y), dense, rtol=1e-5, atol=1e-6)


# --- Global pooling --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_global_pooling(backend, dtype, shared):
    """Catches absent sites taken as a maximum of 0, and an average over the stored entries only."""
    x = samples.tensor(7, 3, 2, shared=shared, dtype=dtype, density=0.2)
    largest, average = jax.jit(lambda x: (ilajax.global_max_pool(x), ilajax.global_avg_pool(x)))(x)
    assert largest.shape == average.shape == (3, 2)
    assert largest.dtype == average.dtype == x.dtype
    for b, sample in enumerate(oracles.segments(x)):
        for c, segment in enumerate(sample):
            values = [v for _, _, v in segment]
            assert largest[b, c] == (max(values) if values else 0)
            want = np.asarray(sum(values) / 30, np.float32).astype(x.dtype)
            np.testing.assert_allclose(
                np.float32(average[b, c]), np.float32(want), rtol=float(jnp.finfo(x.dtype).eps)
            )


def test_global_pooling_of_negatives_and_nothing(backend):
    """Catches a negative maximum clipped at 0, and an empty segment that is not 0."""
    x = samples.from_entries((4,), [[{1: -3, 2: -5}, {}, {0: -INF}]], 3)
    np.testing.assert_array_equal(ilajax.global_max_pool(x), [[-3, 0, -INF]])
    np.testing.assert_array_equal(ilajax.global_avg_pool(x), [[-2, 0, -INF]])


def test_a_global_maximum_has_no_infinity_of_its_own():
    """Catches -inf at padding, which `jax.debug_infs` reports, and padding's own values."""
    x = samples.from_entries((8,), [[{1: -3, 2: -5}, {}]], 4)
    x = x.with_values(jnp.where(x.keys < x.sites, x.values, 7))
    with jax.debug_infs(True):
        np.testing.assert_array_equal(ilajax.global_max_pool(x), [[-3, 0]])
        gradient = jax.grad(lambda v: ilajax.global_max_pool(x.with_values(v)).sum())(x.values)
    np.testing.assert_array_equal(gradient, [[[1, 0, 0, 0], [0] * 4]])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_global_average_over_stored_entries(backend, dtype, shared):
    """Catches a mean over all sites or slots, padding that counts, and an empty segment that is not 0."""
    x = samples.tensor(7, 3, 2, shared=shared, dtype=dtype, density=0.2)
    average = jax.jit(lambda x: ilajax.global_avg_pool(x, over="stored"))(x)
    assert average.shape == (3, 2)
    assert average.dtype == x.dtype
    exact = float(jnp.finfo(x.dtype).eps)
    for b, sample in enumerate(oracles.segments(x)):
        for c, segment in enumerate(sample):
            values = [v for _, _, v in segment]
            want = np.float32(sum(values) / len(values) if values else 0)
            np.testing.assert_allclose(np.float32(average[b, c]), want, rtol=exact)
    # The dense form: the sum of the map by that of its mask.
    ones = jnp.broadcast_to(x.keys < x.sites, x.values.shape).astype(x.dtype)
    mask = oracles.dense(x.with_values(ones))
    axes = tuple(range(1, mask.ndim - 1))
    want = oracles.dense(x).sum(axes) / np.maximum(mask.sum(axes), 1)
    np.testing.assert_allclose(np.float32(average), want, rtol=exact)


def test_global_average_over_stored_entries_of_nothing_and_zeros(backend):
    """Catches a stored 0 that does not count, and a division by 0 stored entries, in the gradient too."""
    x = samples.from_entries((8,), [[{1: 3, 2: 0, 5: 6}, {}, {0: -1}]], 4)

    def average(values):
        return ilajax.global_avg_pool(x.with_values(values), over="stored")

    np.testing.assert_array_equal(average(x.values), [[3, 0, -1]])
    gradient = jax.jit(jax.grad(lambda values: average(values).sum()))(x.values)
    third = np.float32(1 / 3)
    np.testing.assert_array_equal(gradient, [[[third, third, third, 0], [0] * 4, [1, 0, 0, 0]]])


def test_global_average_over_something_else_raises():
    """Catches a misspelt word taken for the default."""
    x = samples.from_entries((8,), [[{1: 3}]], 4)
    with pytest.raises(ValueError, match=r"over must be 'sites'.*'stored'.*got 'support'"):
        ilajax.global_avg_pool(x, over="support")


@pytest.mark.nans
def test_global_pooling_propagates_nan(backend):
    """Catches a maximum that drops NaN."""
    x = samples.from_entries((4,), [[{1: 3, 2: NAN}, {0: 1}]], 3)
    np.testing.assert_array_equal(ilajax.global_max_pool(x), [[NAN, 1]])
    np.testing.assert_array_equal(ilajax.global_avg_pool(x), [[NAN, 0.25]])


def test_gradients_of_global_pooling(backend):
    """Catches a gradient at padding or to every tie, and an average's gradient of the wrong size."""
    x = samples.from_entries((8,), [[{1: 3, 2: 7, 5: 7}, {}, {0: -1}]], 4)
    largest, average = jax.jit(
        lambda x: (
            jax.grad(lambda v: ilajax.global_max_pool(x.with_values(v)).sum())(x.values),
            jax.grad(lambda v: ilajax.global_avg_pool(x.with_values(v)).sum())(x.values),
        )
    )(x)
    np.testing.assert_array_equal(largest, [[[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]])
    np.testing.assert_array_equal(average, np.where(np.asarray(x.keys) < 8, 1 / 8, 0))
