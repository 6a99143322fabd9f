"""The demonstration's network, its optimizer, and how it is trained."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import ilajax
from experiments import frame
from experiments.activations import sparse_convs, sparse_densities
from experiments.data.loader import Arrays
from experiments.data.solids import CLASSES, Solids, SparseInput
from experiments.demo_measure import sparse_weights
from experiments.training import Row, Run, compact, live_weights, train

# Of the sparse blocks. A surface's density goes with 1 / resolution.
BOUNDS = {16: (0.08, 0.24), 32: (0.04, 0.12, 0.28), 64: (0.02, 0.06, 0.14)}
RECIPE = ("learning_rate", "scale", "offset", "b1", "b2", "threshold")


Data = tuple[Solids, Solids]  # to train and to test


class Trained(NamedTuple):
    """A net, its epochs, and the weights of its sparse layers: the initial ones, and those after each."""

    model: nnx.Module
    optimizer: nnx.Optimizer
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


def structure(resolution: int) -> ilajax.models.OctNet3:
    """The net in shapes alone."""
    return nnx.eval_shape(functools.partial(make_net, jax.random.key(0), resolution=resolution))


@functools.cache
def recipe(
    resolution: int, steps: int, learning_rate: float, **numbers: float
) -> optax.GradientTransformation:
    """The same arguments give the same object, so that nets of other seeds reuse the compiled step."""
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return ilajax.optim.sparse_training(structure(resolution), adam, **numbers)


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
    options: argparse.Namespace, seed: int, data: Data, reporter: frame.Reporter, *, plain: bool
) -> Trained:
    """Trains a net to the end, and shows how it goes."""
    model, optimizer = net_and_optimizer(options, seed, plain=plain)
    initial = sparse_weights(model)
    others = live_weights(model) - initial
    rows = train_on_solids(
        options,
        data,
        reporter,
        name=f"{'plain' if plain else 'sparse'}-{seed}",
        model=model,
        optimizer=optimizer,
        seed=seed,
        densities=sparse_densities,
        after_epoch=None if plain else compact,
    )
    weights = [row["live_weights"] - others for row in rows]
    return Trained(model, optimizer, rows, initial, weights)


def train_on_solids(
    options: argparse.Namespace, data: Data, reporter: frame.Reporter, **run: Any
) -> list[Row]:
    """Trains a net of these attributes of a `Run`; the others are the same for all."""
    training, test = data
    return train(
        Run(
            to_input=SparseInput(options.resolution),
            directory=options.out,
            bounds=density_bounds(run["model"]),
            **run,
        ),
        Arrays(training.keys, training.labels),
        (test.keys, test.labels),
        epochs=options.epochs,
        batch_size=options.batch_size,
        reporter=reporter,
        test_batch=2 * options.batch_size,
    )


def density_bounds(model: nnx.Module) -> dict[str, float]:
    """The bound of each sparse convolution, by the names of `sparse_densities`."""
    return {f"conv{n}": conv.density_bound for n, conv in enumerate(sparse_convs(model), 1)}
