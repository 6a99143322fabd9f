"""The training loop of the classification experiments: steps, evaluation, checkpoints, history."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
      bounds: the density bound of each sparse layer, by name, to be shown beside its density.
      resumable: whether each epoch leaves a checkpoint, which a later call goes on from.
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
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    resumable: bool = True

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


def evaluate(
    step: Callable[..., Any], images: np.ndarray, labels: np.ndarray, batch: int = 250
) -> tuple[float, float]:
    """Mean loss and accuracy, by an `evaluation_step` that has its model and `to_input`."""
    batch = min(batch, len(labels))
    loss = right = 0.0
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        # The last batch is filled up with its last image, so that one compiled program serves all.
        missing = batch - len(labels[part])
        padded = np.pad(images[part], ((0, missing), *[(0, 0)] * (images.ndim - 1)), mode="edge")
        marked = np.pad(labels[part].astype(np.int32), (0, missing), constant_values=-1)
        losses, rights = step(padded, marked)
        loss, right = loss + float(losses), right + int(rights)
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
    test_batch: int = 250,
) -> list[Row]:
    """Trains up to `epochs`, from the newest checkpoint on if there is one.

    An epoch ends with an evaluation on the test set, a row of the table, and a checkpoint. A run that
    was stopped and goes on from there gives the same bits as one that was not.

    Returns:
      The rows of all epochs, those before the checkpoint too.
    """
    images, labels = training
    modules = {"model": run.model, "optimizer": run.optimizer}
    keeper = Checkpoints(run.checkpoints) if run.resumable else contextlib.nullcontext()
    with keeper as checkpoints:
        rows: list[Row] = []
        latest = checkpoints.latest() if checkpoints else None
        if checkpoints and latest is not None:
            checkpoints.restore(latest, modules)
            rows = checkpoints.notes(latest)["rows"]
            reporter.print(f"{run.name}: goes on from {checkpoints.path(latest)}")
        table = Table(run.directory / f"{run.name}.csv", columns, rows)
        step, test_step = _bound_steps(run)
        reporter.begin(run.name, *((n * (len(labels) // batch_size)) for n in (epochs, len(rows))))
        for epoch in range(len(rows) + 1, epochs + 1):
            start = time.perf_counter()
            order = batches(len(labels), batch_size, seed=run.seed, epoch=epoch)
            row = {"net": run.name, "epoch": epoch}
            row |= _train_epoch(step, images, labels, order, epoch, reporter)
            row |= {f"density_{layer}": d for layer, d in run.densities(run.model).items()}
            if run.prunes:
                ilajax.optim.compact(run.model, run.optimizer)
            row["live_weights"] = live_weights(run.model)
            row["test_loss"], row["test_accuracy"] = evaluate(test_step, *test, test_batch)
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            table.append(row)
            if checkpoints:
                checkpoints.save(epoch, modules, {"options": run.options, "rows": rows})
            reporter.print(_line(row, epochs, (epochs - epoch) * row["seconds"], run.bounds))
    return rows


def _bound_steps(run: Run) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`train_step` with dropout and `evaluation_step` without, which have their model and optimizer.

    Bound once, the modules need not be taken apart at every call: 2 ms of Python instead of 10. Their
    variables are shared, so that the modules of the run see every step.
    """
    run.model.eval()
    test_step = nnx.cached_partial(evaluation_step, run.model)
    run.model.train()
    step = nnx.cached_partial(train_step, run.model, run.optimizer)
    to_input = run.to_input
    return functools.partial(step, to_input=to_input), functools.partial(
        test_step, to_input=to_input
    )


def _train_epoch(
    step: Callable[..., Any],
    images: np.ndarray,
    labels: np.ndarray,
    order: np.ndarray,
    epoch: int,
    reporter: Reporter,
) -> Row:
    losses, accuracies, seconds = [], [], []
    for number, chosen in enumerate(order, 1):
        start = time.perf_counter()
        epoch_end = jnp.asarray(number == len(order))
        loss, accuracy = step(images[chosen], labels[chosen], epoch_end)
        losses.append(float(loss))
        accuracies.append(float(accuracy))
        seconds.append(time.perf_counter() - start)
        recent = f"{np.mean(losses[-50:]):.3f}  accuracy {np.mean(accuracies[-50:]):.1%}"
        reporter.step(f"epoch {epoch}  loss {recent}")
    return {
        "train_loss": float(np.mean(losses)),
        "train_accuracy": float(np.mean(accuracies)),
        # The first step of a process compiles; a median does not see it.
        "seconds_per_step": statistics.median(seconds),
    }


def live_weights(model: nnx.Module) -> int:
    """Weights of the convolution filters that have not been removed by pruning."""
    layers = [layer for _, layer in nnx.iter_graph(model)]
    sparse = sum(int(c.sparse_kernel.count) for c in layers if isinstance(c, ilajax.nn.Conv))
    return sparse + sum(c.kernel[...].size for c in layers if isinstance(c, nnx.Conv))


def _line(row: Row, epochs: int, left: float, bounds: Mapping[str, float]) -> str:
    shown = []
    for name, value in row.items():
        if name.startswith("density_"):
            bound = bounds.get(name.removeprefix("density_"))
            shown.append(f"{value:.1%}" + ("" if bound is None else f"/{bound:.0%}"))
    densities = " ".join(shown)
    return (
        f"{row['net']:>6} {row['epoch']}/{epochs}"
        f"  loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}"
        f"  test {row['test_accuracy']:.2%}"
        f"  densities {densities}"
        f"  live weights {row['live_weights']:,}"
        f"  {row['seconds_per_step'] * 1e3:.1f} ms a step"
        f"  {minutes(row['seconds'])} an epoch, {minutes(left)} left for this net"
    )
