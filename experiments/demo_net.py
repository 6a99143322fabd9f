"""The demonstration's network, its optimizer, and how it is trained."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence

import jax
import optax
from flax import nnx

import ilajax
from experiments import frame
from experiments.activations import sparse_densities
from experiments.data.loader import Arrays
from experiments.data.solids import CLASSES, Solids, SparseInput
from experiments.demo_measure import sparse_weights
from experiments.training import Row, Run, live_weights, train

# Of the sparse blocks. A surface's density goes with 1 / resolution.
BOUNDS = {16: (0.08, 0.24), 32: (0.04, 0.12, 0.28), 64: (0.02, 0.06, 0.14)}
RECIPE = ("learning_rate", "scale", "offset", "b1", "b2", "threshold")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A net and how it came about.

    Attributes:
      run: the net.
      rows: of its epochs.
      initial: weights of the sparse layers at the start.
      weights: those that were left after each epoch.
    """

    run: Run
    rows: Sequence[Row]
    initial: int
    weights: Sequence[int]

    @property
    def left(self) -> float:
        """Share of the sparse layers' weights that is left."""
        return self.weights[-1] / self.initial


@functools.partial(nnx.jit, static_argnames=("resolution", "dense"))
def make_net(key: jax.Array, *, resolution: int, dense: bool = False) -> ilajax.models.OctNet3:
    """The net of `OctNet3(..., rngs=nnx.Rngs(key))`, bit by bit, drawn by one program for all seeds."""
    return ilajax.models.OctNet3(
        resolution,
        num_classes=len(CLASSES),
        density_bounds=BOUNDS[resolution],
        rngs=nnx.Rngs(key),
        dense=dense,
    )


@functools.cache
def recipe(
    resolution: int,
    steps: int,
    learning_rate: float,
    scale: float,
    offset: float,
    b1: float,
    b2: float,
    threshold: float,
) -> optax.GradientTransformation:
    """The same arguments give the same object, so that nets of other seeds reuse the compiled step."""
    structure = nnx.eval_shape(
        functools.partial(make_net, jax.random.key(0), resolution=resolution)
    )
    return ilajax.optim.sparse_training(
        structure,
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps)),
        scale=scale,
        offset=offset,
        b1=b1,
        b2=b2,
        threshold=threshold,
    )


def net_and_optimizer(
    options: argparse.Namespace, seed: int, *, plain: bool
) -> tuple[nnx.Module, nnx.Optimizer]:
    """Initial ones; if `plain`, without regulariser and pruning."""
    values = {name: getattr(options, name) for name in RECIPE}
    if plain:
        values |= {"scale": 0.0, "threshold": 0.0}
    model = make_net(jax.random.key(seed), resolution=options.resolution)
    steps = options.epochs * (options.train_size // options.batch_size)
    transformation = recipe(options.resolution, steps, **values)
    return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)


def train_net(
    options: argparse.Namespace,
    seed: int,
    training: Solids,
    test: Solids,
    reporter: frame.Reporter,
    *,
    plain: bool,
) -> Trained:
    """Trains a net to the end, and shows how it goes."""
    model, optimizer = net_and_optimizer(options, seed, plain=plain)
    bounds = {
        f"conv{1 + at}": BOUNDS[options.resolution][at // 3]
        for at in range(3 * model.num_sparse_blocks)
    }
    run = Run(
        name=f"{'plain' if plain else 'sparse'}-{seed}",
        model=model,
        optimizer=optimizer,
        to_input=SparseInput(options.resolution),
        densities=sparse_densities,
        prunes=not plain,
        directory=options.out,
        options={},
        seed=seed,
        bounds=bounds,
        resumable=False,
    )
    initial = sparse_weights(model)
    others = live_weights(model) - initial
    rows = train(
        run,
        Arrays(training.keys, training.labels),
        (test.keys, test.labels),
        epochs=options.epochs,
        batch_size=options.batch_size,
        columns=[
            *("net", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
            *(
                "live_weights",
                *(f"density_{name}" for name in bounds),
                "seconds_per_step",
                "seconds",
            ),
        ],
        reporter=reporter,
        test_batch=2 * options.batch_size,
    )
    return Trained(run, rows, initial, [row["live_weights"] - others for row in rows])
