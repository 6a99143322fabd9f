"""The operators of a SparseTensor: scaling, sums, and what those that have no meaning answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples

SCALARS = {
    "int": 2,
    "float": 0.5,
    "numpy": np.float32(2),
    "numpy-0d": np.array(2.0, np.float32),
    "jax": jnp.float32(2),
    "inf": np.inf,
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_scale_the_stored_values(kind, shared):
    """Catches NumPy or JAX taking the tensor for an array, other keys, and inf * 0 in padding."""
    x, factor = samples.tensor(3, shared=shared), SCALARS[kind]
    values = oracles.read(x.values)
    stored = np.broadcast_to(np.asarray(x.keys) < x.sites, values.shape)
    results = [
        (x * factor, values * np.where(stored, factor, 0)),
        (factor * x, values * np.where(stored, factor, 0)),
        (x / factor, values / factor),
        (-x, -values),
    ]
    for y, want in results:
        assert isinstance(y, ilajax.SparseTensor)
        assert y.keys is x.keys
        np.testing.assert_array_equal(oracles.read(y.values), np.where(stored, want, 0))


@pytest.mark.nans
def test_nan_and_zero_divisors_leave_padding_at_0():
    """Catches padding that a scalar fills."""
    x = samples.tensor(4)
    for y in (x * np.nan, x / 0, jnp.nan * x):
        oracles.assert_invariants(y)


def test_scaling_keeps_the_dtype_and_differentiates():
    """Catches a Python scalar that widens, and a gradient that padding or another entry gets."""
    x = samples.tensor(5, dtype="bfloat16")
    assert {(x * 2).dtype, (x / 3).dtype, (-x).dtype} == {jnp.dtype(jnp.bfloat16)}
    x = samples.tensor(5)
    gradients = jax.grad(lambda s, v: (x.with_values(v) * s).values.sum(), (0, 1))(3.0, x.values)
    np.testing.assert_array_equal(gradients[0], x.values.sum())
    np.testing.assert_array_equal(gradients[1], np.where(x.keys < x.sites, 3, 0))


def test_plus_minus_and_sum():
    """Catches `-` in the wrong direction, and sum(), which starts at 0."""
    x, y = samples.tensor(6, shared=True), samples.tensor(7, shared=True)
    a, b = oracles.dense(x), oracles.dense(y)
    np.testing.assert_array_equal(oracles.dense(x + y), a + b)
    np.testing.assert_array_equal(oracles.dense(x - y), a - b)
    np.testing.assert_array_equal(oracles.dense(sum([x, y, x])), a + b + a)
    assert (x - x.map(jnp.square)).keys is x.keys
    assert x + 0 is x
    assert 0 + x is x
    assert x - 0 is x
    np.testing.assert_array_equal(oracles.dense(0 - x), -a)


Y = samples.tensor(8)


NO_OPERATION = {
    "number": (lambda: Y + 1, r"\+.*int.*x\.map"),
    "number-left": (lambda: 1.0 + Y, r"\+.*float.*x\.map"),
    "minus": (lambda: Y - 1, r"-.*int.*x\.map"),
    "minus-left": (lambda: 1 - Y, r"-.*int.*x\.map"),
    "array": (lambda: Y + Y.values, r"\+.*another SparseTensor"),
    "numpy-left": (lambda: np.ones(2) + Y, r"\+.*another SparseTensor.*ndarray"),
    "product": (lambda: Y * Y, r"\*.*scalar.*SparseTensor.*with_values.*x\.map"),
    "quotient": (lambda: Y / Y, r"/.*scalar.*SparseTensor.*with_values.*x\.map"),
    "factors": (lambda: Y * np.ones(2), r"\*.*scalar.*\(2,\).*with_values"),
    "factors-left": (lambda: jnp.ones(2) * Y, r"\*.*scalar.*\(2,\).*with_values"),
    "text": (lambda: Y * "2", r"\*.*scalar.*str"),
    "asarray": (lambda: np.asarray(Y), r"to_dense.*x\.values"),
    "jax-asarray": (lambda: jnp.asarray(Y), r"to_dense.*x\.values"),
}


@pytest.mark.parametrize("case", NO_OPERATION)
def test_what_has_no_meaning_says_what_has(case):
    """Catches a dense operation on a sparse tensor that passes, or fails without a way on."""
    call, message = NO_OPERATION[case]
    with pytest.raises(TypeError, match=message):
        call()
