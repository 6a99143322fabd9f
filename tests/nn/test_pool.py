"""nn.MaxPool and nn.AvgPool are the operations with a capacity from a density bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.nn import AvgPool, MaxPool

PAIRS = [(MaxPool, ilajax.max_pool), (AvgPool, ilajax.avg_pool)]


def sparse():
    return ilajax.from_dense(drawn.normal(0, (2, 6, 5, 3)), capacity=10)


@pytest.mark.parametrize(("module", "operation"), PAIRS)
@pytest.mark.parametrize("window", [2, (3, 2), [1, 2]])
@pytest.mark.parametrize(("bound", "slots"), [(None, None), (0.5, 0.5), (1.0, 1.0)])
def test_is_the_operation(module, operation, window, bound, slots):
    x = sparse()
    expected = operation(x, window)
    if slots is not None:
        expected = operation(x, window, capacity=max(1, int(slots * expected.sites)))
    y = nnx.jit(lambda m, x: m(x))(module(window, bound), x)
    np.testing.assert_array_equal(y.keys, expected.keys)
    np.testing.assert_array_equal(y.values, expected.values)


@pytest.mark.parametrize(("module", "_"), PAIRS)
def test_has_no_variables(module, _):
    assert not jax.tree.leaves(nnx.state(module(2)))


@pytest.mark.parametrize(("module", "_"), PAIRS)
def test_bad_arguments_raise(module, _):
    with pytest.raises(ValueError, match=r"density_bound must lie in \(0, 1\], got 2"):
        module(2, 2)
    with pytest.raises(TypeError, match=r"density_bound must be one number.*\[0.2, 0.1\]"):
        module(2, [0.2, 0.1])
    with pytest.raises(ValueError, match="window must have one entry"):
        module((2, 2, 2))(sparse())
    with pytest.raises(TypeError, match=r"x must be an ilajax\.SparseTensor"):
        module(2)(jnp.zeros((1, 4, 4, 1)))
