"""SparseKernel: the order of its keys, masks, padding, and how it behaves as a pytree."""

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

SHAPES = [(3, 2, 4), (3, 3, 1, 1), (2, 3, 3, 2), (1, 2, 2, 2, 3), (2, 1, 2, 2, 2, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_keys(shape):
    """Catches a layout other than (oc * Cin + ic) * taps + tap with the tap row-major in the window."""
    *window, cin, cout = shape
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    kernel = ilajax.SparseKernel.from_dense(jnp.asarray(w))
    key = 0
    for oc, ic in itertools.product(range(cout), range(cin)):
        for position in itertools.product(*map(range, window)):
            assert kernel.keys[key] == key
            assert kernel.values[key] == w[(*position, ic, oc)]
            key += 1
    assert key == kernel.values.size


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, dtype):
    """Catches a weight that moves or changes its dtype between dense and sparse."""
    w = samples.integers(0, shape, dtype)
    kernel = ilajax.SparseKernel.from_dense(w)
    assert kernel.shape == shape
    assert kernel.to_dense().dtype == kernel.dtype == w.dtype
    np.testing.assert_array_equal(kernel.to_dense(), w)
    np.testing.assert_array_equal(oracles.dense_kernel(kernel), oracles.read(w))


def test_zero_weights_are_live():
    """Catches a weight of value 0 taken as pruned: it must be able to change its sign in training."""
    kernel = ilajax.SparseKernel.from_dense(jnp.zeros((3, 3, 2, 2)))
    assert kernel.count == 36
    assert kernel.density == 1
    assert kernel.mask().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_masks(shape):
    """Catches a mask applied in another layout than the weights', and counts that include padding."""
    rng = np.random.default_rng(1)
    mask = rng.random(shape) < 0.4
    w = rng.normal(size=shape).astype(np.float32)
    kernel = ilajax.SparseKernel.from_dense(jnp.asarray(w), jnp.asarray(mask))
    np.testing.assert_array_equal(kernel.mask(), mask)
    assert kernel.mask().dtype == jnp.bool_
    np.testing.assert_array_equal(kernel.to_dense(), np.where(mask, w, 0))
    assert kernel.count == mask.sum()
    assert kernel.count.dtype == jnp.int32
    np.testing.assert_allclose(kernel.density, mask.mean(), rtol=1e-6)
    keys = np.asarray(kernel.keys)
    live = keys[keys < kernel.size]
    assert (np.diff(live) > 0).all()
    assert (keys[: live.size] < kernel.size).all()


def test_a_traced_mask():
    """Catches a shape that depends on the mask under jit, or another result than outside."""
    w = samples.integers(2, (3, 3, 2, 2))
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, w.shape)
    traced = jax.jit(ilajax.SparseKernel.from_dense)(w, mask)
    concrete = ilajax.SparseKernel.from_dense(w, mask)
    np.testing.assert_array_equal(traced.to_dense(), concrete.to_dense())
    np.testing.assert_array_equal(traced.mask(), concrete.mask())
    assert (np.diff(np.asarray(traced.keys)) >= 0).all()
    assert (np.asarray(traced.values)[np.asarray(traced.keys) == 36] == 0).all()


@pytest.mark.parametrize("traced", [False, True])
def test_an_empty_mask(traced):
    """Catches a kernel without slots, which no program accepts."""
    make = ilajax.SparseKernel.from_dense
    kernel = (jax.jit(make) if traced else make)(jnp.ones((3, 1, 1)), jnp.zeros((3, 1, 1), bool))
    assert kernel.values.size >= 1
    assert kernel.count == 0
    assert not kernel.to_dense().any()
    assert not kernel.mask().any()


def test_values_at_padding_are_ignored():
    """Catches what an optimizer wrote into padding and `to_dense` or `mask` takes for a weight."""
    kernel = ilajax.SparseKernel(
        jnp.array([1, 4, 6, 6], jnp.int32), jnp.array([1.0, 2.0, 9.0, 8.0]), (3, 2, 1)
    )
    np.testing.assert_array_equal(kernel.to_dense()[:, :, 0].T, [[0, 1, 0], [0, 2, 0]])
    assert kernel.count == 2
    assert kernel.mask().sum() == 2


def test_gradients():
    """Catches a gradient that does not reach the weights through either conversion."""
    w = samples.integers(3, (3, 2, 2))
    mask = w > 0
    g = jax.grad(lambda w: (ilajax.SparseKernel.from_dense(w, mask).to_dense() ** 2).sum())(w)
    np.testing.assert_array_equal(g, jnp.where(mask, 2 * w, 0))


def test_full_again():
    """Catches removed weights that do not come back at 0 and live, for transfer learning."""
    w = samples.integers(4, (3, 3, 2, 2))
    kernel = ilajax.SparseKernel.from_dense(w, jnp.abs(w) > 1)
    full = kernel.refill()
    assert full.count == full.size == 36
    np.testing.assert_array_equal(full.to_dense(), kernel.to_dense())


