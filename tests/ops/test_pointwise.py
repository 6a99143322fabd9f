"""relu: what it drops, that it closes the gaps, and where the gradient goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples


@functools.cache
def program(backend):
    """jit of relu and its gradient."""

    @jax.jit
    def run(x, g):
        def values(values):
            y = ilajax.relu(x.with_values(values))
            return y.values, y

        _, pull, y = jax.vjp(values, x.values, has_aux=True)
        return y, pull(g)[0]

    return run


def check(backend, x):
    g = samples.integers(0, x.values.shape, str(x.dtype))
    y, gradient = program(backend)(x, g)
    keys, values = oracles.k_select(x, x.capacity, "positive")
    oracles.assert_tensor(y, keys, values)
    oracles.assert_close(gradient, oracles.k_select_backward(x, keys, g))
    return y


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_loops(backend, dtype, shared):
    """Catches an entry <= 0 that stays, a gap, or a gradient at what was dropped."""
    x = samples.tensor(0, dtype=dtype, shared=shared, zeros=True)
    y = check(backend, x)
    np.testing.assert_array_equal(oracles.dense(y), np.maximum(oracles.dense(x), 0))


@pytest.mark.parametrize("value", [-1.0, 0.0, -0.0, 1.0, -np.inf, np.inf])
def test_one_value_everywhere(backend, value):
    """Catches a wrong sign test: 0 of either sign is dropped, infinity is not."""
    x = samples.tensor(1).map(lambda v: jnp.full_like(v, value))
    y = check(backend, x)
    np.testing.assert_array_equal(y.counts, x.counts if value > 0 else 0)


@pytest.mark.nans
def test_nan_is_kept(backend):
    """Catches a diverging network that hides its NaN in a ReLU."""
    x = samples.from_entries((6,), [[{0: 1, 2: np.nan, 3: -1, 5: 2}]], 5)
    negative = np.array(x.values)
    negative[0, 0, 1] = np.array(0xFFC00000, np.uint32).view(np.float32)
    for values in (x.values, jnp.asarray(negative)):
        y = check(backend, x.with_values(values))
        np.testing.assert_array_equal(y.keys, [[[0, 2, 5, 6, 6]]])


def test_positive_contains_the_relu(backend):
    """Catches a difference between conv's "positive" and ReLU after "value", as the contract states it."""
    x, kernel, bias = samples.tensor(2), samples.kernel(2), jnp.array([1.0, -2.0, 0.0])

    @jax.jit
    def both(x):
        fused = ilajax.conv(x, kernel, bias, capacity=9, select="positive").features
        return fused, ilajax.relu(ilajax.conv(x, kernel, bias, capacity=9, select="value").features)

    fused, chained = both(x)
    jax.tree.map(np.testing.assert_array_equal, fused, chained)
