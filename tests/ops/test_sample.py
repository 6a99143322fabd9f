"""sample: against gathers from the dense array, and against a NumPy loop over points and corners."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples

METHODS = ("nearest", "linear")
CASES = [
    ((7,), "float32", True),
    ((3, 4), "float32", False),
    ((3, 4), "float32", True),
    ((3, 4), "bfloat16", True),
    ((3, 4), "float16", False),
    ((2, 3, 4), "float32", False),
    ((2, 2, 2, 3), "float32", True),
]
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


def draw(seed, grid, count=40, batch=2):
    """Points inside, on borders and centres, and outside of the grid; some of no sample."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1.5, np.array(grid) + 1.5, (count, len(grid)))
    points[: count // 4] = np.round(2 * points[: count // 4]) / 2
    return points.astype(np.float32), rng.integers(-1, batch, count)


def loop(x, points, batch_index, method):
    """A NumPy loop over points, channels and corners, in float64, which looks entries up in a table."""
    tables = [[{k: v for _, k, v in entries} for entries in row] for row in oracles.segments(x)]
    out = np.zeros((len(points), x.values.shape[1]))
    for n, (point, b) in enumerate(zip(points.astype(float), batch_index, strict=True)):
        if not 0 <= b < len(tables):
            continue
        q = point if method == "nearest" else point - 0.5
        low = np.floor(q)
        for offset in itertools.product((0, 1), repeat=len(q) if method == "linear" else 0):
            i = low if method == "nearest" else low + offset
            if (i < 0).any() or (i >= x.spatial_shape).any():
                continue
            weight = 1.0 if method == "nearest" else math.prod(1 - np.abs(q - i))
            key = int(np.ravel_multi_index(i.astype(int), x.spatial_shape))
            for c, table in enumerate(tables[b]):
                out[n, c] += weight * table.get(key, 0.0)
    return out


def dense_gather(dense, points, batch_index, method):
    """The same from the dense array [B, *S, C], padded with zeros; differentiable."""
    rank = points.shape[1]
    padded = jnp.pad(dense, [(0, 0), *[(3, 3)] * rank, (0, 0)])
    valid = (batch_index >= 0) & (batch_index < len(dense))
    b = jnp.where(valid, batch_index, 0)
    q = points + (3 if method == "nearest" else 2.5)
    low = jnp.floor(q)
    total = 0.0
    for offset in itertools.product((0, 1), repeat=rank if method == "linear" else 0):
        i = low + (jnp.array(offset) if offset else 0)
        weight = 1.0 if method == "nearest" else jnp.prod(1 - jnp.abs(q - i), axis=1)[:, None]
        total += weight * padded[(b, *i.astype(jnp.int32).T)]
    return jnp.where(valid[:, None], total, 0)


@functools.cache
def program(method):
    """jit of sample and of its gradient with respect to the values."""

    @jax.jit
    def run(x, points, batch_index, g):
        read = lambda v: ilajax.sample(x.with_values(v), points, batch_index, method=method)  # noqa: E731
        y, pull = jax.vjp(read, x.values)
        return y, pull(g)[0]

    return run


@pytest.mark.parametrize(("grid", "dtype", "shared"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_against_both_oracles(method, grid, dtype, shared):
    """Catches a wrong site, weight, channel or sample, a gradient that goes elsewhere, and padding read."""
    x = samples.tensor(0, 2, 3, grid, capacity=9, dtype=dtype, shared=shared, zeros=True)
    points, batch_index = draw(1, grid)
    g = samples.integers(0, (len(points), 3), dtype)
    y, gradient = program(method)(x, points, batch_index, g)
    assert (y.shape, y.dtype) == ((len(points), 3), x.dtype)
    assert (gradient.shape, gradient.dtype) == (x.values.shape, x.dtype)
    oracles.assert_close(y, loop(x, points, batch_index, method), TOLERANCES[dtype])

    @jax.jit
    def dense(values, g):
        # Scattered by NumPy's keys, so that this oracle shares nothing with ilajax.
        keys = np.broadcast_to(oracles.read(x.keys), values.shape)
        b, c = np.ogrid[:2, :3]

        def f(values):
            planes = jnp.zeros((2, 3, x.sites + 1)).at[b[..., None], c[..., None], keys].set(values)
            image = jnp.moveaxis(planes[..., :-1], 1, 2).reshape(x.shape)
            return dense_gather(image, points, batch_index, method)

        y, pull = jax.vjp(f, values)
        return y, pull(g)[0]

    want, wanted = dense(x.values.astype(jnp.float32), g.astype(jnp.float32))
    oracles.assert_close(y, want, TOLERANCES[dtype])
    oracles.assert_close(gradient, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 7, 8, 9])
def test_every_slot_is_found(capacity):
    """Catches a binary search that misses the first or last slot, for capacities about powers of two."""
    keys = np.arange(capacity, dtype=np.int32)[None, None] * 2 + 1
    x = ilajax.SparseTensor(keys, keys.astype(np.float32), (19,))
    y = ilajax.sample(x, np.arange(19, dtype=np.float32)[:, None] + 0.25, np.zeros(19, int))
    n = np.arange(19)
    np.testing.assert_array_equal(y[:, 0], np.where((n % 2 == 1) & (n < 2 * capacity), n, 0))


def test_border():
    """Catches a border half a voxel off: "linear" fades out over it, "nearest" ends at it."""
    x = ilajax.from_dense(jnp.array([[2.0, 0.0, 4.0]])[..., None], capacity=3)
    points = np.array([[-0.5], [-0.25], [0.0], [0.5], [2.5], [3.0], [3.25], [3.5]], np.float32)
    batch_index = np.zeros(8, int)
    linear = ilajax.sample(x, points, batch_index, method="linear")
    np.testing.assert_array_equal(linear[:, 0], [0, 0.5, 1, 2, 4, 2, 1, 0])
    nearest = ilajax.sample(x, points, batch_index)
    np.testing.assert_array_equal(nearest[:, 0], [0, 0, 2, 2, 4, 0, 0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_summed_in_float32(method):
    """Catches a sum in float16, where 2048 + 1 is 2048."""
    x = samples.from_entries((3,), [[{1: 1.0}]], 2, "float16")
    points, batch_index = np.full((5000, 1), 1.5, np.float32), np.zeros(5000, int)
    read = lambda v: ilajax.sample(x.with_values(v), points, batch_index, method=method)  # noqa: E731
    _, pull = jax.vjp(read, x.values)
    np.testing.assert_array_equal(pull(jnp.ones((5000, 1), jnp.float16))[0], [[[5000, 0]]])


def test_no_gradient_to_points():
    """Catches points that are moved by a loss which the documentation says they do not feel."""
    x = samples.tensor(0, 1, 2, (5, 6))
    points = jnp.array([[1.3, 2.6], [0.2, 4.9]])
    read = lambda p: ilajax.sample(x, p, jnp.zeros(2, jnp.int32), method="linear").sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(read)(points), np.zeros((2, 2)))


@pytest.mark.parametrize("method", METHODS)
def test_what_jit_cannot_raise_for_gives_zero(method):
    """Catches NaN, far points or a wrong sample that read an entry, or wrap around, under jit."""
    x = samples.tensor(0, 1, 2, (3, 4), capacity=12, density=1.0)
    points = np.full((6, 2), 1.5, np.float32)
    points[1, 0], points[2, 1], points[3] = np.inf, -1e30, 3e9
    batch_index = np.array([0, 0, 0, 0, 1, -7])
    run = jax.jit(functools.partial(ilajax.sample, method=method))
    y = run(x, points, batch_index)
    assert np.all(y[0] != 0)
    np.testing.assert_array_equal(y[1:], np.zeros((5, 2)))
    with jax.debug_nans(False):
        points[5], batch_index[5] = np.nan, 0
        np.testing.assert_array_equal(run(x, points, batch_index)[5], [0, 0])


@pytest.mark.nans
def test_nan_and_inf_are_passed_on():
    """Catches a diverged map that looks sound, and an infinite neighbour of weight 0 that makes a NaN."""
    x = samples.from_entries((4,), [[{0: np.nan, 2: np.inf, 3: 1.0}]], 4)
    points = np.array([[0.5], [2.5], [3.5], [1.5], [1.0]], np.float32)
    for method, last in (("nearest", 0), ("linear", np.nan)):
        y = ilajax.sample(x, points, np.zeros(5, int), method=method)
        np.testing.assert_array_equal(y[:, 0], [np.nan, np.inf, 1, 0, last])


def test_through_vmap():
    """Catches an operation that cannot be mapped, with and without a mapped tensor."""
    tensors = [samples.tensor(seed, 2, 3, (5, 6)) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *tensors)
    drawn = [draw(seed, (5, 6), 10) for seed in (0, 1)]
    points, batch_index = (jnp.stack(a) for a in zip(*drawn, strict=True))
    f = functools.partial(ilajax.sample, method="linear")
    both = jax.vmap(f)(stacked, points, batch_index)
    one = jax.vmap(f, in_axes=(None, 0, 0))(tensors[0], points, batch_index)
    for n in (0, 1):
        oracles.assert_close(both[n], f(tensors[n], *drawn[n]), 1e-6)
        oracles.assert_close(one[n], f(tensors[0], *drawn[n]), 1e-6)


def test_memory_is_of_the_points():
    """Catches a dense grid, or the segments copied for each point."""
    x = jax.eval_shape(lambda: samples.tensor(0, 1, 2, (512, 512), capacity=2**14, shared=True))
    points = jax.ShapeDtypeStruct((1024, 2), jnp.float32)
    batch_index = jax.ShapeDtypeStruct((1024,), jnp.int32)
    f = jax.jit(functools.partial(ilajax.sample, method="linear"))
    used = f.lower(x, points, batch_index).compile().memory_analysis().temp_size_in_bytes
    assert used < 2**20


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_axis_is_one_list(method):
    """Catches rows that are read from another sample, and padding that is read at all."""
    x = samples.tensor(4, 2, 3, (5, 6))
    points, _ = draw(4, (5, 6))
    rows, batch = points.reshape(2, 20, 2), np.repeat([0, 1], 20)
    want = ilajax.sample(x, points, batch, method=method)
    got = ilajax.sample(x, rows, method=method)
    np.testing.assert_array_equal(got.reshape(40, 3), want)
    batch[::3] = -1
    got = ilajax.sample(x, rows, batch.reshape(2, 20), method=method)
    np.testing.assert_array_equal(
        got.reshape(40, 3), np.where(batch[:, None] >= 0, want, 0), strict=False
    )


def test_no_points():
    """Catches a reduction over nothing."""
    x = samples.tensor(0, 1, 3, (5, 6))
    y = ilajax.sample(x, np.zeros((0, 2), np.float32), np.zeros(0, int), method="linear")
    assert y.shape == (0, 3)


def test_numpy_leaves_and_padding_points():
    """Catches a tensor of a data loader that is refused, and a padding point that reads the last sample."""
    x = samples.tensor(0, 2, 2, (3, 4), capacity=12, density=1.0)
    host = jax.tree.map(np.asarray, x)
    points, batch_index = np.full((3, 2), 1.25), np.array([0, -1, 1])
    y = ilajax.sample(host, points, batch_index)
    np.testing.assert_array_equal(y, oracles.dense(x)[[0, 0, 1], 1, 1] * [[1], [0], [1]])


@pytest.mark.nans
def test_padding_points_may_be_nan():
    """Catches padding that is checked, though the error says to mark NaN points with -1."""
    x = samples.tensor(0, 2, 2, (3, 4), capacity=12, density=1.0)
    y = ilajax.sample(x, np.array([[1.5, 1.5], [np.nan, 0]]), np.array([0, -1]))
    np.testing.assert_array_equal(y, oracles.dense(x)[[0, 0], 1, 1] * [[1], [0]])


def test_64_bits_do_not_wrap():
    """Catches a far sample that int32 makes the first one."""
    x = samples.tensor(0, 1, 1, (3,), capacity=3, density=1.0)
    with jax.enable_x64(True):
        y = jax.jit(ilajax.sample)(x, np.ones((2, 1)), np.array([2**32, 0]))
    np.testing.assert_array_equal(np.asarray(y) != 0, [[False], [True]])


X = samples.tensor(0, 2, 2, (5, 6))
POINTS, BATCH = np.ones((3, 2), np.float32), np.array([0, 1, -1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, POINTS, BATCH), TypeError, "x must be an ilajax.SparseTensor"),
        ((X, POINTS.astype(int), BATCH), TypeError, r"points must be floats.*i \+ 0.5"),
        ((X, POINTS[:, :1], BATCH), ValueError, r"points must have shape \[N, 2\].*\(3, 1\)"),
        ((X, POINTS * np.nan, BATCH), ValueError, "points must not be NaN"),
        ((X, POINTS, BATCH.astype(float)), TypeError, "batch_index must be integers"),
        ((X, POINTS, BATCH[:2]), ValueError, r"batch_index must have shape \[3\]"),
        ((X, POINTS, BATCH + 1), ValueError, r"batch_index of point 1 is 2, .*\[0, 2\)"),
        ((X, POINTS, BATCH - 1), ValueError, "batch_index of point 2 is -2"),
        ((X, POINTS, np.array([0, 2**32, 0])), ValueError, "batch_index of point 1 is 4294967296"),
    ],
)
def test_errors(arguments, error, message):
    """Catches a wrong argument that is taken, or an error that does not name it."""
    with pytest.raises(error, match=message):
        ilajax.sample(*arguments)


def test_unknown_method():
    """Catches a method that is quietly another one."""
    with pytest.raises(ValueError, match=r"method must be one of .*'cubic'"):
        ilajax.sample(X, POINTS, BATCH, method="cubic")
