"""Concatenation along channels, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ilajax
import oracles
import samples


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


def test_concatenate_shared_supports_that_differ():
    """Catches a shared support that is given up, a lost site, and slots past those of the grid."""
    parts = [samples.tensor(i, channels=i + 1, capacity=8 + i, shared=True) for i in range(3)]
    for chosen, capacity in ((parts[:2], 17), (parts, 27), (parts * 2, 30)):
        x = jax.jit(ilajax.concatenate)(chosen)
        assert x.shared
        oracles.assert_invariants(x, capacity=capacity)
        want = np.concatenate([oracles.dense(p) for p in chosen], axis=-1)
        np.testing.assert_array_equal(oracles.dense(x), want)
        for b, sample in enumerate(np.asarray(x.keys)[:, 0]):
            stored = {key for p in chosen for _, key, _ in oracles.segments(p)[b][0]}
            assert set(sample.tolist()) - {30} == stored


def test_gradients_of_a_shared_union():
    """Catches a cotangent that goes to the wrong part, entry, or to padding."""
    a, b = samples.tensor(4, capacity=5, shared=True), samples.tensor(5, capacity=8, shared=True)

    @jax.jit
    def gradients(u, v):
        def f(u, v):
            joined = ilajax.concatenate([a.with_values(u), b.with_values(v)])
            return (joined.values**2 * (jnp.arange(4.0) + 1)[:, None]).sum()

        return jax.grad(f, (0, 1))(u, v)

    u, v = gradients(a.values, b.values)
    np.testing.assert_array_equal(u, 2 * a.values * np.array([1, 2])[:, None])
    np.testing.assert_array_equal(v, 2 * b.values * np.array([3, 4])[:, None])


KERNEL = samples.kernel(0, (3, 3), 2, 2)
TRANSFORMS = {"jit": nnx.jit, "remat": nnx.remat}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_skip_connection_behind_a_transformation(transform):
    """Catches a shared support that a U-Net loses, or whose slots double, behind nnx.jit or nnx.remat."""
    x, wide = samples.tensor(7, shared=True), samples.kernel(1, (3, 3), 4, 2)
    layer = lambda x, kernel=KERNEL: ilajax.conv(x, kernel, support="input").features  # noqa: E731
    want = layer(ilajax.concatenate([x, layer(x)]), wide)
    behind = TRANSFORMS[transform](lambda x: layer(x))

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, same_support):
        y = behind(x)
        assert y.keys is not x.keys
        return layer(ilajax.concatenate([x, y], same_support=same_support), wide)

    for same_support, capacity in ((True, x.capacity), (False, 2 * x.capacity)):
        got = run(x, same_support)
        assert got.shared
        assert got.capacity == capacity
        np.testing.assert_array_equal(oracles.dense(got), oracles.dense(want))


def test_same_support_is_checked_where_it_can_be():
    """Catches a false word that puts values at sites of another tensor, and a true one that is refused."""
    x = samples.tensor(8, shared=True)
    copy = ilajax.SparseTensor(x.keys + 0, x.values, x.spatial_shape)
    assert ilajax.concatenate([x, x, copy], same_support=True).keys is x.keys
    other = ilajax.SparseTensor(x.keys.at[1, 0, 0].set(30), x.values, x.spatial_shape)
    with pytest.raises(ValueError, match=r"same_support.*tensors\[2\].*batch 1, channel 0"):
        ilajax.concatenate([x, copy, other], same_support=True)
    with pytest.raises(ValueError, match=r"same_support.*tensors\[1\].*shape.*12.*17"):
        ilajax.concatenate([x, samples.with_padding(x, 5)], same_support=True)
    with pytest.raises(ValueError, match=r"same_support.*tensors\[1\].*each channel"):
        ilajax.concatenate([x, samples.tensor(8)], same_support=True)
