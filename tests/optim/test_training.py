"""All of it together: sparse layers in an ordinary Flax model, trained by an Optax chain under nnx.jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import drawn
import ilajax


class Model(nnx.Module):
    """Sparse layers, then layers of Flax that know nothing of them."""

    def __init__(self, rngs):
        self.features = nnx.Sequential(
            ilajax.nn.Conv(
                1, 4, (3, 3), density_bound=0.3, kernel_init=drawn.kernel_init, rngs=rngs
            ),
            ilajax.nn.MaxPool(2),
            ilajax.nn.Conv(
                4,
                4,
                (3, 3),
                density_bound=0.3,
                kernel_density=0.8,
                kernel_init=drawn.kernel_init,
                rngs=rngs,
            ),
            ilajax.to_dense,
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 4, 2, kernel_init=drawn.kernel_init, rngs=rngs)

    def __call__(self, x):
        y = nnx.gelu(self.norm(self.features(x)))
        return self.head(self.dropout(y.reshape(y.shape[0], -1)))


def strokes(seed, batch=16):
    """Horizontal and vertical strokes, and which they are."""
    rng = np.random.default_rng(seed)
    label, row = rng.integers(0, 2, batch), rng.integers(1, 7, batch)
    x = np.zeros((batch, 8, 8, 1), np.float32)
    for b in range(batch):
        x[b, row[b]] = 1
        if label[b]:
            x[b] = x[b].swapaxes(0, 1)
    return ilajax.from_dense(jnp.asarray(x), capacity=8), jnp.asarray(label)


def make_step(traces):
    @nnx.jit
    def step(model, optimizer, x, label, epoch_end):
        traces.append(None)

        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), label).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(
            model, grads, excess_density=ilajax.optim.excess_density(model), epoch_end=epoch_end
        )
        ilajax.optim.compact(model, optimizer)
        return value

    return step


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(5e-2, momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls_weights_go_nothing_retraces_and_it_repeats(name):
    tx = optax.chain(
        ilajax.optim.density_biased_l2(0.01, offset=0.1, b1=0.1, b2=0.1, momentum=0.9),
        OPTIMIZERS[name],
        ilajax.optim.one_warning_shot_pruning(0.05),
    )
    traces = []
    step = make_step(traces)

    def run(steps):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses, live = [], []
        for index in range(steps):
            losses.append(float(step(model, optimizer, *strokes(index), index % 10 == 9)))
            live.append([int(conv.sparse_kernel.count) for _, conv in ilajax.nn.iter_convs(model)])
        return losses, live

    losses, live = run(40)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert (np.diff(live, axis=0) <= 0).all(), "a removed weight never comes back"
    assert sum(live[-1]) < sum(live[0])
    # The same bits at every step, past the first pruning: a loss is a function of all parameters.
    assert run(25) == (losses[:25], live[:25])
    assert len(traces) == 1


def test_regularisation_steers_the_density_to_its_bound():
    """Far above the bound weights are pushed down, far below up: densities come closer from both sides."""

    def final_density(bound, scale):
        conv = ilajax.nn.Conv(
            1, 4, (3, 3), density_bound=bound, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0)
        )
        tx = optax.chain(
            ilajax.optim.density_biased_l2(scale, offset=0.1, b1=1.0, b2=1.0), optax.sgd(0.1)
        )
        optimizer = nnx.Optimizer(conv, tx, wrt=nnx.Param)
        x, _ = strokes(0)

        @nnx.jit
        def run(conv, optimizer):
            conv(x)
            grads = jax.tree.map(jnp.zeros_like, nnx.state(conv, nnx.Param))
            optimizer.update(conv, grads, excess_density=ilajax.optim.excess_density(conv))

        for _ in range(30):
            run(conv, optimizer)
        return np.asarray(conv.density[...])

    assert (final_density(0.02, 1.0) < final_density(0.02, 0.0)).all()
    assert (final_density(1.0, 1.0) >= final_density(1.0, 0.0)).all()
