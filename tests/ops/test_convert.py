"""Conversions from and to dense arrays, against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import samples

SELECTS = ("value", "positive", "magnitude")
NAN, INF = np.nan, np.inf
GRIDS = [(7,), (3, 4), (2, 3, 4), (2, 2, 2, 3)]

# --- to_dense --------------------------------------------------------------------------------------


@pytest.mark.crossed(3)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_to_dense(backend, grid, dtype, shared):
    """Catches a value at the wrong site or channel, and a gradient other than a gather at the keys."""
    x = samples.tensor(0, 2, 3, grid, capacity=9, dtype=dtype, shared=shared, zeros=True)
    g = samples.integers(0, x.shape, dtype)

    @jax.jit
    def run(x, g):
        dense, pull = jax.vjp(lambda v: ilajax.to_dense(x.with_values(v)), x.values)
        return dense, pull(g)[0]

    dense, gradient = run(x, g)
    assert (dense.shape, dense.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(oracles.read(dense), oracles.dense(x))
    assert (gradient.shape, gradient.dtype) == (x.values.shape, x.dtype)
    planes = np.moveaxis(oracles.read(g), -1, 1).reshape(2, 3, -1)
    want = np.zeros(x.values.shape)
    for b, sample in enumerate(oracles.segments(x)):
        for c, segment in enumerate(sample):
            for slot, key, _ in segment:
                want[b, c, slot] = planes[b, c, key]
    oracles.assert_close(gradient, want)


@pytest.mark.nans
def test_to_dense_keeps_nan_and_inf(backend):
    """Catches arithmetic where a copy is meant."""
    x = samples.from_entries((5,), [[{0: NAN, 2: INF, 3: -0.0}]], 4)
    dense = jax.jit(ilajax.to_dense)(x)
    np.testing.assert_array_equal(dense[0, :, 0], [NAN, 0, INF, 0, 0])
    assert np.signbit(dense[0, 3, 0])


def test_to_dense_of_many_chunks(backend):
    """Catches the edge of a chunk: entries lost or doubled where a grid is filled in parts."""
    x = samples.tensor(1, 2, 2, (200, 203), capacity=30000, density=0.5)
    np.testing.assert_array_equal(jax.jit(ilajax.to_dense)(x), oracles.dense(x))


# --- from_dense ------------------------------------------------------------------------------------


@functools.cache
def program(backend, capacity, select):
    """jit of from_dense and its gradient."""

    @jax.jit
    def run(dense, g):
        def values(dense):
            x = ilajax.from_dense(dense, capacity, select=select)
            return x.values, x

        _, pull, x = jax.vjp(values, dense, has_aux=True)
        return x, pull(g)[0]

    return run


def check(backend, dense, capacity, select):
    """Compares with NumPy: candidates are the non-zeros, NaN too."""
    batch, *grid, channels = dense.shape
    g = samples.integers(0, (batch, channels, capacity), str(dense.dtype))
    x, gradient = program(backend, capacity, select)(dense, g)
    planes = np.moveaxis(oracles.read(dense), -1, 1).reshape(batch, channels, -1)
    kept = []
    for sample in planes:
        kept.append([])
        for plane in sample:
            keys = np.flatnonzero(plane)
            chosen, _ = oracles.select(keys.tolist(), plane[keys].tolist(), capacity, select)
            kept[-1].append([(keys[i], plane[keys[i]]) for i in chosen])
    sites = planes.shape[2]
    keys, values = oracles.pack(kept, capacity, sites, dense.dtype)
    oracles.assert_tensor(x, keys, values)
    assert x.spatial_shape == tuple(grid)
    assert not x.shared or channels == 1
    want = np.zeros((batch, channels, sites + 1))
    for b, c in itertools.product(range(batch), range(channels)):
        want[b, c, keys[b, c]] = oracles.read(g)[b, c]
    want = np.moveaxis(want[..., :-1].reshape(batch, channels, *grid), 1, -1)
    assert gradient.dtype == dense.dtype
    oracles.assert_close(gradient, want)


@pytest.mark.crossed(8)
@pytest.mark.parametrize("capacity", [1, 4, 12, 30])
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_from_dense(backend, grid, select, capacity):
    """Catches a wrong set of non-zeros at any capacity, and a gradient other than a scatter to them."""
    dtype = list(samples.DTYPES)[capacity % 3]
    check(backend, samples.integers(1, (2, *grid, 3), dtype), capacity, select)


DENSE = {
    "zeros": np.zeros(12),
    "ones": np.ones(12),
    "minus": -np.ones(12),
    "negative-zeros": np.array([-0.0] * 11 + [1]),
    "infinite": np.array([INF, 1, -INF, 0, INF, -2, 0, 0, -INF, 3, 0, 0]),
    "opposites": np.array([1, -1] * 6),
}


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("contents", DENSE)
def test_contents(backend, contents, select):
    """Catches mistakes at the extremes: nothing there, ties, infinities, zeros of either sign."""
    plane = DENSE[contents].astype(np.float32).reshape(1, 3, 4, 1)
    check(backend, jnp.asarray(np.concatenate([plane, plane[:, ::-1]], axis=-1)), 5, select)


@pytest.mark.nans
@pytest.mark.parametrize("select", SELECTS)
def test_from_dense_keeps_nan_first(backend, select):
    """Catches NaN that compares as zero, or that ranks last, in an input that should show it."""
    dense = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
    dense[0, 0, 2], dense[0, 2, 3] = NAN, np.array(0xFFC00000, np.uint32).view(np.float32)
    check(backend, jnp.asarray(dense), 3, select)


def test_magnitude_is_the_default(backend):
    """Catches another default of `select`."""
    dense = samples.integers(2, (2, 3, 4, 2))
    got = jax.jit(lambda d: ilajax.from_dense(d, 4))(dense)
    want = jax.jit(lambda d: ilajax.from_dense(d, 4, select="magnitude"))(dense)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.nans
def test_nothing_is_cut_unseen(backend):
    """Catches non-zeros (NaN is one) that select=None drops, and an error that does not say where."""
    dense = np.zeros((2, 3, 4, 2), np.float32)
    dense[0, 0, :, 0] = 1
    dense[1, :2, 1:, 1], dense[1, 0, 1, 1] = -1, NAN
    for array in (dense, jnp.asarray(dense)):
        with pytest.raises(ValueError, match=r"capacity is 5.*6 non-zeros.*batch 1, channel 1"):
            ilajax.from_dense(array, 5, select=None)
        fits = ilajax.from_dense(array, 6, select=None)
        np.testing.assert_array_equal(oracles.dense(fits), dense)


def test_select_none_keeps_the_strongest_inside_jit(backend):
    """Catches a select=None that fails on tracers, or that keeps something else than it says."""
    dense = samples.integers(5, (2, 3, 4, 2))
    got = jax.jit(lambda d: ilajax.from_dense(d, 4, select=None))(dense)
    want = jax.jit(lambda d: ilajax.from_dense(d, 4, select="magnitude"))(dense)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_no_samples():
    """Catches an empty batch that divides by zero."""
    for select in ("magnitude", None):
        x = ilajax.from_dense(np.zeros((0, 3, 4, 2), np.float32), 5, select=select)
        assert x.shape == ilajax.to_dense(x).shape == (0, 3, 4, 2)
    with pytest.raises(ValueError, match=r"x must.*one channel.*\(1, 3, 0\)"):
        ilajax.from_dense(np.zeros((1, 3, 0), np.float32), 2)


def test_a_numpy_array_is_an_array(backend):
    """Catches a conversion that takes JAX arrays only."""
    x = ilajax.from_dense(np.eye(3, dtype=np.float32)[None, ..., None], 3)
    np.testing.assert_array_equal(x.keys, [[[0, 4, 8]]])


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_round_trip(backend, dtype):
    """Catches anything lost between dense and sparse where the capacity suffices."""
    dense = samples.integers(3, (2, 5, 6, 3), dtype)
    back = jax.jit(lambda d: ilajax.to_dense(ilajax.from_dense(d, 30)))(dense)
    assert back.dtype == dense.dtype
    np.testing.assert_array_equal(back, dense)


@pytest.mark.parametrize("select", SELECTS)
def test_from_dense_of_a_large_grid(backend, select):
    """Catches a threshold among many ties, chunks, blocks of channels, and a histogram's edges."""
    check(backend, samples.integers(4, (2, 9, 10, 21)), 30, select)
    check(backend, samples.integers(4, (1, 150, 160, 2)), 5000, select)
    check(backend, jax.random.normal(jax.random.key(4), (1, 150, 160, 2)), 5000, select)


def test_any_dense_array(backend):
    """Catches output that breaks the contract on some data."""

    @settings(max_examples=25)
    @given(st.integers(0, 10**6), st.floats(0, 1))
    def holds(seed, density):
        rng = np.random.default_rng(seed)
        dense = rng.integers(-2, 3, (2, 3, 4, 2)) * (rng.random((2, 3, 4, 2)) < density)
        check(backend, jnp.asarray(dense, jnp.float32), 5, "magnitude")

    holds()
