"""ReLU and Dropout: what they do to stored values, and that supports stay."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import samples
from ilajax.nn import Dropout, ReLU


@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared"])
def test_relu(shared):
    x = samples.tensor(0, shared=shared)
    y = ReLU()(x)
    np.testing.assert_array_equal(y.values, np.maximum(x.values, 0))
    assert y.keys is x.keys


def test_dropout_is_flaxs_on_the_values():
    x = samples.tensor(1, batch=4, channels=3, shared=True)
    y = Dropout(0.4, rngs=nnx.Rngs(dropout=1))(x)
    np.testing.assert_array_equal(y.values, nnx.Dropout(0.4, rngs=nnx.Rngs(dropout=1))(x.values))
    assert y.keys is x.keys
    layer = Dropout(0.4, rngs=nnx.Rngs(dropout=1))
    layer.eval()
    np.testing.assert_array_equal(layer(x).values, x.values)
    np.testing.assert_array_equal(layer(x, deterministic=True).values, x.values)


@pytest.mark.parametrize(("dims", "axis"), [((1,), 1), ((2,), 2)], ids=["sites", "channels"])
def test_whole_sites_or_channels(dims, axis):
    x = samples.tensor(2, batch=4, channels=3, shared=True)
    ones = x.with_values(jnp.where(x.keys < x.sites, jnp.ones_like(x.values), 0))
    kept = np.asarray(Dropout(0.5, broadcast_dims=dims, rngs=nnx.Rngs(0))(ones).values)
    stored = np.broadcast_to(x.keys < x.sites, kept.shape)
    highest = np.where(stored, kept, 0).max(axis)
    lowest = np.where(stored, kept, 2).min(axis)
    any_stored = stored.any(axis)
    np.testing.assert_array_equal(highest[any_stored], lowest[any_stored])
    assert set(np.unique(kept)) == {0.0, 2.0}
