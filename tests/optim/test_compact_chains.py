"""compact in the chains and wrappers of Optax: it follows the pruning into them, or says why it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import drawn
from ilajax.nn import Conv
from ilajax.optim import compact, one_warning_shot_pruning
from optim.test_compact import X, assert_same_bits, jitted_compact, of_filter, pruning


class Pair(nnx.Module):
    """The two filters of the same length alone."""

    def __init__(self, rngs):
        options = {
            "density_bound": 0.5,
            "kernel_init": drawn.kernel_init,
            "use_bias": False,
            "rngs": rngs,
        }
        self.twins = nnx.List([Conv(3, 2, 3, **options)])
        self.twin = Conv(1, 6, 3, **options)

    def convs(self):
        return {"twins": self.twins[0], "twin": self.twin}


@nnx.jit
def apply_gradients(model, optimizer, grads, epoch_end):
    optimizer.update(model, grads, epoch_end=epoch_end)


def epochs(model, optimizer, count):
    """Epochs of two steps, with a gradient of its own for each weight, wherever it is stored."""
    grads = nnx.clone(nnx.state(model, nnx.Param))
    for name, conv in model.convs().items():
        of_weight = np.append(np.cos(np.arange(conv.sparse_kernel.size)), 0)  # 0 at padding
        own = of_weight[np.asarray(conv.kernel_keys[...])]
        of_filter(grads, name).set_value(jnp.asarray(own, jnp.float32))
    for step in range(2 * count):
        apply_gradients(model, optimizer, grads, step % 2 == 1)


def kernels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.DictKey("kernel") in path, params
    )


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "filters" if jax.tree_util.DictKey("kernel") in path else "rest", params
    )


WRAPPED = {
    "masked": optax.chain(optax.adam(0.01), optax.masked(pruning(), kernels)),
    "nested chains": optax.chain(
        optax.chain(optax.clip(1.0), optax.chain(optax.scale_by_rms(), optax.trace(0.9))),
        optax.chain(optax.scale(-0.01), pruning()),
    ),
    "MultiSteps": optax.MultiSteps(optax.chain(optax.adam(0.01), pruning()), every_k_schedule=2),
    "inject_hyperparams": optax.chain(
        optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
        optax.inject_hyperparams(one_warning_shot_pruning)(threshold=0.3),
    ),
    "partition": optax.partition(
        {"filters": optax.chain(optax.adam(0.01), pruning()), "rest": optax.adagrad(0.01)}, labels
    ),
    "factored": optax.chain(optax.scale_by_factored_rms(), optax.scale(-0.01), pruning()),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_optimizers_are_followed(wrapper):
    model, kept, tx = Pair(nnx.Rngs(0)), Pair(nnx.Rngs(0)), WRAPPED[wrapper]
    optimizer, kept_optimizer = (nnx.Optimizer(m, tx, wrt=nnx.Param) for m in (model, kept))
    epochs(model, optimizer, 2)
    epochs(kept, kept_optimizer, 2)
    compact(model, optimizer, shrink=True)
    assert all(
        small.kernel.size < full.kernel.size
        for small, full in zip(model.convs().values(), kept.convs().values(), strict=True)
    )
    epochs(model, optimizer, 3)
    epochs(kept, kept_optimizer, 3)
    for small, full in zip(model.convs().values(), kept.convs().values(), strict=True):
        # Pruned weights stand as 0 in the one and are absent from the other.
        assert_same_bits(small.sparse_kernel.to_dense(), full.sparse_kernel.to_dense())


def test_all_weights_pruned_leaves_one_slot():
    model = Pair(nnx.Rngs(0))
    tx = optax.chain(optax.adam(0.01), one_warning_shot_pruning(1e6))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    epochs(model, optimizer, 2)
    compact(model, optimizer, shrink=True)
    epochs(model, optimizer, 1)
    for conv in model.convs().values():
        assert conv.kernel.shape == (1,)
        assert int(conv.sparse_kernel.count) == 0
        assert float(conv.kernel[...][0]) == 0
    y = model.twin(X)  # an empty filter has no responses
    assert int(y.counts.sum()) == 0


BEHIND = {
    "momentum": optax.trace(0.9),
    "weight decay": optax.chain(optax.trace(0.5), optax.add_decayed_weights(0.01)),
    "scaling": optax.scale(0.5),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_pruned_weights_that_are_not_0_raise(behind):
    """Catches non-zero weights removed without a word where the pruning is not last in its chain."""
    model = Pair(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.01), pruning(), BEHIND[behind])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    epochs(model, optimizer, 2)
    filters_before = {name: conv.sparse_kernel.to_dense() for name, conv in model.convs().items()}
    before = nnx.clone((model, optimizer))
    moved = {
        name: (of_filter(optimizer.opt_state[1].pruned, name)[...] & (conv.kernel[...] != 0)).sum()
        for name, conv in model.convs().items()
    }
    assert all(count > 0 for count in moved.values()), "the test moves something"

    def still_raises():
        for shrink in (False, True):
            with pytest.raises(ValueError, match="put one_warning_shot_pruning last") as raised:
                compact(model, optimizer, shrink=shrink)
        assert f"twins.0.kernel ({moved['twins']} of " in str(raised.value)
        assert f"twin.kernel ({moved['twin']} of " in str(raised.value)

    still_raises()
    jax.tree.map(assert_same_bits, *map(nnx.state, (before, (model, optimizer))))
    # Inside nnx.jit nobody can look: what is not 0 stays, and the next look finds it.
    jitted_compact(model, optimizer)
    for name, conv in model.convs().items():
        assert_same_bits(conv.sparse_kernel.to_dense(), filters_before[name])
    still_raises()


def test_keys_out_of_order_raise():
    """Catches keys that Orbax filled up with 0, which would be sorted in among the live ones."""
    model = Pair(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, pruning(), wrt=nnx.Param)
    model.twin.kernel_keys[...] = jnp.arange(18).at[10:].set(0)
    with pytest.raises(ValueError, match=r"twin\.kernel_keys must ascend.*slot 10 0 follows 9"):
        compact(model, optimizer)
