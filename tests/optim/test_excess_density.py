"""excess_density: what it reads off a model, and that its tree fits the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.nn import Conv, Density
from ilajax.optim import density_biased_l2, excess_density, sparse_training


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


def measured_model():
    model = Model(nnx.Rngs(0))
    for seed, conv in enumerate((model.first, model.more[0], model.named["a"].layers[0])):
        set_density(conv, seed)
    return model


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
    model = measured_model()
    convs = (model.first, model.more[0], model.named["a"].layers[0])
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
    model = measured_model()
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


def one_layer():
    model = Conv(1, 2, 3, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0))
    return model, ilajax.from_dense(jnp.ones((1, 8, 1)), capacity=8)


def test_a_density_that_was_never_measured_raises():
    """Catches "never measured" taken for 0, with which the regulariser pushes all weights up."""
    model, x = one_layer()
    with pytest.raises(ValueError, match=r"these layers have not: model\. Call the model"):
        excess_density(model)
    model.eval()
    model(x)
    with pytest.raises(ValueError, match=r"not after model\.eval\(\)"):
        excess_density(model)
    with pytest.raises(ValueError, match="these layers have not"):
        jax.jit(lambda: excess_density(model))()  # closed over, so that it can be seen
    model.train()
    model(x)
    np.testing.assert_allclose(excess_density(model)["bias"], model.density[...] - 0.5)

    deep = measured_model()
    deep.more[0].density[...] = jnp.array([0.5, -1.0, 0.5])
    with pytest.raises(ValueError, match=r"these layers have not: model\.more\.0\. "):
        excess_density(deep)
    # Nobody trains it: nothing is asked of it.
    excess_density(deep, nnx.All(nnx.Param, nnx.PathContains("first")))


def test_a_measurement_that_a_functional_gradient_threw_away_pushes_nothing():
    """Catches a jitted step in which weights rise for good, because the density reads 0 for ever."""
    model, x = one_layer()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = density_biased_l2(1.0, offset=1.0, b1=1.0, b2=1.0)

    @jax.jit
    def step(params, rest, state):
        def loss(params):
            return nnx.merge(graphdef, params, rest)(x).values.sum()

        grads = jax.grad(loss)(params)
        excess = excess_density(nnx.merge(graphdef, params, rest))
        updates, state = tx.update(grads, state, params, excess_density=excess)
        return jax.tree.map(jnp.subtract, updates, grads), state.bias

    pushed, bias = step(params, rest, tx.init(params))
    jax.tree.map(lambda b: np.testing.assert_array_equal(b, 0), bias)
    jax.tree.map(lambda u, w: np.testing.assert_allclose(u, w, atol=1e-5), pushed, params)

    @jax.jit
    def measuring_step(params, rest):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            return model(x).values.sum(), nnx.state(model, Density)

        _, density = jax.grad(loss, has_aux=True)(params)
        model = nnx.merge(graphdef, params, rest)
        nnx.update(model, density)
        return excess_density(model)

    excess = measuring_step(params, rest)
    model(x)
    np.testing.assert_allclose(excess["bias"], model.density[...] - 0.5)


def test_a_step_without_its_extra_arguments_says_what_to_pass():
    """Catches Python's bare TypeError for a missing keyword, deep inside a chain."""
    model, x = one_layer()
    optimizer = nnx.Optimizer(model, sparse_training(model, optax.sgd(0.1)), wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(x).values.sum())(model)
    call = r"update\(model, grads, excess_density=ilajax\.optim\.excess_density\(model\), epoch_end"
    with pytest.raises(TypeError, match=rf"excess_density is missing.*{call}"):
        optimizer.update(model, grads)
    with pytest.raises(TypeError, match=rf"epoch_end is missing.*{call}"):
        optimizer.update(model, grads, excess_density=excess_density(model))
    optimizer.update(model, grads, excess_density=None, epoch_end=False)  # no bound anywhere


def test_follows_the_optimizers_filter():
    model = measured_model()
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