def test_it_is_a_pytree():
    """Catches a leaf too many, and a check on what a transformation puts in."""
    kernel = samples.kernel(5)
    leaves, structure = jax.tree.flatten(kernel)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, [None, None]).shape == kernel.shape
    assert jax.jit(lambda k: k)(kernel).shape == kernel.shape
    doubled = jax.tree.map(lambda a: a * 2 if a.dtype == jnp.float32 else a, kernel)
    np.testing.assert_array_equal(doubled.to_dense(), 2 * kernel.to_dense())
    assert "(" in repr(jax.tree.unflatten(structure, [None, None]))
    assert len(repr(kernel)) < 200


@pytest.mark.parametrize(
    ("keys", "values", "shape", "error", "message"),
    [
        (jnp.zeros(3, jnp.int8), jnp.zeros(3), (3, 1, 1), TypeError, "keys must be int32.*int8"),
        (jnp.zeros(3, jnp.int32), jnp.zeros(3, int), (3, 1, 1), TypeError, "values must be.*int32"),
        (jnp.zeros(3, jnp.int32), jnp.zeros(4), (3, 1, 1), ValueError, r"\(3,\).*\(4,\)"),
        (jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, 1)), (3, 1, 1), ValueError, "keys"),
        (jnp.zeros(3, jnp.int32), jnp.zeros(3), (3, 1), ValueError, r"shape.*\(3, 1\)"),
        (jnp.zeros(3, jnp.int32), jnp.zeros(3), (3, 0, 1), ValueError, r"shape.*\(3, 0, 1\)"),
        (jnp.zeros(3, jnp.int32), jnp.zeros(3), (2**11, 2**10, 2**10), ValueError, r"2\*\*31"),
    ],
)
def test_the_constructor_checks_shapes_and_dtypes(keys, values, shape, error, message):
    """Catches arrays that do not fit together and are found out only inside a kernel."""
    with pytest.raises(error, match=message):
        ilajax.SparseKernel(keys, values, shape)


@pytest.mark.parametrize(
    ("w", "mask", "error", "message"),
    [
        (jnp.ones((3, 1)), None, ValueError, r"\(3, 1\)"),
        (jnp.ones((3, 1, 1), int), None, TypeError, "int32"),
        (
            jnp.ones((3, 1, 1)),
            jnp.ones((3, 1, 2), bool),
            ValueError,
            r"mask.*\(3, 1, 1\).*\(3, 1, 2\)",
        ),
        (jnp.ones((3, 1, 1)), jnp.ones((3, 1, 1)), TypeError, "mask must be bool.*float32"),
    ],
)
def test_from_dense_checks_its_arguments(w, mask, error, message):
    """Catches a mask that is broadcast or cast."""
    with pytest.raises(error, match=message):
        ilajax.SparseKernel.from_dense(w, mask)


@jax.jit
def again_from_dense(kernel):
    return ilajax.SparseKernel.from_dense(kernel.to_dense(), kernel.mask())


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_any_mask_round_trips(seed, density):
    """Catches a mask and a kernel that disagree about some position."""
    kernel = samples.kernel(seed, density=density)
    again = again_from_dense(kernel)
    np.testing.assert_array_equal(again.mask(), kernel.mask())
    count = int(kernel.count)
    for got, want in ((again.keys, kernel.keys), (again.values, kernel.values)):
        np.testing.assert_array_equal(np.asarray(got)[:count], np.asarray(want)[:count])


# --- Validation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[0, 3, 5], [0, 18, 18], [18, 18, 18], [17]], ids=str)
def test_keys_in_order_are_valid(keys):
    """Catches padding at the tail, any number of it, taken for a repeated key."""
    kernel = ilajax.SparseKernel(jnp.array(keys, jnp.int32), jnp.ones(len(keys)), (3, 2, 3))
    assert kernel.validate() is kernel


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([0, 3, 3], "slot 2 3 follows 3"),
        ([4, 0, 0], "slot 1 0 follows 4"),
        ([2, 18, 5], "slot 2 5 follows 18"),
        ([-1, 2, 3], "-1 is among them"),
        ([1, 2, 19], "19 is among them"),
    ],
    ids=str,
)
def test_keys_out_of_order_raise(keys, problem):
    """Catches what Orbax fills up with 0, and keys of a filter of another shape."""
    kernel = ilajax.SparseKernel(jnp.array(keys, jnp.int32), jnp.ones(3), (3, 2, 3))
    with pytest.raises(ValueError, match=f"keys must ascend.*{problem}.*load_state"):
        kernel.validate()


def test_validation_under_jit_raises():
    """Catches a check that seems to have looked at what jit has not computed."""
    kernel = ilajax.SparseKernel.from_dense(jnp.ones((3, 2, 3)))
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda kernel: kernel.validate().count)(kernel)
