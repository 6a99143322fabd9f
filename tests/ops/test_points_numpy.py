"""Points to voxels in NumPy: the bits that JAX gives, in milliseconds, and JAX left alone."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import samples
from ops.test_points import EVERYTHING, from_points, points, voxelise, with_padding


@pytest.mark.nans
@pytest.mark.parametrize(
    ("dtype", "capacity"), [(dtype, 7) for dtype in samples.DTYPES] + [("float32", 20)]
)
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_numpy_gives_what_jax_gives(reduce, dtype, capacity):
    """Catches a bit that differs between NumPy and JAX: another order of the sums, another rounding."""
    coordinates, features, batch_index = with_padding(0)
    features = features.astype(samples.DTYPES[dtype])
    run = functools.partial(from_points, reduce=reduce, capacity=capacity, **EVERYTHING)
    host = run(coordinates, features, batch_index)
    device = run(coordinates, jnp.asarray(features), batch_index)
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(host))
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(device))
    host[0].validate()
    for ours, theirs in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        assert ours.dtype == theirs.dtype
        if samples.platform() == "cpu" or ours.dtype == np.int32:
            np.testing.assert_array_equal(ours, theirs)
        else:  # where XLA adds in an order of its own
            oracles.assert_close(ours, theirs, 1e-5)
    real = batch_index >= 0
    keys, values = voxelise(
        coordinates[real], oracles.read(features)[real], batch_index[real], reduce, capacity
    )
    np.testing.assert_array_equal(host[0].keys, keys)
    np.testing.assert_allclose(oracles.read(host[0].values), values, rtol=2e-2, atol=2e-2)


@functools.cache
def traced(reduce):
    return jax.jit(functools.partial(from_points, reduce=reduce))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "sum", "max"]))
def test_any_points(seed, reduce):
    """Catches output that breaks the contract, depends on the order of the points, or differs from JAX's."""
    arguments = points(seed)
    order = np.random.default_rng(seed).permutation(25)
    x = from_points(*arguments, reduce=reduce)
    oracles.assert_invariants(x)
    for arrays in (arguments, [a[order] for a in arguments]):
        jax.tree.map(np.testing.assert_array_equal, x, traced(reduce)(*arrays))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_numpy_leaves_jax_alone(reduce):
    """Catches a call of JAX, which waits for the running step, and hangs in a forked worker."""
    with jax.transfer_guard("disallow_explicit"):
        from_points(*points(9), reduce=reduce, return_overflow=True, return_slots=True)


def test_lists_are_numpys():
    """Catches lists, or NumPy's own float64, that are refused, and those that wake up JAX."""
    with jax.transfer_guard("disallow_explicit"):
        x = from_points([[0, 1], [0, 1]], [[1.0], [3.0]], [0, 0], 2)
    assert isinstance(x.values, np.ndarray)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x.values[0], [[2, 0]])


def test_the_mean_of_equal_features_is_exact():
    """Catches a division that XLA turns into a product with 1 / 41, which makes 0.99999994 of 1."""
    arguments = np.zeros((41, 2), np.int32), np.ones((41, 1), np.float32), np.zeros(41, np.int32)
    for x in (from_points(*arguments), jax.jit(from_points)(*arguments)):
        assert x.values[0, 0, 0] == 1


def test_infinite_features_are_silent():
    """Catches a warning of NumPy's where infinities meet, or a sum leaves float16."""
    features = np.array([[3e4], [3e4], [3e4]], np.float16)
    x = from_points([[0, 0]] * 3, features, [0] * 3, reduce="sum")
    assert np.isposinf(x.values[0, 0, 0])


def test_every_operation_takes_numpys_leaves():
    """Catches an operation that fails on the NumPy arrays that from_points gives."""
    x = from_points(*points(7))
    kernel = ilajax.SparseKernel.from_dense(jnp.ones((3, 3, 3, 2)))
    for f in (
        ilajax.to_dense,
        ilajax.relu,
        lambda x: ilajax.k_select(x, 3),
        lambda x: ilajax.max_pool(x, 2),
        lambda x: ilajax.avg_pool(x, 2),
        ilajax.global_max_pool,
        ilajax.global_avg_pool,
        lambda x: ilajax.conv(x, kernel, capacity=9).features,
        lambda x: ilajax.conv(x, kernel, support="input").features,
        lambda x: ilajax.concatenate([x, x]),
        lambda x: x.to_bcoo().todense(),
    ):
        got, want = f(x), f(jax.tree.map(jnp.asarray, x))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_numpy_takes_milliseconds():
    """Catches NumPy that loops in Python: 20 batches of 8 x 2048 points must not take a second."""
    rng = np.random.default_rng(8)
    coordinates = rng.integers(0, 32, (8 * 2048, 3))
    features = np.ones((8 * 2048, 1), np.float32)
    batch_index = np.repeat(np.arange(8), 2048)
    start = time.perf_counter()
    for _ in range(20):
        ilajax.from_points(
            coordinates,
            features,
            batch_index,
            spatial_shape=(32, 32, 32),
            batch_size=8,
            capacity=2048,
        )
    assert time.perf_counter() - start < 1
