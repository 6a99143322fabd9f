"""The training loop of the classification experiments: steps, evaluation, checkpoints, history."""

import contextlib
import dataclasses
import functools
import operator
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.data.loader import Batch, Source, feed
from experiments.frame import Reporter, minutes, write_table

# Turns a batch of images into what the net takes; hashable, as it is static under jit.
ToInput = Callable[[jax.Array], Any]
Row = dict[str, Any]
# Turns logits and labels into the mean loss and the share that is told right; hashable, static under jit.
Score = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# Loss, accuracy, seconds, voxels that did not fit (None where nothing can be cut), and what is watched, as
# JSON takes them.
Step = list[Any]


class Judge(NamedTuple):
    """How a network is tested, in place of `evaluation_step` and `evaluate`."""

    step: Callable[..., Any]  # jitted, takes the model, inputs and labels, and `to_input` by name
    row: Callable[[Callable[..., Any], Any, np.ndarray, int], Row]  # of what `evaluate` takes


def score_images(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `Score` of one label for each sample, [B, C] and [B]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.mean(jnp.argmax(logits, axis=1) == labels)


SMOOTHING = 0.2  # of labels: the share that goes to all classes alike


def smoothed(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `Score` of a step: the mean loss against smoothed labels, and the share that is told right."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), SMOOTHING)
    right = jnp.argmax(logits, axis=1) == labels
    return optax.softmax_cross_entropy(logits, targets).mean(), jnp.mean(right)


@dataclasses.dataclass(frozen=True)
class Run:
    """One network to be trained; its layers go by name in `densities` and `bounds`."""

    name: str  # of its rows, lines and checkpoints
    model: nnx.Module  # turns `to_input(images)` into logits
    optimizer: nnx.Optimizer  # `update` gets `excess_density` and `epoch_end`
    to_input: ToInput
    directory: Path  # gets `<name>.csv` and the checkpoints
    seed: int  # of the order of the training data
    densities: Callable[[nnx.Module], dict[str, float]] = lambda _: {}  # read off after a step
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # beside densities
    # Read off after every step, as means over an epoch.
    watch: Callable[[nnx.Module], dict[str, float]] | None = None
    # Called after each epoch's steps with its number, the densities having been read: to prune, say.
    after_epoch: Callable[[nnx.Module, nnx.Optimizer, int], None] | None = None
    options: Row | None = None  # what a checkpoint must fit, by option; None: no checkpoints
    score: Score = score_images  # of a training step
    judge: Judge | None = None  # None: by loss and accuracy, which its own row must have too

    @property
    def checkpoints(self) -> Path:
        return checkpoint_directory(self.directory, self.name)


def as_it_is(x: Any) -> Any:
    """A `ToInput` for batches that are inputs already."""
    return x


def compact(model: nnx.Module, optimizer: nnx.Optimizer, epoch: int) -> None:
    """An `after_epoch` that takes pruned weights out of storage."""
    del epoch
    ilajax.optim.compact(model, optimizer)


def checkpoint_directory(directory: Path, name: str) -> Path:
    return directory / "checkpoints" / name


@functools.partial(
    nnx.jit, static_argnames=("to_input", "score"), donate_argnames=("model", "optimizer")
)
def train_step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    labels: jax.Array,
    epoch_end: jax.Array,
    *,
    to_input: ToInput,
    score: Score = score_images,
) -> tuple[jax.Array, jax.Array]:
    """One step of gradient descent; returns the mean loss and the share of images told right."""

    def loss_of(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
        return score(model(to_input(images)), labels)

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
    step: Callable[..., Any], inputs: Any, labels: np.ndarray, batch: int = 250
) -> tuple[float, float]:
    """Mean loss and accuracy, by an `evaluation_step` that has its model and `to_input`.

    The inputs are an array or a pytree of arrays [N, ...].
    """
    loss, right = totals(step, inputs, labels, batch)
    return float(loss) / len(labels), float(right) / len(labels)


def totals(
    step: Callable[..., Any], inputs: Any, labels: np.ndarray, batch: int
) -> list[np.ndarray]:
    """What a step returns for some samples, summed over all of them, in float64; labels are [N, ...]."""
    batch = min(batch, len(labels))
    parts = []
    for start in range(0, len(labels), batch):
        places = np.arange(start, start + batch)
        # The last batch is filled up with its last image, so that one compiled program serves all.
        chosen = places.clip(max=len(labels) - 1)
        marked = labels[chosen].astype(np.int32)
        marked[places >= len(labels)] = -1
        found = step(jax.tree.map(operator.itemgetter(chosen), inputs), marked)
        parts.append([np.asarray(each, np.float64) for each in found])
    return [sum(each) for each in zip(*parts, strict=True)]


def train(
    run: Run,
    training: Source,
    test: tuple[Any, np.ndarray],
    *,
    epochs: int,
    batch_size: int,
    reporter: Reporter,
    test_batch: int = 250,
    workers: int = 0,
    checkpoint_every: int | None = None,
    epochs_after: int = 0,
) -> list[Row]:
    """Trains up to `epochs`, from the newest checkpoint that can be read if there is one.

    An epoch ends with an evaluation on the test set, a row of the table, and a checkpoint. A run that
    was stopped and goes on from there gives the same bits as one that was not, with any number of workers.

    Args:
      run: the network.
      training: the samples to train on.
      test: inputs and labels, ready for the evaluation.
      epochs: how many in all.
      batch_size: samples of a step; `test_batch` of one of the evaluation.
      reporter: gets a line for each epoch.
      workers: processes that make the batches; 0: this one does.
      checkpoint_every: steps after which an epoch leaves a checkpoint on its way too.
      epochs_after: epochs of the nets that are trained after this one, counted in the time left as if they
        took as long as this one's.

    Returns the rows of all epochs, those before the checkpoint too. It raises CheckpointError if a checkpoint
    cannot be written or gone on from, and ValueError if it was made for another network.
    """
    modules = {"model": run.model, "optimizer": run.optimizer}
    steps = len(training) // batch_size
    with contextlib.ExitStack() as stack:  # closes the checkpoints, and the worker processes
        rows: list[Row] = []
        so_far: list[Step] = []  # of the epoch that is under way
        checkpoints = None
        if run.options is not None:
            checkpoints = stack.enter_context(Checkpoints(run.checkpoints))
            rows, so_far = _restored(run, checkpoints, modules, epochs, reporter)
        step, test_step = _bound_steps(run)
        done = len(rows) * steps + len(so_far)
        reporter.begin(run.name, epochs * steps, done, after=epochs_after * steps)

        def save() -> None:
            if checkpoints:
                taken = len(rows) * steps + len(so_far)
                notes = {"options": run.options, "rows": rows, "so_far": so_far}
                checkpoints.save(taken, modules, notes)

        fed = feed(training, batch_size, seed=run.seed, epochs=epochs, start=done, workers=workers)
        stack.enter_context(contextlib.closing(fed))
        for epoch in range(len(rows) + 1, epochs + 1):
            # An epoch that was begun before a stop has taken the time of those steps too.
            start = time.perf_counter() - sum(taken[2] for taken in so_far)
            for number in range(len(so_far) + 1, steps + 1):
                so_far.append(_timed_step(step, fed, last=number == steps))
                if run.watch:
                    so_far[-1] += run.watch(run.model).values()
                recent = np.mean([taken[:2] for taken in so_far[-50:]], axis=0)
                reporter.step(f"epoch {epoch}  loss {recent[0]:.3f}  accuracy {recent[1]:.1%}")
                if checkpoint_every and number % checkpoint_every == 0 and number < steps:
                    save()
            row = {"net": run.name, "epoch": epoch} | _summed(so_far)
            if run.watch:
                means = np.mean([taken[4:] for taken in so_far], axis=0)
                row |= zip(run.watch(run.model), means.tolist(), strict=True)
            densities = run.densities(run.model)
            if run.after_epoch:
                run.after_epoch(run.model, run.optimizer, epoch)
            if run.judge:
                row |= run.judge.row(test_step, *test, test_batch)
            else:
                row["test_loss"], row["test_accuracy"] = evaluate(test_step, *test, test_batch)
            row["live_weights"] = live_weights(run.model)
            row |= {f"density_{layer}": density for layer, density in densities.items()}
            # The first step of a process compiles; a median does not see it.
            row["seconds_per_step"] = statistics.median(taken[2] for taken in so_far)
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            so_far = []
            write_table(run.directory / f"{run.name}.csv", list(row), rows)
            save()
            left = (epochs - epoch + epochs_after) * row["seconds"]
            reporter.print(_line(row, epochs, left, run.bounds))
    return rows


def _restored(
    run: Run, checkpoints: Checkpoints, modules: Any, epochs: int, reporter: Reporter
) -> tuple[list[Row], list[Step]]:
    """The rows of the newest checkpoint, whose weights are put back, and the steps of a begun epoch."""
    latest = checkpoints.restore_newest(modules, reporter.print)
    if latest is None:
        return [], []
    notes = checkpoints.notes(latest)
    rows, so_far = notes["rows"], notes["so_far"]
    begun = len(rows) + bool(so_far)
    if begun > epochs:
        raise CheckpointError(
            f"--epochs {epochs}, but the checkpoint {checkpoints.path(latest)} has {begun}. Give at "
            f"least that, or start anew without --resume."
        )
    reporter.print(f"{run.name}: goes on from {checkpoints.path(latest)}")
    return rows, so_far


def _bound_steps(run: Run) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`train_step` with dropout and `evaluation_step` without, which have their model and optimizer.

    A run with a judge has its step in place of the latter. Bound once, the modules need not be taken apart at
    every call: 2 ms of Python instead of 10. Their variables are shared, so that the modules of the run see
    every step.
    """
    run.model.eval()
    test_step = nnx.cached_partial(run.judge.step if run.judge else evaluation_step, run.model)
    run.model.train()
    step = nnx.cached_partial(train_step, run.model, run.optimizer)
    return (
        functools.partial(step, to_input=run.to_input, score=run.score),
        functools.partial(test_step, to_input=run.to_input),
    )


def _timed_step(step: Callable[..., Any], fed: Iterator[Batch], *, last: bool) -> Step:
    start = time.perf_counter()
    batch = next(fed)
    loss, accuracy = step(batch.inputs, batch.labels, jnp.asarray(last))
    cut = None if batch.overflow is None else int(batch.overflow.sum())
    return [float(loss), float(accuracy), time.perf_counter() - start, cut]


def _summed(steps: Sequence[Step]) -> Row:
    """What an epoch's steps tell."""
    losses, accuracies, _, cut = zip(*(taken[:4] for taken in steps), strict=True)
    row = {"train_loss": float(np.mean(losses)), "train_accuracy": float(np.mean(accuracies))}
    return row if cut[0] is None else row | {"voxels_cut": sum(cut)}


def live_weights(model: nnx.Module) -> int:
    """Weights of the convolution filters that have not been removed by pruning."""
    layers = [layer for _, layer in nnx.iter_graph(model)]
    sparse = sum(int(c.sparse_kernel.count) for c in layers if isinstance(c, ilajax.nn.Conv))
    return sparse + sum(c.kernel[...].size for c in layers if isinstance(c, nnx.Conv))


def _line(row: Row, epochs: int, left: float, bounds: Mapping[str, float]) -> str:
    densities = " ".join(
        f"{value:.1%}" + (f"/{bounds[layer]:.0%}" if layer in bounds else "")
        for name, value in row.items()
        if (layer := name.removeprefix("density_")) != name
    )
    iou = f"  mean IoU {row['test_mean_iou']:.2%}" if "test_mean_iou" in row else ""
    cut = f"  {row['voxels_cut']:,} voxels cut" if row.get("voxels_cut") else ""
    return (
        f"{row['net']:>6} {row['epoch']}/{epochs}"
        f"  loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}"
        f"  test {row['test_accuracy']:.2%}"
        f"{iou}"
        f"  densities {densities}"
        f"  live weights {row['live_weights']:,}"
        f"{cut}"
        f"  {row['seconds_per_step'] * 1e3:.1f} ms a step"
        f"  {minutes(row['seconds'])} an epoch, about {minutes(left)} left"
    )
