"""Conversions: dense arrays, point sets and concatenation, against NumPy."""

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


@pytest.mark.crossed(5)
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


# --- from_points -----------------------------------------------------------------------------------

GRID = (4, 5)


def voxelise(coordinates, features, batch_index, reduce, capacity, batch=2, grid=GRID):
    """keys [B, 1, K] and values [B, C, K], one point at a time; what lies outside is dropped."""
    cells = [{} for _ in range(batch)]
    for place, feature, b in zip(coordinates, features, batch_index, strict=True):
        inside = all(0 <= p < s for p, s in zip(place, grid, strict=True))
        if inside and 0 <= b < batch and not np.isnan(feature).any():
            cells[b].setdefault(int(np.ravel_multi_index(place, grid)), []).append(feature)
    f = {"mean": np.mean, "sum": np.sum, "max": np.max}[reduce]
    sites = int(np.prod(grid))
    keys = np.full((batch, 1, capacity), sites, np.int32)
    values = np.zeros((batch, np.shape(features)[1], capacity))
    for b, found in enumerate(cells):
        for slot, key in enumerate(sorted(found)[:capacity]):
            keys[b, 0, slot], values[b, :, slot] = key, f(found[key], axis=0)
    return keys, values


def points(seed, count=25, channels=3):
    """Points of which many share a voxel; integer features, so that sums are exact."""
    rng = np.random.default_rng(seed)
    coordinates = np.stack([rng.integers(0, s, count) for s in GRID], axis=1).astype(np.int32)
    features = rng.integers(-4, 5, (count, channels)).astype(np.float32)
    return coordinates, features, rng.integers(0, 2, count).astype(np.int32)


def from_points(coordinates, features, batch_index, capacity=20, reduce="mean"):
    return ilajax.from_points(
        coordinates,
        features,
        batch_index,
        spatial_shape=GRID,
        batch_size=2,
        capacity=capacity,
        reduce=reduce,
    )


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_from_points(reduce, dtype):
    """Catches points put into a wrong voxel or sample, and a wrong reduction: negative maxima too."""
    coordinates, features, batch_index = points(0)
    x = jax.jit(functools.partial(from_points, reduce=reduce))(
        coordinates, jnp.asarray(features, samples.DTYPES[dtype]), batch_index
    )
    keys, values = voxelise(coordinates, features, batch_index, reduce, 20)
    oracles.assert_invariants(x, capacity=20)
    assert x.shared
    assert x.shape == (2, *GRID, 3)
    assert x.dtype == samples.DTYPES[dtype]
    np.testing.assert_array_equal(x.keys, keys)
    tolerance = float(jnp.finfo(x.dtype).eps) if reduce == "mean" else 0.0
    oracles.assert_close(x.values, values, tolerance)


def test_mean_is_the_default_and_eager_is_jit():
    """Catches another default, or concrete input that gives another result than traced input."""
    arguments = points(1)
    eager, traced = from_points(*arguments), jax.jit(from_points)(*arguments)
    jax.tree.map(np.testing.assert_array_equal, eager, traced)
    _, values = voxelise(*arguments, "mean", 20)
    np.testing.assert_allclose(eager.values, values, rtol=1e-6)


@pytest.mark.parametrize("coordinate", [np.int8, np.uint8, np.int16, np.int64, np.uint32])
def test_integers_of_any_width(coordinate):
    """Catches coordinates that wrap around in a narrow or unsigned type: the grid is wider than 127."""
    place = np.array([[0], [100], [127]]).astype(coordinate)
    x = ilajax.from_points(
        place,
        np.ones((3, 1), np.float32),
        np.zeros(3, coordinate),
        spatial_shape=(300,),
        batch_size=1,
        capacity=3,
    )
    np.testing.assert_array_equal(x.keys, [[[0, 100, 127]]])


