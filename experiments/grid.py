"""A grid of settings: networks that are trained one after the other, and go on where they were stopped."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scipy.stats import t as student

from experiments import frame
from experiments.checkpoints import check_options, remove_checkpoints
from experiments.data.loader import Source
from experiments.training import Row, Run, checkpoint_directory, train


class Setting(Protocol):
    """What one network of a grid is trained with."""

    @property
    def name(self) -> str:
        """What its rows, table and checkpoints are called."""

    @property
    def seed(self) -> int: ...


class Trained(NamedTuple):
    """What became of a setting: its net, and a row for each epoch."""

    setting: Any
    run: Run
    rows: list[Row]


def add_training(
    parser: argparse.ArgumentParser, *, epochs: int, out: str, of_seed: str, resumes: bool = True
) -> None:
    """Adds --epochs, --batch-size, --seed, --seeds, --workers and --out, and what goes with checkpoints.

    Those are --checkpoint-every and --resume, unless a run cannot be gone on with.
    """
    add, positive = parser.add_argument, frame.positive_int
    add("--epochs", type=positive, default=epochs, metavar="N", help="epochs")
    add("--batch-size", type=positive, default=32, metavar="N", help="samples a step")
    add("--seed", type=frame.seed, default=0, metavar="N", help=of_seed)
    seeds = "train every net so often, with seeds from --seed on"
    add("--seeds", type=positive, default=1, metavar="N", help=seeds)
    workers = "processes that make the batches; 0: this one does"
    add("--workers", type=frame.whole, default=0, metavar="N", help=workers)
    frame.add_out(parser, out)
    if not resumes:
        parser.set_defaults(checkpoint_every=None, resume=False)
        return
    every = "leave a checkpoint after so many steps too; by default at the ends of epochs only"
    add("--checkpoint-every", type=positive, metavar="STEPS", help=every)
    resume = "go on from the newest checkpoints in --out that can be read, if there are any"
    add("--resume", action="store_true", help=resume)


def seeds(options: argparse.Namespace) -> range:
    """The seeds of --seed and --seeds; ValueError: they go beyond what a seed can be."""
    found = range(options.seed, options.seed + options.seeds)
    if found[-1] >= 2**32:
        raise ValueError(
            f"--seeds {options.seeds} from --seed {options.seed} on go beyond 2**32 - 1."
        )
    return found


def prepare(options: argparse.Namespace, settings: Iterable[Setting], fixed: Row) -> None:
    """Makes --out ready: without --resume old checkpoints go, and with it they must fit.

    Raises ValueError that names the option of `fixed`, what changes the bits of a run, where one does not.
    """
    for setting in settings:
        checkpoints = checkpoint_directory(options.out, setting.name)
        if options.resume:
            check_options(checkpoints, fixed)
        else:
            remove_checkpoints(checkpoints)
    options.out.mkdir(parents=True, exist_ok=True)


def train_all(
    settings: Sequence[Any],
    make: Callable[[Any], Run],
    data: Callable[[Any], tuple[Source, Any]],
    options: argparse.Namespace,
    reporter: frame.Reporter,
    *,
    table: Path,
    row: Callable[[Trained], Row],
    test_batch: int = 250,
) -> list[Trained]:
    """Trains the net of each setting, in their order, by `training.train`.

    Args:
      settings: a `Setting` for each net.
      make: the net of a setting, and how it is trained.
      data: the samples that a setting trains on, and the inputs and labels that it is tested on.
      options: of `add_training`.
      reporter: gets a line for each epoch.
      table: a CSV file that gets a line for each net, once it is trained,
      row: which is this.
      test_batch: samples of a step of the evaluation.
    """
    trained: list[Trained] = []
    for setting in settings:
        run = make(setting)
        rows = train(
            run,
            *data(setting),
            epochs=options.epochs,
            batch_size=options.batch_size,
            reporter=reporter,
            test_batch=test_batch,
            workers=options.workers,
            checkpoint_every=options.checkpoint_every,
            epochs_after=options.epochs * (len(settings) - len(trained) - 1),
        )
        trained.append(Trained(setting, run, rows))
        lines = [row(each) for each in trained]
        frame.write_table(table, list(lines[0]), lines)
    return trained


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of paired differences, by Student's t; None of fewer than two."""
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    half = student.ppf(0.975, len(differences) - 1) * statistics.stdev(differences)
    half /= len(differences) ** 0.5
    return mean - half, mean + half
