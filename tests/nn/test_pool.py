"""nn.MaxPool, nn.SumPool and nn.AvgPool are the operations with a capacity from a density bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.nn import AvgPool, MaxPool, SumPool

PAIRS = [(MaxPool, ilajax.max_pool), (SumPool, ilajax.sum_pool), (AvgPool, ilajax.avg_pool)]


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


@pytest.mark.parametrize(("module", "operation"), PAIRS)
@pytest.mark.parametrize("options", [{"strides": (2, 1)}, {"padding": [[1, 1], [0, 2]]}], ids=str)
def test_windows_that_overlap(module, operation, options):
    """Catches strides or padding that a module drops, or a bound of another grid's sites."""
    x = sparse()
    expected = operation(x, 3, **options)
    y = nnx.jit(lambda m, x: m(x))(module(3, **options), x)
    np.testing.assert_array_equal(y.keys, expected.keys)
    np.testing.assert_array_equal(y.values, expected.values)
    assert module(3, 0.5, **options)(x).capacity == int(0.5 * expected.sites)


def test_mean_over_stored_entries():
    """Catches a count that the module drops."""
    x = sparse()
    expected = ilajax.avg_pool(x, 2, count="stored")
    np.testing.assert_array_equal(AvgPool(2, count="stored")(x).values, expected.values)
    with pytest.raises(ValueError, match="count must be"):
        AvgPool(2, count="entries")


@pytest.mark.parametrize(("module", "_"), PAIRS)
def test_has_no_variables(module, _):
    assert not jax.tree.leaves(nnx.state(module(2)))


@pytest.mark.parametrize(("module", "_"), PAIRS)
def test_bad_arguments_raise(module, _):
    with pytest.raises(ValueError, match=r"density_bound must lie in \(0, 1\], got 2"):
        module(2, 2)
    with pytest.raises(TypeError, match=r"density_bound must be one number.*\[0.2, 0.1\]"):
        module(2, [0.2, 0.1])
    with pytest.raises(TypeError, match=r"padding must be.*got 1"):
        module(2, padding=1)
    with pytest.raises(ValueError, match="window must have one entry"):
        module((2, 2, 2))(sparse())
    with pytest.raises(TypeError, match=r"x must be an ilajax\.SparseTensor"):
        module(2)(jnp.zeros((1, 4, 4, 1)))