def test_points_on_a_grid_near_2_31():
    """Catches a key that overflows, and a batch folded into it."""
    grid = (1290, 1290, 1290)
    x = ilajax.from_points(
        np.array([[1289, 1289, 1289], [0, 0, 1], [1289, 1289, 1289]]),
        np.array([[1.0], [2.0], [3.0]], np.float32),
        np.array([1, 1, 0]),
        spatial_shape=grid,
        batch_size=2,
        capacity=2,
    )
    last = 1290**3 - 1
    np.testing.assert_array_equal(x.keys, [[[last, last + 1]], [[1, last]]])
    np.testing.assert_array_equal(x.values, [[[3, 0]], [[2, 1]]])


@pytest.mark.parametrize("channels", [1, 2])
def test_zero_features_are_stored(channels):
    """Catches a point without features taken for an empty voxel."""
    x = from_points(np.array([[1, 1]]), np.zeros((1, channels), np.float32), np.array([0]), 3)
    np.testing.assert_array_equal(x.keys, [[[6, 20, 20]], [[20, 20, 20]]])
    np.testing.assert_array_equal(x.counts, [[1] * channels, [0] * channels])


def test_no_points():
    """Catches an empty cloud that crashes."""
    nothing = (np.zeros((0, 2), np.int32), np.zeros((0, 3), np.float32), np.zeros(0, np.int32))
    for f in (from_points, jax.jit(from_points)):
        x = f(*nothing)
        oracles.assert_invariants(x, capacity=20)
        assert not np.any(x.counts)


BAD_POINTS = {
    "coordinates": (np.array([[0, 0], [3, 5]]), None, None, r"coordinates.*\[3, 5\].*\(4, 5\)"),
    "negative": (np.array([[0, 0], [-1, 2]]), None, None, r"coordinates.*\[-1, 2\].*\(4, 5\)"),
    "features": (None, np.array([[1.0], [NAN]], np.float32), None, "features.*NaN"),
    "batch_index": (None, None, np.array([0, 2]), r"batch_index.*2.*\[0, 2\)"),
    "batch_index-negative": (None, None, np.array([-1, 0]), r"batch_index.*-1"),
    "int64": (np.array([[0, 0], [2**32, 0]]), None, None, "coordinates.*4294967296"),
    "int64-batch": (None, None, np.array([2**32, 0]), "batch_index.*4294967296"),
}


def bad_points(case):
    coordinates, features, batch_index, message = BAD_POINTS[case]
    good = (np.array([[0, 0], [1, 2]]), np.array([[1.0], [2.0]], np.float32), np.array([0, 1]))
    given = (coordinates, features, batch_index)
    return [g if b is None else b for b, g in zip(given, good, strict=True)], message


@pytest.mark.nans
@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points_raise_where_concrete(case):
    """Catches points that are silently clipped, wrapped around or dropped."""
    arguments, message = bad_points(case)
    with pytest.raises(ValueError, match=message):
        from_points(*arguments, capacity=2)


@pytest.mark.nans
@pytest.mark.parametrize("case", [c for c in BAD_POINTS if not c.startswith("int64")])
def test_bad_points_are_dropped_inside_jit(case):
    """Catches bad points that reach a voxel under jit, and NaN that spreads from a dropped point."""
    (coordinates, features, batch_index), _ = bad_points(case)
    x = jax.jit(functools.partial(from_points, capacity=2))(coordinates, features, batch_index)
    keys, values = voxelise(coordinates, features, batch_index, "mean", 2)
    np.testing.assert_array_equal(x.keys, keys)
    np.testing.assert_array_equal(x.values, values)


