"""compact: pruned weights leave storage, and nothing else changes, up to the order of sums."""

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
    excess_density,
    filters,
    one_warning_shot_pruning,
    sparse_training,
)

X = ilajax.from_dense(drawn.normal(0, (3, 10, 1)), capacity=6)
Y = drawn.normal(1, (3, 2))


class Model(nnx.Module):
    """Filters of which two have the same length (18), and a dense layer."""

    def __init__(self, rngs):
        options = {"kernel_init": drawn.kernel_init, "rngs": rngs}
        self.first = Conv(1, 3, 3, density_bound=1.0, **options)
        self.twins = nnx.List([Conv(3, 2, 3, density_bound=0.5, **options)])
        self.twin = Conv(1, 6, 3, density_bound=0.3, **options)
        self.head = nnx.Linear(20, 2, **options)

    def __call__(self, x):
        y = ilajax.to_dense(self.twins[0](self.first(x)))
        return self.head(y.reshape(3, -1)) + ilajax.to_dense(self.twin(x)).mean()

    def convs(self):
        return {"first": self.first, "twins": self.twins[0], "twin": self.twin}


def of_filter(tree, name):
    return tree["twins"][0]["kernel"] if name == "twins" else tree[name]["kernel"]


def pruning():
    return one_warning_shot_pruning(0.3)


@functools.cache
def start():
    return Model(nnx.Rngs(0))


def regularised(optimizer):
    return sparse_training(start(), optimizer, scale=0.05, threshold=0.45, momentum=0.5)


OPTIMIZERS = {
    "adam": optax.adam(0.01),
    "adagrad with momentum": optax.chain(optax.adagrad(0.02), optax.trace(0.5)),
}


TX = {name: regularised(optimizer) for name, optimizer in OPTIMIZERS.items()}
TRACES = []


@nnx.jit
def train_step(model, optimizer, x, y, epoch_end):
    TRACES.append(None)

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads, excess_density=excess_density(model), epoch_end=epoch_end)
    return value


forward = nnx.jit(lambda model, x: model(x))
jitted_compact = nnx.jit(compact)


def train(model, optimizer, epochs=2, steps=2):
    return [
        float(train_step(model, optimizer, X, Y, step == steps - 1))
        for _ in range(epochs)
        for step in range(steps)
    ]


@functools.cache
def trained_once(name):
    model = nnx.clone(start())
    optimizer = nnx.Optimizer(model, TX[name], wrt=nnx.Param)
    train(model, optimizer)
    return model, optimizer


def trained(name):
    return nnx.clone(trained_once(name))


def pruned_of(optimizer, name):
    """The pruning state of a filter, found by hand."""
    return np.asarray(of_filter(optimizer.opt_state[-1].inner_state.pruned, name)[...])


def slots_by_key(model, optimizer):
    """Every array of the optimizer that belongs to a filter, as {path and key of the weight: value}."""
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer.opt_state):
        text = jax.tree_util.keystr(path)
        for name, conv in model.convs().items():
            if f"['{name}']" in text and "['kernel']" in text:
                keys = np.asarray(conv.kernel_keys[...]).tolist()
                for key, value in zip(keys, np.asarray(leaf).tolist(), strict=True):
                    if key < conv.sparse_kernel.size:
                        table[text, key] = value
    return table


def assert_same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


