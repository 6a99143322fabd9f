"""filters: True for the filters of sparse layers and for nothing else, in a form that optax.masked takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import drawn
from ilajax.nn import Conv
from ilajax.optim import compact, filters, one_warning_shot_pruning


def conv(cin, cout, rngs, **options):
    return Conv(
        cin, cout, 3, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=rngs, **options
    )


class Model(nnx.Module):
    """Sparse layers in every kind of container, one of them twice, and others that have a kernel too."""

    def __init__(self, rngs):
        self.twice = self.again = conv(1, 2, rngs)
        self.more = nnx.List([conv(2, 2, rngs, use_bias=False), nnx.BatchNorm(2, rngs=rngs)])
        self.named = nnx.Dict(a=nnx.Sequential(conv(2, 2, rngs)))
        self.dense = nnx.Conv(2, 2, 3, kernel_init=drawn.kernel_init, rngs=rngs)
        self.kernel = nnx.Linear(2, 2, kernel_init=drawn.kernel_init, rngs=rngs)


def stack(rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Conv(1, 2, 3, density_bound=0.5, rngs=rngs)

    return make(rngs)


def assert_like_parameters(mask, model, wrt=nnx.Param):
    params = nnx.as_pure(nnx.state(model, wrt))
    assert jax.tree.structure(mask) == jax.tree.structure(params)


def test_it_tells_filters_from_all_else():
    """Catches a rule by name, with which a dense kernel counts, and a shared layer that is lost."""
    model = Model(nnx.Rngs(0))
    mask = filters(model)
    assert_like_parameters(mask, model)
    assert nnx.to_pure_dict(mask) == {
        "again": {
            "kernel": True,
            "bias": False,
        },  # the first of its two names, as in the parameters
        "more": {0: {"kernel": True}, 1: {"scale": False, "bias": False}},
        "named": {"a": {"layers": {0: {"kernel": True, "bias": False}}}},
        "dense": {"kernel": False, "bias": False},
        "kernel": {"kernel": False, "bias": False},
    }


def test_a_layer_by_itself_a_stack_and_a_model_without_any():
    """Catches a path that is expected to be longer than it is."""
    for model in (conv(1, 2, nnx.Rngs(0)), stack(nnx.Rngs(0))):
        assert nnx.to_pure_dict(filters(model)) == {"kernel": True, "bias": False}
    dense = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
    assert nnx.to_pure_dict(filters(dense)) == {"kernel": False, "bias": False}


def test_it_follows_what_is_trained():
    """Catches a mask of all parameters, which optax.masked rejects where a part of them is trained."""
    model, wrt = Model(nnx.Rngs(0)), nnx.All(nnx.Param, nnx.PathContains("more"))
    mask = filters(model, wrt)
    assert_like_parameters(mask, model, wrt)
    assert nnx.to_pure_dict(mask) == {
        "more": {0: {"kernel": True}, 1: {"scale": False, "bias": False}}
    }
    optimizer = nnx.Optimizer(model, optax.masked(optax.sgd(0.1), mask), wrt=wrt)
    optimizer.update(model, nnx.state(model, wrt))


def test_optax_masks_by_it_before_and_after_compact():
    """Catches a form that fits Variables but not the arrays of an update, or one length only."""
    model = Model(nnx.Rngs(0))
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = filters(model)
    tx = optax.chain(optax.set_to_zero(), optax.masked(one_warning_shot_pruning(0.4), mask))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads, epoch_end=True)

    step(model, optimizer)
    step(model, optimizer)
    compact(model, optimizer, shrink=True)
    step(model, optimizer)
    assert jax.tree.leaves(filters(model)) == jax.tree.leaves(mask)

    small = int((np.abs(start["again"]["kernel"]) < 0.4).sum())
    assert 0 < small < 6
    assert int(model.twice.sparse_kernel.count) == 6 - small
    for layer, name in ((model.dense, "dense"), (model.kernel, "kernel")):
        assert (np.abs(start[name]["kernel"]) < 0.4).any()
        np.testing.assert_array_equal(layer.kernel[...], start[name]["kernel"])