def test_more_voxels_than_slots():
    """Catches an overflow that passes unnoticed, and anything but the lowest keys under jit."""
    arguments = points(2)
    with pytest.raises(ValueError, match=r"capacity.*3.*sample \d"):
        from_points(*arguments, capacity=3)
    x = jax.jit(functools.partial(from_points, capacity=3, reduce="sum"))(*arguments)
    keys, values = voxelise(*arguments, "sum", 3)
    oracles.assert_tensor(x, keys, values)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_gradients_of_from_points(reduce):
    """Catches features that receive another gradient than that of the reduction of their voxel."""
    coordinates, features, batch_index = points(3)
    features += np.arange(75).reshape(25, 3) / 128  # no ties
    g = samples.integers(3, (2, 3, 20))

    @jax.jit
    def gradient(features):
        def values(f):
            return from_points(coordinates, f, batch_index, reduce=reduce).values

        return jax.vjp(values, features)[1](g)[0]

    want = np.zeros_like(features)
    keys, values = voxelise(coordinates, features, batch_index, reduce, 20)
    voxels = np.ravel_multi_index(coordinates.T, GRID)
    for n, (b, key) in enumerate(zip(batch_index, voxels, strict=True)):
        slot = int(np.flatnonzero(keys[b, 0] == key)[0])
        count = ((voxels == key) & (batch_index == b)).sum()
        share = {
            "mean": 1 / count,
            "sum": 1,
            "max": features[n] == values[b, :, slot],
        }[reduce]
        want[n] = g[b, :, slot] * share
    np.testing.assert_allclose(gradient(features), want, rtol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "sum", "max"]))
def test_any_points(seed, reduce):
    """Catches output that breaks the contract on some points, the order of arrival included."""
    coordinates, features, batch_index = points(seed)
    order = np.random.default_rng(seed).permutation(25)
    one = traced(reduce)(coordinates, features, batch_index)
    other = traced(reduce)(coordinates[order], features[order], batch_index[order])
    oracles.assert_invariants(one)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@functools.cache
def traced(reduce):
    return jax.jit(functools.partial(from_points, reduce=reduce))


# --- concatenate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "others"), [(False, False), (True, False), (True, True)])
def test_concatenate(shared, others):
    """Catches channels in the wrong order, and capacities or supports that do not mix."""
    parts = [
        samples.tensor(0, channels=2, capacity=5, shared=shared),
        samples.tensor(1, channels=1, capacity=9),
        samples.tensor(2, channels=3, capacity=7, shared=others),
    ]
    x = jax.jit(ilajax.concatenate)(parts)
    oracles.assert_invariants(x)
    assert x.channels == 6
    want = np.concatenate([oracles.dense(p) for p in parts], axis=-1)
    np.testing.assert_array_equal(oracles.dense(x), want)


def test_concatenate_one():
    """Catches a list of one that fails."""
    x = samples.tensor(3)
    got = ilajax.concatenate([x])
    np.testing.assert_array_equal(oracles.dense(got), oracles.dense(x))


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_concatenate(shared):
    """Catches a cotangent that goes to the wrong part."""
    a, b = samples.tensor(4, capacity=5, shared=shared), samples.tensor(5, channels=1, capacity=8)

    @jax.jit
    def gradients(u, v):
        def f(u, v):
            joined = ilajax.concatenate([a.with_values(u), b.with_values(v)])
            weight = jnp.arange(3.0).reshape(3) + 1
            return (joined.values.astype(jnp.float32) ** 2 * weight[:, None]).sum()

        return jax.grad(f, (0, 1))(u, v)

    u, v = gradients(a.values, b.values)
    np.testing.assert_array_equal(u, 2 * a.values * np.array([1, 2])[:, None])
    np.testing.assert_array_equal(v, 2 * b.values * 3)


def test_concatenate_keeps_a_common_support():
    """Catches tensors over one and the same support that lose it, so that submanifold nets cannot join."""
    x = samples.tensor(6, shared=True)
    joined = ilajax.concatenate([x, x.map(jnp.abs)])
    assert joined.shared
    oracles.assert_invariants(joined)
    want = np.concatenate([oracles.dense(x), np.abs(oracles.dense(x))], axis=-1)
    np.testing.assert_array_equal(oracles.dense(joined), want)
