"""All of it together: sparse layers in an ordinary Flax model, trained by an Optax chain under nnx.jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ilajax


class Model(nnx.Module):
    """Sparse layers, then layers of Flax that know nothing of them."""

    def __init__(self, rngs):
        self.features = nnx.Sequential(
            ilajax.nn.Conv(1, 4, (3, 3), density_bound=0.3, rngs=rngs),
            ilajax.nn.MaxPool(2),
            ilajax.nn.Conv(4, 4, (3, 3), density_bound=0.3, kernel_density=0.8, rngs=rngs),
            ilajax.to_dense,
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 4, 2, rngs=rngs)

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
    "adagrad": optax.adagrad(5e-2),
    "sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(5e-2, momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls_weights_go_and_nothing_retraces(name):
    model = Model(nnx.Rngs(0))
    tx = optax.chain(
        ilajax.optim.density_biased_l2(0.01, offset=0.1, b1=0.1, b2=0.1, momentum=0.9),
        OPTIMIZERS[name],
        ilajax.optim.one_warning_shot_pruning(0.05),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []
    step, losses, live = make_step(traces), [], []
    for index in range(40):
        losses.append(float(step(model, optimizer, *strokes(index), index % 10 == 9)))
        live.append([int(conv.sparse_kernel.count) for _, conv in ilajax.nn.iter_convs(model)])
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert (np.diff(live, axis=0) <= 0).all(), "a removed weight never comes back"
    assert sum(live[-1]) < sum(live[0])


def test_two_runs_give_the_same_bits():
    def run():
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(
            model,
            optax.chain(
                ilajax.optim.density_biased_l2(0.01, offset=0.1, b1=0.1, b2=0.1),
                optax.adagrad(0.05),
                ilajax.optim.one_warning_shot_pruning(0.05),
            ),
            wrt=nnx.Param,
        )
        for index in range(4):
            STEP(model, optimizer, *strokes(index), index % 2 == 1)
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state((model, optimizer))))

    for a, b in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(a) if _is_key(a) else a, _data(b))


def _is_key(a):
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def _data(a):
    return jax.random.key_data(a) if _is_key(a) else a


STEP = make_step([])


def test_regularisation_steers_the_density_to_its_bound():
    """Far above the bound weights are pushed down, far below up: densities come closer from both sides."""

    def final_density(bound, scale):
        conv = ilajax.nn.Conv(1, 4, (3, 3), density_bound=bound, rngs=nnx.Rngs(0))
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
