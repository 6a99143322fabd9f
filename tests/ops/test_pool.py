"""Pooling against loops over cells, and global pooling against dense NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import samples

NAN, INF = np.nan, np.inf


@functools.cache
def program(backend, kind, window, capacity):
    """jit of a pooling and its gradient; the cotangent is a function of the output's shape."""
    pool = {"max": ilajax.max_pool, "avg": ilajax.avg_pool}[kind]

    @jax.jit
    def run(x):
        def values(values):
            y = pool(x.with_values(values), window, capacity=capacity)
            return y.values, y

        pooled, pull, y = jax.vjp(values, x.values, has_aux=True)
        g = (jnp.arange(pooled.size) % 7 - 3).astype(pooled.dtype).reshape(pooled.shape)
        return y, g, pull(g)[0]

    return run


def check(backend, kind, x, window, capacity=None):
    """Compares with NumPy loops, exactly but for a division, which not every device rounds correctly."""
    tolerance = 0.0 if kind == "max" else 2 * float(jnp.finfo(x.dtype).eps)
    y, g, gradient = program(backend, kind, window, capacity)(x)
    sizes = (window,) * len(x.spatial_shape) if isinstance(window, int) else window
    grid = [-(-s // w) for s, w in zip(x.spatial_shape, sizes, strict=True)]
    slots = min(x.capacity, math.prod(grid)) if capacity is None else capacity
    keys, values, grid = oracles.pool(x, sizes, slots, kind)
    assert y.spatial_shape == grid
    oracles.assert_tensor(y, keys, values, tolerance=tolerance)
    assert y.dtype == x.dtype
    assert (gradient.shape, gradient.dtype) == (x.values.shape, x.values.dtype)
    want = oracles.pool_backward(x, sizes, kind, keys, g)
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


@pytest.mark.crossed(3)
@pytest.mark.parametrize("kind", ["max", "avg"])
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
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("capacity", [1, 5, 12, 20])
def test_capacity(backend, capacity, kind, shared):
    """Catches a selection not by value, ties to the higher key, and gradients to cells that were cut."""
    x = samples.tensor(capacity, shared=shared, capacity=20, density=0.6)
    y = check(backend, kind, x, 2, capacity)
    assert y.shared == (shared and capacity >= 9), "shared where nothing can be cut, and only there"


@pytest.mark.parametrize("kind", ["max", "avg"])
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


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("contents", CONTENTS)
def test_contents(backend, contents, kind):
    """Catches a negative maximum clipped at 0, a tie that gets the gradient twice, a lost zero."""
    first = CONTENTS[contents]
    second = {29 - k: v for k, v in first.items()}
    x = samples.from_entries((5, 6), [[first, second], [second, first]], 30)
    check(backend, kind, x, 2, 5)


@pytest.mark.nans
@pytest.mark.parametrize("kind", ["max", "avg"])
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


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_padding_changes_nothing(backend, kind):
    """Catches empty slots that count, or that receive a gradient."""
    x = samples.tensor(3)
    run = program(backend, kind, 2, 6)
    y, _, gradient = run(x)
    wide, _, wide_gradient = run(samples.with_padding(x, 7))
    jax.tree.map(np.testing.assert_array_equal, wide, y)
    np.testing.assert_array_equal(wide_gradient[..., :12], gradient)
    np.testing.assert_array_equal(wide_gradient[..., 12:], 0)


@pytest.mark.nans
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_cotangents_at_padding_are_ignored(backend, kind):
    """Catches a cotangent that leaks out of an empty slot."""
    pool = {"max": ilajax.max_pool, "avg": ilajax.avg_pool}[kind]
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


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_any_data(backend, kind):
    """Catches output that breaks the contract or differs from NumPy's on some data."""

    @settings(max_examples=25)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
    def holds(seed, density, zeros):
        check(backend, kind, samples.tensor(seed, density=density, zeros=zeros), 2, 4)

    holds()


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_a_larger_problem(backend, kind):
    """Catches what only many sites show: slabs of a grid, more than one word of a bitmap."""
    x = samples.tensor(6, 2, 3, (700, 503), capacity=1500, density=0.004)
    check(backend, kind, x, (2, 1), 700)
    check(backend, kind, x, (3, 40))


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
