"""excess_density: what it reads off a model, and that its tree fits the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import drawn
import ilajax
from ilajax.nn import Conv
from ilajax.optim import excess_density


class Model(nnx.Module):
    """Sparse layers in every kind of container, and dense ones."""

    def __init__(self, rngs):
        self.first = Conv(
            1, 2, 3, density_bound=0.5, kernel_density=0.5, kernel_init=drawn.kernel_init, rngs=rngs
        )
        self.more = nnx.List(
            [
                Conv(
                    2,
                    3,
                    3,
                    density_bound=0.25,
                    use_bias=False,
                    kernel_init=drawn.kernel_init,
                    rngs=rngs,
                )
            ]
        )
        self.named = nnx.Dict(
            a=nnx.Sequential(
                Conv(3, 2, 1, density_bound=1.0, kernel_init=drawn.kernel_init, rngs=rngs)
            )
        )
        self.submanifold = Conv(1, 2, 3, support="input", kernel_init=drawn.kernel_init, rngs=rngs)
        self.head = nnx.Linear(2, 2, rngs=rngs)


def set_density(conv, seed):
    rng = np.random.default_rng(seed)
    conv.density[...] = jnp.asarray(rng.random(conv.out_features), jnp.float32)


def oracle(conv):
    """The excess of each stored weight, one key at a time."""
    *window, cin, cout = conv.kernel_shape
    taps = int(np.prod(window))
    rows = []
    for key in np.asarray(conv.kernel_keys[...]).tolist():
        channel = key // (cin * taps)
        rows.append(
            float(conv.density[...][channel]) - conv.density_bound if channel < cout else 0.0
        )
    return rows


def test_each_weight_gets_its_output_channels_excess():
    model = Model(nnx.Rngs(0))
    convs = (model.first, model.more[0], model.named["a"].layers[0])
    for seed, conv in enumerate(convs):
        set_density(conv, seed)
    excess = excess_density(model)
    for path, conv in zip(
        (("first",), ("more", 0), ("named", "a", "layers", 0)), convs, strict=True
    ):
        found = excess
        for key in path:
            found = found[key]
        np.testing.assert_allclose(found["kernel"], oracle(conv), atol=1e-7)
        if conv.bias is not None:
            np.testing.assert_allclose(
                found["bias"], conv.density[...] - conv.density_bound, atol=1e-7
            )
    for layer in ("submanifold", "head"):
        assert dict(excess[layer]) == {"kernel": None, "bias": None}


def test_the_tree_is_that_of_the_parameters():
    model = Model(nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    filled = jax.tree.map(
        lambda e, p: p if e is None else jnp.broadcast_to(e, p.shape),
        excess_density(model),
        params,
        is_leaf=lambda leaf: leaf is None,
    )
    assert jax.tree.structure(filled) == jax.tree.structure(params)
    jitted = nnx.jit(excess_density)(model)
    jax.tree.map(np.testing.assert_array_equal, jitted, excess_density(model))


def test_padding_has_no_excess():
    model = Conv(1, 2, 3, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0))
    model.kernel_keys[...] = jnp.array([0, 1, 4, 6, 6, 6], jnp.int32)
    model.density[...] = jnp.array([0.75, 0.0])
    np.testing.assert_array_equal(excess_density(model)["kernel"], [0.25, 0.25, -0.5, 0, 0, 0])


def test_before_the_first_call_all_capacity_is_unused():
    model = Conv(1, 2, 3, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(excess_density(model)["bias"], [-0.5, -0.5])
    model(ilajax.from_dense(jnp.ones((1, 8, 1)), capacity=8))
    assert (np.asarray(excess_density(model)["bias"]) != -0.5).any()


def test_follows_the_optimizers_filter():
    model = Model(nnx.Rngs(0))
    only_first = nnx.All(nnx.Param, nnx.PathContains("first"))
    assert set(excess_density(model, only_first)) == {"first"}


def test_stacked_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return Conv(1, 2, 3, density_bound=0.5, kernel_init=nnx.initializers.ones, rngs=rngs)

    stacked = stack(nnx.Rngs(0))
    stacked.density[...] = jnp.arange(6.0).reshape(3, 2)
    excess = excess_density(stacked)
    assert excess["kernel"].shape == stacked.kernel.shape
    np.testing.assert_array_equal(excess["kernel"][:, 0], [-0.5, 1.5, 3.5])
    np.testing.assert_array_equal(excess["kernel"][:, -1], [0.5, 2.5, 4.5])