HOW = {
    "plain": lambda model, optimizer: compact(model, optimizer),
    "jit": lambda model, optimizer: jitted_compact(model, optimizer),
    "shrink": lambda model, optimizer: compact(model, optimizer, shrink=True),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_stored_moves_as_it_is_and_training_goes_on(name, how):
    """Catches a weight, a key or a slot that changes on its way, and training that goes another way then."""
    model, optimizer = trained(name)
    kept_model, kept_optimizer = trained(name)
    pruned = {conv: pruned_of(optimizer, conv) for conv in model.convs()}
    assert all(0 < mask.sum() < mask.size for mask in pruned.values()), "the test prunes something"
    before = slots_by_key(model, optimizer)

    HOW[how](model, optimizer)

    for conv_name, conv in model.convs().items():
        kept = kept_model.convs()[conv_name]
        live = ~pruned[conv_name]
        size, count = conv.sparse_kernel.size, live.sum()
        keys, values = np.asarray(conv.kernel_keys[...]), np.asarray(conv.kernel[...])
        assert_same_bits(keys[:count], np.asarray(kept.kernel_keys[...])[live])
        assert_same_bits(values[:count], np.asarray(kept.kernel[...])[live])
        assert (keys[count:] == size).all()
        assert (values[count:] == 0).all()
        assert_same_bits(pruned_of(optimizer, conv_name), np.arange(keys.size) >= count)
        if how == "shrink":
            assert count <= keys.size <= max(1, count * 1.15)
        else:
            assert keys.size == live.size
    after = slots_by_key(model, optimizer)
    assert after == {where: before[where] for where in after}
    lost = {where for where in before if where not in after}
    assert len({text for text, _ in lost}) == len({text for text, _ in before})

    assert_close(forward(model, X), forward(kept_model, X))
    assert_close(train(model, optimizer, epochs=3), train(kept_model, kept_optimizer, epochs=3))
    assert_close(forward(model, X), forward(kept_model, X))
    # What was pruned since goes in the second round, and is the same too.
    HOW[how](model, optimizer)
    compact(kept_model, kept_optimizer)
    for conv, kept in zip(model.convs().values(), kept_model.convs().values(), strict=True):
        assert_close(conv.sparse_kernel.to_dense(), kept.sparse_kernel.to_dense())
        assert_same_bits(conv.sparse_kernel.mask(), kept.sparse_kernel.mask())


@jax.jit
def sums(x, kernel, bias):
    """A layer's outputs, and its gradients with respect to input, filter and bias."""

    def responses(values, weights, bias):
        y = ilajax.conv(
            x.with_values(values),
            ilajax.SparseKernel(kernel.keys, weights, kernel.shape),
            bias,
            capacity=x.sites,
        ).features
        return jnp.sum(y.values**2), y

    gradient = jax.grad(responses, argnums=(0, 1, 2), has_aux=True)
    (of_x, of_kernel, of_bias), y = gradient(x.values, kernel.values, bias)
    of_kernel = ilajax.SparseKernel(kernel.keys, of_kernel, kernel.shape).to_dense()
    return ilajax.to_dense(y), of_x, of_kernel, of_bias


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_sums_are_the_same_up_to_their_order(exact, shrink):
    """Catches a sum that gains or loses a term. A tenth is left of the filter: the CPU's other form runs."""
    model = Conv(8, 8, (3, 3), density_bound=1.0, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), optax.masked(pruning(), filters(model)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    gone = rng.random(model.kernel.size) < 0.9

    def drawn_values(shape):
        # Sums of products of these are whole numbers below 2**24.
        values = rng.integers(-3, 4, shape) if exact else rng.normal(size=shape)
        return values.astype(np.float32)

    model.kernel[...] = jnp.where(gone, 0, drawn_values(gone.shape))
    optimizer.opt_state[-1].inner_state.pruned["kernel"][...] = jnp.asarray(gone)
    dense = np.where(rng.random((2, 24, 24, 8)) < 0.5, drawn_values((2, 24, 24, 8)), 0)
    x, bias = ilajax.from_dense(jnp.asarray(dense), capacity=400), jnp.asarray(drawn_values(8))

    before = sums(x, model.sparse_kernel, bias)
    compact(model, optimizer, shrink=shrink)
    assert int(model.sparse_kernel.count) == (~gone).sum()
    *after, of_kernel, of_bias = sums(x, model.sparse_kernel, bias)
    live = np.asarray(model.sparse_kernel.mask())
    before = (*before[:2], np.where(live, before[2], 0), before[3])
    for a, b in zip((*after, of_kernel, of_bias), before, strict=True):
        if exact:
            assert_same_bits(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_without_shrink_nothing_is_compiled_again():
    model, optimizer = trained("adam")
    before = len(TRACES)
    compact(model, optimizer)
    train(model, optimizer)
    assert len(TRACES) == before


def test_twice_is_once():
    model, optimizer = trained("adam")
    compact(model, optimizer)
    once = jax.tree.leaves(nnx.state((model, optimizer)))
    compact(model, optimizer)
    jax.tree.map(assert_same_bits, once, jax.tree.leaves(nnx.state((model, optimizer))))


def test_padding_of_the_start_is_marked_as_pruned():
    model = nnx.clone(start())
    size = model.first.sparse_kernel.size
    model.first.kernel_keys[...] = jnp.array([0, 2, 3, *[size] * 6], jnp.int32)
    model.first.kernel[...] = jnp.array([1.0, 2.0, 3.0, *[0.0] * 6])
    optimizer = nnx.Optimizer(model, TX["adam"], wrt=nnx.Param)
    train(model, optimizer)
    assert_same_bits(model.first.kernel[...][3:], np.zeros(6))  # padding does not drift
    compact(model, optimizer)
    assert_same_bits(pruned_of(optimizer, "first"), np.arange(9) >= 3)


def test_stacked_layers_shrink_to_the_longest():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return Conv(1, 4, 5, density_bound=0.5, kernel_init=nnx.initializers.ones, rngs=rngs)

    model = stack(nnx.Rngs(0))
    values = np.ones((3, 20), np.float32)
    values[0, 5:] = values[1, :12] = values[2, ::2] = 0.0
    model.kernel[...] = jnp.asarray(values)
    tx = optax.chain(optax.adam(0.0), optax.masked(pruning(), filters(model)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param), epoch_end=True)
    compact(model, optimizer, shrink=True)
    assert model.kernel.shape == (3, 10)
    assert_same_bits(model.kernel_keys[...][0], [0, 1, 2, 3, 4, *[20] * 5])
    assert_same_bits(model.kernel_keys[...][1], [*range(12, 20), 20, 20])
    assert_same_bits(model.kernel_keys[...][2], range(1, 20, 2))


# --- Pruning beyond filters ------------------------------------------------------------------------------


def pruned_everywhere(epochs):
    """A model whose pruning is not masked, after epochs of one step that moves nothing."""
    model = nnx.clone(start())
    tx = optax.chain(optax.set_to_zero(), pruning())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(epochs):
        optimizer.update(model, nnx.state(model, nnx.Param), epoch_end=True)
    return model, optimizer


@pytest.mark.parametrize("shrink", [False, True])
def test_pruned_weights_beyond_filters_are_named_in_one_warning(shrink):
    """Catches silence about a net that may be dead, a warning for each layer, and filters left alone."""
    small = {
        name: int((np.abs(layer.kernel[...]) < 0.3).sum())
        for name, layer in {"head": start().head, **start().convs()}.items()
    }
    model, optimizer = pruned_everywhere(2)
    with pytest.warns(UserWarning, match=r"sparse_training.*filters\(model\)") as caught:
        compact(model, optimizer, shrink=shrink)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert f"head.kernel ({small['head']} of 40)" in text
    for path in ("head.bias (2 of 2)", "first.bias (3 of 3)", "twins.0.bias (2 of 2)"):
        assert path in text
    assert text.count(" of ") == 5 + text.count("filter of")  # twin.bias is the fifth
    for name, conv in model.convs().items():
        assert int(conv.sparse_kernel.count) == conv.sparse_kernel.size - small[name]


def test_no_warning_where_nothing_is_pruned_yet_or_nobody_can_look():
    """Catches a warning about warned weights, and a look at values that jit has not computed."""
    compact(*pruned_everywhere(1))
    model, optimizer = pruned_everywhere(2)
    jitted_compact(model, optimizer)
    assert int(model.first.sparse_kernel.count) < model.first.sparse_kernel.size


# --- Bad arguments ---------------------------------------------------------------------------------------


def test_what_it_cannot_follow_raises():
    model = nnx.clone(start())

    def optimizer(tx):
        return nnx.Optimizer(model, tx, wrt=nnx.Param)

    with pytest.raises(TypeError, match=r"optimizer must be an nnx\.Optimizer"):
        compact(model, optax.adam(0.1))
    with pytest.raises(ValueError, match="no state of one_warning_shot_pruning"):
        compact(model, optimizer(optax.adam(0.1)))
    with pytest.raises(ValueError, match=r"optax\.flatten"):
        compact(model, optimizer(optax.chain(optax.flatten(optax.adam(0.1)), pruning())))
    with pytest.raises(ValueError, match="shrink=True changes shapes"):
        nnx.jit(lambda m, o: compact(m, o, shrink=True))(model, optimizer(pruning()))


def test_an_optimizer_of_another_model_raises():
    model = nnx.Sequential(
        Conv(
            1,
            2,
            3,
            density_bound=0.5,
            kernel_density=0.5,
            kernel_init=drawn.kernel_init,
            rngs=nnx.Rngs(0),
        )
    )
    optimizer = nnx.Optimizer(model, pruning(), wrt=nnx.Param)
    ilajax.nn.refill(model)
    with pytest.raises(ValueError, match=r"'layers', 0, 'kernel'.*create it anew"):
        compact(model, optimizer)


def test_a_half_tied_filter_raises():
    rngs = nnx.Rngs(0)
    pair = nnx.List(
        [
            Conv(1, 2, 3, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=rngs)
            for _ in range(2)
        ]
    )
    pair[1].kernel = pair[0].kernel
    optimizer = nnx.Optimizer(pair, pruning(), wrt=nnx.Param)
    with pytest.raises(ValueError, match="shares its kernel"):
        compact(pair, optimizer)
    pair[1].kernel_keys = pair[0].kernel_keys
    compact(pair, nnx.Optimizer(pair, pruning(), wrt=nnx.Param))
