"""Points to voxels, against a loop over the points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples

NAN = np.nan
EVERYTHING = {"overflow": "drop", "return_overflow": True, "return_slots": True}
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


def from_points(coordinates, features, batch_index, capacity=20, **options):
    return ilajax.from_points(
        coordinates,
        features,
        batch_index,
        spatial_shape=GRID,
        batch_size=2,
        capacity=capacity,
        **options,
    )


def on_device(arrays):
    return [jnp.asarray(a) for a in arrays]


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
    eager, traced = from_points(*on_device(arguments)), jax.jit(from_points)(*arguments)
    jax.tree.map(np.testing.assert_array_equal, eager, traced)
    _, values = voxelise(*arguments, "mean", 20)
    np.testing.assert_allclose(eager.values, values, rtol=1e-6)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("coordinate", [np.int8, np.uint8, np.int16, np.int64, np.uint32])
def test_integers_of_any_width(coordinate, xp):
    """Catches coordinates that wrap around in a narrow or unsigned type: the grid is wider than 127."""
    place = np.array([[0], [100], [127]]).astype(coordinate)
    x = ilajax.from_points(
        place,
        xp.ones((3, 1), np.float32),
        np.zeros(3, coordinate),
        spatial_shape=(300,),
        batch_size=1,
        capacity=3,
    )
    np.testing.assert_array_equal(x.keys, [[[0, 100, 127]]])


@pytest.mark.parametrize("xp", [np, jnp])
def test_points_on_a_grid_near_2_31(xp):
    """Catches a key that overflows, and a batch folded into it."""
    grid = (1290, 1290, 1290)
    x = ilajax.from_points(
        np.array([[1289, 1289, 1289], [0, 0, 1], [1289, 1289, 1289]]),
        xp.array([[1.0], [2.0], [3.0]], np.float32),
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
    for arrays in (nothing, on_device(nothing)):
        x, overflow, slots = from_points(*arrays, return_overflow=True, return_slots=True)
        oracles.assert_invariants(x, capacity=20)
        assert not np.any(x.counts)
        assert not overflow.any()
        assert slots.shape == (0,)


BAD_POINTS = {
    "coordinates": (np.array([[0, 0], [3, 5]]), None, None, r"coordinates.*\[3, 5\].*\(4, 5\)"),
    "negative": (np.array([[0, 0], [-1, 2]]), None, None, r"coordinates.*\[-1, 2\].*\(4, 5\)"),
    "features": (None, np.array([[1.0], [NAN]], np.float32), None, "features.*NaN"),
    "batch_index": (None, None, np.array([0, 2]), r"batch_index.*2.*\[0, 2\)"),
    "batch_index-negative": (None, None, np.array([-2, 0]), r"batch_index.*-2.*-1 for a padding"),
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
    coordinates, features, batch_index = arguments
    for array in (features, jnp.asarray(features)):
        with pytest.raises(ValueError, match=message):
            from_points(coordinates, array, batch_index, capacity=2)


@pytest.mark.nans
@pytest.mark.parametrize("case", [c for c in BAD_POINTS if not c.startswith("int64")])
def test_bad_points_are_dropped_inside_jit(case):
    """Catches bad points that reach a voxel under jit, and NaN that spreads from a dropped point."""
    (coordinates, features, batch_index), _ = bad_points(case)
    x = jax.jit(functools.partial(from_points, capacity=2))(coordinates, features, batch_index)
    keys, values = voxelise(coordinates, features, batch_index, "mean", 2)
    np.testing.assert_array_equal(x.keys, keys)
    np.testing.assert_array_equal(x.values, values)


@pytest.mark.nans
@pytest.mark.parametrize("case", [c for c in BAD_POINTS if c != "features"])
def test_what_is_concrete_is_checked(case):
    """Catches places that gradients, or jit over the features alone, drop unseen or wrap into the grid."""
    (coordinates, features, batch_index), message = bad_points(case)
    total = lambda f: from_points(coordinates, f, batch_index, capacity=2).values.sum()  # noqa: E731
    for transformed in (jax.grad(total), jax.jit(total)):
        with pytest.raises(ValueError, match=message):
            transformed(jnp.asarray(features))


@pytest.mark.parametrize("far", [2**32, -(2**32), 2**31, 2**63 - 1])
def test_64_bits_do_not_wrap(far):
    """Catches a far point that int32 brings into the grid: under x64, or beside a traced batch index."""
    coordinates, index = np.array([[0, 0], [far, 0], [1, 0]]), np.array([0, 0, far])
    features = np.ones((3, 1), np.float32)
    beside = jax.jit(lambda index: from_points(coordinates, features, index, reduce="sum"))
    with jax.enable_x64(True):
        both = jax.jit(functools.partial(from_points, reduce="sum"))(coordinates, features, index)
        alone = beside(index)
    for x in (both, alone, beside(np.array([0, 0, -1]))):
        np.testing.assert_array_equal(np.asarray(x.values).sum(axis=2), [[1], [0]])


def test_more_voxels_than_slots():
    """Catches an overflow that passes unnoticed, and anything but the lowest keys under jit."""
    arguments = points(2)
    for arrays in (arguments, on_device(arguments)):
        with pytest.raises(ValueError, match=r"capacity.*3.*sample \d.*overflow=\"drop\""):
            from_points(*arrays, capacity=3, return_overflow=True)
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


# --- Padding, overflow and slots -------------------------------------------------------------------


def with_padding(seed, count=200, channels=2):
    """Points with padding among them that holds nonsense; features whose sums depend on the order."""
    rng = np.random.default_rng(seed)
    coordinates, _, batch_index = points(seed, count)
    features = rng.normal(size=(count, channels)).astype(np.float32)
    padding = rng.random(count) < 0.2
    batch_index[padding], coordinates[padding], features[padding] = -1, 99, NAN
    return coordinates, features, batch_index


@pytest.mark.nans
def test_padding_points_do_not_count():
    """Catches padding that reaches a voxel, and its nonsense that is checked: eagerly and under jit."""
    coordinates, features, batch_index = with_padding(1)
    real = batch_index >= 0
    want = from_points(coordinates[real], features[real], batch_index[real])
    arrays = coordinates, features, batch_index
    for got in (
        from_points(*arrays),
        from_points(*on_device(arrays)),
        jax.jit(from_points)(*arrays),
    ):
        oracles.assert_invariants(got)
        np.testing.assert_array_equal(got.keys, want.keys)
        np.testing.assert_allclose(got.values, want.values, rtol=1e-5)


def test_points_of_one_padded_number_compile_once():
    """Catches a compilation for each batch, where clouds are padded to one number of points."""
    traces = []

    @jax.jit
    def step(*arrays):
        traces.append(1)
        return from_points(*arrays).values.sum()

    for seed in range(3):
        coordinates, features, batch_index = points(seed)
        batch_index[20 + seed :] = -1
        step(coordinates, features, batch_index)
    assert len(traces) == 1


def test_overflow_and_slots():
    """Catches voxels lost without a count, other voxels than those of the lowest keys, and wrong slots."""
    coordinates, features, batch_index = points(4)
    run = functools.partial(from_points, capacity=5, reduce="max", **EVERYTHING)
    for f in (run, jax.jit(run)):
        x, overflow, slots = f(coordinates, features, batch_index)
        voxels = np.ravel_multi_index(coordinates.T, GRID)
        assert overflow.dtype == slots.dtype == np.int32
        for b in range(2):
            occupied = np.unique(voxels[batch_index == b])
            assert overflow[b] == len(occupied) - 5
            np.testing.assert_array_equal(x.keys[b, 0], occupied[:5])
        lost = voxels > np.asarray(x.keys)[batch_index, 0, -1]
        np.testing.assert_array_equal(np.asarray(slots) == -1, lost)
        found = np.asarray(x.values)[batch_index, :, slots]
        assert (found[~lost] >= features[~lost]).all()
        keys = np.asarray(x.keys)[batch_index, 0, slots]
        np.testing.assert_array_equal(keys[~lost], voxels[~lost])


@pytest.mark.parametrize(("overflow", "slots"), [(True, False), (False, True)])
def test_what_is_asked_for_is_returned(overflow, slots):
    """Catches a tuple in another order than tensor, overflow, slots."""
    x, extra = from_points(*points(5), return_overflow=overflow, return_slots=slots)
    assert isinstance(x, ilajax.SparseTensor)
    assert extra.shape == ((2,) if overflow else (25,))


def test_overflow_is_one_of_two():
    """Catches a misspelt option that drops voxels unseen."""
    with pytest.raises(ValueError, match=r"overflow must be one of.*'cut'"):
        from_points(*points(6), overflow="cut")


# --- With a batch axis -----------------------------------------------------------------------------


def in_rows(seed, xp, reduce="mean"):
    """Points with a batch axis, and the same in one list; one of seven is padding."""
    coordinates, features, _ = points(seed, count=60)
    index = np.repeat(np.arange(2, dtype=np.int32), 30)
    index[::7] = -1
    one_list = [xp.asarray(a) for a in (coordinates, features, index)]
    rows = [xp.asarray(a.reshape(2, 30, *a.shape[1:])) for a in (coordinates, features, index)]
    return rows, one_list


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_a_batch_axis_is_one_list(xp, reduce):
    """Catches samples that get mixed, padding that counts, and slots of another row."""
    rows, one_list = in_rows(0, xp)
    got = from_points(*rows, 5, reduce=reduce, **EVERYTHING)
    want = from_points(*one_list, 5, reduce=reduce, **EVERYTHING)
    assert want[1].any()
    assert got[2].shape == (2, 30)
    jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])
    np.testing.assert_array_equal(np.asarray(got[2]).reshape(-1), want[2])


def test_a_batch_axis_says_all():
    """Catches an index or a batch size that must be given though the rows are the samples."""
    (coordinates, features, _), _ = in_rows(1, np)
    options = {"spatial_shape": GRID, "capacity": 20}
    got = ilajax.from_points(coordinates, features, **options)
    want = ilajax.from_points(
        coordinates, features, np.repeat([[0], [1]], 30, axis=1), batch_size=2, **options
    )
    got.validate()
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 3}, ValueError, "batch_size must be the length 2"),
        ({"batch_index": np.zeros((2, 30), int)}, ValueError, r"point 0 of sample 1 is 0.* row's"),
        ({"batch_index": np.zeros(60, int)}, ValueError, r"batch_index must have shape \[2, 30\]"),
        ({"features": np.ones((60, 1))}, ValueError, r"features must have shape \[2, 30, C\]"),
        ({"coordinates": np.full((2, 30, 2), 9)}, ValueError, "point 0 of sample 0, "),
        ({"coordinates": np.zeros((60, 2), int)}, TypeError, "batch_index is required"),
    ],
)
def test_bad_rows(change, error, message):
    """Catches rows that are taken for something else."""
    (coordinates, features, _), _ = in_rows(2, np)
    arguments = {"coordinates": coordinates, "features": features} | change
    with pytest.raises(error, match=message):
        ilajax.from_points(**arguments, spatial_shape=GRID, capacity=20)
