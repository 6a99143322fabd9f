"""sparse_training: the whole recipe, around any optimizer, and harmless to wide dense layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.nn import Conv
from ilajax.optim import (
    compact,
    density_biased_l2,
    excess_density,
    one_warning_shot_pruning,
    sparse_training,
)

REGULARISER = {"scale": 0.5, "offset": 0.2, "b1": 0.3, "b2": 0.4, "momentum": 0.6}


class Model(nnx.Module):
    """A filter, its bias and a dense layer; the density is as if it had been measured."""

    def __init__(self, rngs):
        options = {"kernel_init": drawn.kernel_init, "rngs": rngs}
        self.conv = Conv(2, 3, 3, density_bound=0.5, **options)
        self.conv.density[...] = jnp.array([0.2, 0.5, 0.9])
        self.head = nnx.Linear(3, 4, **options)


@nnx.jit
def step(model, optimizer, epoch_end):
    """The gradient is a function of the weight, wherever it is stored."""
    grads = jax.tree.map(jnp.sin, nnx.state(model, nnx.Param))
    excess = excess_density(model)
    optimizer.update(
        model, grads, excess_density=excess, epoch_end=epoch_end, value=jnp.float32(0.5)
    )


def train(model, optimizer, epochs):
    for number in range(3 * epochs):
        step(model, optimizer, number % 3 == 2)


def scale_by_value():
    """An optimizer that cannot do without an extra argument of its own."""

    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: -0.1 * value * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# Epochs of three steps end between two updates of MultiSteps.
OPTIMIZERS = {
    "plain": lambda: optax.scale(-0.05),
    "chain": lambda: optax.chain(optax.clip(0.5), optax.adamw(0.02)),
    "extra arguments": scale_by_value,
    "MultiSteps": lambda: optax.MultiSteps(scale_by_value(), every_k_schedule=2),
}


def by_hand(optimizer):
    """The recipe, with a mask that knows the model."""
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "['conv']['kernel']" in jax.tree_util.keystr(path), params
        )

    pruning = optax.masked(one_warning_shot_pruning(0.4), mask)
    return optax.chain(density_biased_l2(**REGULARISER), optimizer, pruning)


def assert_same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_chain_around_any_optimizer(name):
    """Catches a wrong order, an argument that gets lost, and an optimizer that does not fit in or shrink."""
    model, expected = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    recipe = sparse_training(model, OPTIMIZERS[name](), threshold=0.4, **REGULARISER)
    optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
    expected_optimizer = nnx.Optimizer(expected, by_hand(OPTIMIZERS[name]()), wrt=nnx.Param)
    train(model, optimizer, 2)
    train(expected, expected_optimizer, 2)
    jax.tree.map(assert_same_bits, *(nnx.to_pure_dict(nnx.state(m)) for m in (model, expected)))

    compact(model, optimizer)
    assert 0 < int(model.conv.sparse_kernel.count) < 18
    compact(model, optimizer, shrink=True)
    assert model.conv.kernel.size < 18
    train(model, optimizer, 1)
    train(expected, expected_optimizer, 1)
    assert_same_bits(model.conv.sparse_kernel.to_dense(), expected.conv.sparse_kernel.to_dense())
    assert_same_bits(model.head.kernel[...], expected.head.kernel[...])


def test_a_restored_run_goes_on_with_the_same_bits():
    """Catches a recipe that hangs on the weights it was made with, or keeps state outside the optimizer."""

    def fresh(seed):
        model = Model(nnx.Rngs(seed))
        recipe = sparse_training(model, optax.adam(0.02), threshold=0.4)
        return model, nnx.Optimizer(model, recipe, wrt=nnx.Param)

    straight, restored = fresh(0), fresh(1)
    train(*straight, 2)
    compact(*straight)
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(straight)))
    nnx.update(restored, saved)
    for run in (straight, restored):
        train(*run, 1)
        compact(*run)
    assert int(straight[0].conv.sparse_kernel.count) < 18
    jax.tree.map(assert_same_bits, *(nnx.to_pure_dict(nnx.state(r)) for r in (straight, restored)))


def test_a_part_of_the_model_can_be_trained():
    """Catches a mask of all parameters where the optimizer has a part of them."""
    model, wrt = Model(nnx.Rngs(0)), nnx.All(nnx.Param, nnx.PathContains("conv"))
    recipe = sparse_training(model, optax.sgd(0.0), scale=0.0, threshold=1e6, wrt=wrt)
    optimizer = nnx.Optimizer(model, recipe, wrt=wrt)
    excess = excess_density(model, wrt)
    for _ in range(2):
        optimizer.update(model, nnx.state(model, wrt), excess_density=excess, epoch_end=True)
    compact(model, optimizer)
    assert int(model.conv.sparse_kernel.count) == 0


# --- A wide dense layer ----------------------------------------------------------------------------------


class WideHead(nnx.Module):
    """As Flax starts it, no weight of `hidden` is above 0.026."""

    def __init__(self, rngs):
        self.conv = Conv(1, 32, (3, 3), density_bound=0.2, rngs=rngs)
        self.hidden = nnx.Linear(16 * 16 * 32, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x):
        y = ilajax.to_dense(self.conv(x))
        return self.logits(nnx.relu(self.hidden(y.reshape(y.shape[0], -1))))


def strokes(seed, batch=16):
    """Horizontal and vertical strokes, and which they are."""
    rng = np.random.default_rng(seed)
    label, row = rng.integers(0, 2, batch), rng.integers(1, 15, batch)
    x = np.zeros((batch, 16, 16, 1), np.float32)
    for b in range(batch):
        x[b, row[b]] = 1
        if label[b]:
            x[b] = x[b].swapaxes(0, 1)
    return ilajax.from_dense(jnp.asarray(x), capacity=16), jnp.asarray(label)


def loss_of(model, x, label):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), label).mean()


@functools.cache
def epochs_of(name):
    """Three short epochs; the model and the loss on data of its own, before and after each of them."""
    model = WideHead(nnx.Rngs(0))
    if name == "recipe":
        tx = sparse_training(model, optax.adagrad(0.01))
    else:
        regulariser = density_biased_l2(0.003, offset=0.1, b1=0.1, b2=0.1)
        tx = optax.chain(regulariser, optax.adagrad(0.01), one_warning_shot_pruning(0.03))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, label, epoch_end):
        grads = nnx.grad(loss_of)(model, x, label)
        optimizer.update(model, grads, excess_density=excess_density(model), epoch_end=epoch_end)
        compact(model, optimizer)

    loss = nnx.jit(loss_of)
    losses = [float(loss(model, *strokes(99)))]
    for epoch in range(3):
        for number in range(4):
            step(model, optimizer, *strokes(4 * epoch + number), number == 3)
        losses.append(float(loss(model, *strokes(99))))
    return model, losses


def test_a_wide_dense_head_learns_through_the_first_pruning():
    """Catches pruning outside of filters, and defaults that a wide net dies of."""
    model, (_, first, second, third) = epochs_of("recipe")
    assert second < 0.9 * first
    assert third < 0.9 * second
    assert int(model.conv.sparse_kernel.count) < 288
    for layer in (model.hidden, model.logits):
        assert (layer.kernel[...] != 0).all()


def test_without_the_mask_the_same_run_dies():
    """Catches a test above that nothing can fail: a net that survives unmasked pruning."""
    model, (_, _, second, third) = epochs_of("no mask")
    assert (model.hidden.kernel[...] == 0).all()
    assert second == pytest.approx(np.log(2), abs=1e-3)
    assert third == pytest.approx(np.log(2), abs=1e-3)


# --- Bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [optax.adam, None, 0.1, "nnx.Optimizer"])
def test_what_is_no_optimizer_raises(optimizer):
    """Catches a failure inside of Optax, at the first update, that names nothing."""
    model = Model(nnx.Rngs(0))
    if optimizer == "nnx.Optimizer":
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=rf"optimizer must be .*got {type(optimizer).__name__}"):
        sparse_training(model, optimizer)


def test_a_model_without_sparse_layers_raises():
    """Catches a recipe that silently does nothing."""
    dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model must have an ilajax\.nn\.Conv .*Linear has none"):
        sparse_training(dense, optax.adam(0.1))
    with pytest.raises(ValueError, match="whose filter wrt selects"):
        sparse_training(Model(nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.PathContains("head"))


@pytest.mark.parametrize("name", ["scale", "offset", "b1", "b2", "threshold", "momentum"])
def test_a_number_outside_its_range_is_named(name):
    """Catches an argument that is handed on under another's name."""
    with pytest.raises(ValueError, match=f"^{name} must"):
        sparse_training(Model(nnx.Rngs(0)), optax.adam(0.1), **{name: -1.0})


def test_dense_layers_cost_no_state():
    """Catches a regulariser, or a pruning, that keeps an array for each weight of a wide dense layer."""
    model = Model(nnx.Rngs(0))
    state = sparse_training(model, optax.sgd(0.1)).init(nnx.state(model, nnx.Param))
    kept = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert model.head.kernel.shape not in kept
    assert kept.count(model.conv.kernel.shape) == 3  # the bias b, and what is warned and pruned
