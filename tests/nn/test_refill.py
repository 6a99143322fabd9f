"""nn.refill: removed weights come back at 0 and can be trained."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.nn import Conv, load_state, refill


def test_fills_every_filter_without_changing_the_output():
    options = {"density_bound": 1.0, "kernel_init": drawn.kernel_init, "rngs": nnx.Rngs(0)}
    model = nnx.Sequential(
        Conv(1, 2, 3, kernel_density=0.5, **options),
        Conv(2, 2, 3, kernel_density=0.3, **options),
        nnx.Linear(2, 2, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0)),
    )
    sparse_part = nnx.Sequential(*model.layers[:2])
    x = ilajax.from_dense(drawn.normal(0, (1, 9, 1)), capacity=9)
    before, filters = sparse_part(x), [c.sparse_kernel.to_dense() for c in sparse_part.layers]
    refill(model)
    for conv, filter_before in zip(sparse_part.layers, filters, strict=True):
        assert conv.kernel.shape == (conv.sparse_kernel.size,)
        assert int(conv.sparse_kernel.count) == conv.sparse_kernel.size
        np.testing.assert_array_equal(conv.sparse_kernel.to_dense(), filter_before)
    after = sparse_part(x)
    np.testing.assert_array_equal(after.keys, before.keys)
    np.testing.assert_allclose(after.values, before.values, rtol=1e-5, atol=1e-6)


def test_refilled_weights_get_gradients():
    options = {"density_bound": 1.0, "kernel_init": drawn.kernel_init, "rngs": nnx.Rngs(1)}
    model = Conv(1, 1, 3, kernel_density=0.3, use_bias=False, **options)
    model.kernel[...] = jnp.ones(1)
    refill(model)
    x = ilajax.from_dense(jnp.ones((1, 9, 1)), capacity=9)
    grads = nnx.grad(lambda m: m(x).values.sum())(model)
    assert (np.asarray(grads.kernel[...]) > 0).all()


def test_stacked_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        options = {"density_bound": 1.0, "kernel_density": 0.5, "rngs": rngs}
        return Conv(1, 2, 3, kernel_init=nnx.initializers.ones, **options)

    stacked = stack(nnx.Rngs(0))
    keys, values = np.asarray(stacked.kernel_keys[...]), np.asarray(stacked.kernel[...])
    refill(stacked)
    assert stacked.kernel.shape == (3, 6)
    for layer in range(3):
        np.testing.assert_array_equal(stacked.kernel[...][layer][keys[layer]], values[layer])
    np.testing.assert_array_equal(stacked.kernel_keys[...], np.tile(np.arange(6), (3, 1)))


def test_keys_out_of_order_raise():
    """Catches keys that Orbax filled up with 0: the weights behind them would land on the first one."""
    model = nnx.Sequential(Conv(1, 2, 3, density_bound=1.0, rngs=nnx.Rngs(0)))
    model.layers[0].kernel_keys[...] = jnp.array([1, 4, 0, 0, 0, 0], jnp.int32)
    with pytest.raises(ValueError, match=r"layers\.0\.kernel_keys must ascend.*load_state"):
        refill(model)


def test_a_refilled_model_is_loaded_into_one_that_starts_with_fewer_weights():
    """Catches lengths that load_state takes only where they are shorter than the fresh model's."""
    saved, fresh = (
        Conv(1, 2, 3, density_bound=1.0, kernel_density=0.5, rngs=nnx.Rngs(seed)) for seed in (0, 1)
    )
    refill(saved)
    load_state(fresh, nnx.state(saved))
    np.testing.assert_array_equal(fresh.sparse_kernel.to_dense(), saved.sparse_kernel.to_dense())
    assert fresh.kernel.size == 6
