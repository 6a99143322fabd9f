"""The training loop of the classification experiments: steps, evaluation, checkpoints, history."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from experiments.checkpoints import Checkpoints
from experiments.frame import Reporter, Table, minutes

# Turns a batch of images into what the net takes; hashable, as it is static under jit.
ToInput = Callable[[jax.Array], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One network to be trained.

    Attributes:
      name: what its rows, lines and checkpoints are called.
      model: the network, which turns `to_input(images)` into logits.
      optimizer: its optimizer; `update` gets `excess_density` and `epoch_end`.
      to_input: turns a batch of images into what the model takes.
      densities: the response density of each sparse layer, by name, read off the model after a step.
      prunes: whether the optimizer prunes, so that filters are compacted after each epoch.
      directory: gets `<name>.csv` and the checkpoints.
      options: what a checkpoint must have been made with to fit, by the name of the option.
      seed: of the order of the training data.
    """

    name: str
    model: nnx.Module
    optimizer: nnx.Optimizer
    to_input: ToInput
    densities: Callable[[nnx.Module], dict[str, float]]
    prunes: bool
    directory: Path
    options: Row
    seed: int

    @property
    def checkpoints(self) -> Path:
        return checkpoint_directory(self.directory, self.name)


def checkpoint_directory(directory: Path, name: str) -> Path:
    return directory / "checkpoints" / name


@functools.partial(nnx.jit, static_argnames="to_input", donate_argnames=("model", "optimizer"))
def train_step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    labels: jax.Array,
    epoch_end: jax.Array,
    *,
    to_input: ToInput,
) -> tuple[jax.Array, jax.Array]:
    """One step of gradient descent; returns the mean loss and the share of images told right."""

    def loss_of(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
        logits = model(to_input(images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), jnp.mean(jnp.argmax(logits, axis=1) == labels)

    (loss, accuracy), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    # The forward pass has measured the densities that the regulariser works on, and pruning wants to
    # know when an epoch ends. An optimizer without them ignores both.
    excess = ilajax.optim.excess_density(model)
    optimizer.update(model, gradients, excess_density=excess, epoch_end=epoch_end)
    return loss, accuracy


@functools.partial(nnx.jit, static_argnames="to_input")
def evaluation_step(
    model: nnx.Module, images: jax.Array, labels: jax.Array, *, to_input: ToInput
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses and number of images told right; a label of -1 does not count."""
    logits = model(to_input(images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    counts = labels >= 0
    return jnp.sum(losses * counts), jnp.sum((jnp.argmax(logits, axis=1) == labels) & counts)


def evaluate(run: Run, images: np.ndarray, labels: np.ndarray, batch: int = 250) -> tuple[float, float]:
    """Mean loss and accuracy, without dropout."""
    run.model.eval()
    loss = right = 0.0
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        # The last batch is filled up, so that one compiled program serves all.
        missing = batch - len(labels[part])
        padded = np.pad(images[part], ((0, missing), *[(0, 0)] * (images.ndim - 1)))
        marked = np.pad(labels[part].astype(np.int32), (0, missing), constant_values=-1)
        losses, rights = evaluation_step(run.model, padded, marked, to_input=run.to_input)
        loss, right = loss + float(losses), right + int(rights)
    run.model.train()
    return loss / len(labels), right / len(labels)


def batches(count: int, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order, int[steps, size]: a function of seed and epoch, and of nothing before.

    What is left over when `size` does not divide `count` is left out; another part in each epoch.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return order[: count - count % size].reshape(-1, size)


def train(
    run: Run,
    training: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    epochs: int,
    batch_size: int,
    columns: Sequence[str],
    reporter: Reporter,
) -> list[Row]:
    """Trains up to `epochs`, from the newest checkpoint on if there is one.

    An epoch ends with an evaluation on the test set, a row of the table, and a checkpoint. A run that
    was stopped and goes on from there gives the same bits as one that was not.

    Returns:
      The rows of all epochs, those before the checkpoint too.
    """
    images, labels = training
    with Checkpoints(run.checkpoints) as checkpoints:
        rows: list[Row] = []
        modules = {"model": run.model, "optimizer": run.optimizer}
        latest = checkpoints.latest()
        if latest is not None:
            checkpoints.restore(latest, modules)
            rows = checkpoints.notes(latest)["rows"]
            reporter.print(f"{run.name}: goes on from {checkpoints.path(latest)}")
        steps = len(labels) // batch_size
        reporter.begin(run.name, epochs * steps, done=len(rows) * steps)
        table = Table(run.directory / f"{run.name}.csv", columns, rows)
        for epoch in range(len(rows) + 1, epochs + 1):
            start = time.perf_counter()
            row = _train_epoch(run, images, labels, batch_size, epoch, reporter)
            row["test_loss"], row["test_accuracy"] = evaluate(run, *test)
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            table.append(row)
            checkpoints.save(epoch, modules, {"options": run.options, "rows": rows})
            left = (epochs - epoch) * statistics.median(r["seconds"] for r in rows)
            reporter.print(_line(row, epochs, left))
    return rows


def _train_epoch(
    run: Run, images: np.ndarray, labels: np.ndarray, batch_size: int, epoch: int, reporter: Reporter
) -> Row:
    order = batches(len(labels), batch_size, seed=run.seed, epoch=epoch)
    losses, accuracies, seconds = [], [], []
    for step, chosen in enumerate(order):
        epoch_end = jnp.asarray(step == len(order) - 1)
        start = time.perf_counter()
        result = train_step(
            run.model, run.optimizer, images[chosen], labels[chosen], epoch_end, to_input=run.to_input
        )
        loss, accuracy = (float(value) for value in result)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        accuracies.append(accuracy)
        recent = slice(max(0, step - 49), None)
        reporter.step(
            f"epoch {epoch}  loss {np.mean(losses[recent]):.3f}  "
            f"accuracy {np.mean(accuracies[recent]):.1%}"
        )
    densities = run.densities(run.model)
    if run.prunes:
        ilajax.optim.compact(run.model, run.optimizer)
    return {
        "net": run.name,
        "epoch": epoch,
        "train_loss": float(np.mean(losses)),
        "train_accuracy": float(np.mean(accuracies)),
        "live_weights": live_weights(run.model),
        **{f"density_{name}": density for name, density in densities.items()},
        # The first step of a process compiles; a median does not see it.
        "seconds_per_step": statistics.median(seconds),
    }


def live_weights(model: nnx.Module) -> int:
    """Weights of the convolution filters that have not been removed by pruning."""
    live = sum(int(conv.sparse_kernel.count) for _, conv in ilajax.nn.iter_convs(model))
    dense = (layer for _, layer in nnx.iter_graph(model) if isinstance(layer, nnx.Conv))
    return live + sum(layer.kernel.size for layer in dense)


def _line(row: Row, epochs: int, left: float) -> str:
    densities = "  ".join(
        f"{value:.1%}" for name, value in row.items() if name.startswith("density_")
    )
    return (
        f"{row['net']:>6}  epoch {row['epoch']}/{epochs}"
        f"  loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}"
        f"  test {row['test_accuracy']:.2%}"
        f"  densities {densities}"
        f"  live weights {row['live_weights']:,}"
        f"  {row['seconds_per_step'] * 1e3:.1f} ms a step"
        f"  {minutes(row['seconds'])} an epoch, {minutes(left)} left"
    )
