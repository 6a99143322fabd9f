"""Runs that are killed: whether a training run that goes on after SIGKILL ends with the same bits.

    python -m experiments.kills --trials 20             # some minutes on two cores
    python -m experiments.kills --trials 20 --report    # writes experiments/results/kills.{md,json} too

Each trial starts `python -m experiments.mnist` on some hundred digits, with pruning and regulariser, kills
its process group, lets it go on by --resume, and compares its last checkpoint with that of a run that nobody
stopped: all arrays bit for bit, and the rows but for their times. It must have gone on from the checkpoint
that the kill left, as a run that starts anew ends with the same bits too. Every other trial waits for a
checkpoint to be on its way and kills within milliseconds. The others kill at any moment, most of them behind
the first checkpoint. Some are killed twice.
"""

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.timing import headline, provenance
from experiments import frame
from experiments.checkpoints import Checkpoints
from experiments.data.idx import write_idx
from experiments.data.mnist import load_mnist
from experiments.frame import Cells, summary_table

ROOT = Path(__file__).parents[1]
DIGITS, BATCH, EPOCHS, EVERY = 320, 8, 2, 5
STEPS = EPOCHS * (DIGITS // BATCH)
SETTING = [
    *("--nets", "sparse", "--density-bounds", "0.095", "--batch-size", str(BATCH)),
    *("--regularisation", "0.01", "--pruning-threshold", "0.02", "--epochs", str(EPOCHS)),
    *("--checkpoint-every", str(EVERY), "--budget", "0.01"),
]
WRITING = 0.05  # seconds that a checkpoint of this size is on its way
TWICE = 1 / 3  # of the trials
EARLY = 1 / 6  # of the kills at any moment: before the run has left a checkpoint
TIMES = ("seconds", "seconds_per_step")  # columns that no two runs have in common


class Kill(NamedTuple):
    """A run that was killed: after how long, behind which checkpoint, and which one was on its way."""

    seconds: float
    behind: int | None
    writing: int | None

    def __str__(self) -> str:
        at = "before the first checkpoint" if self.behind is None else f"behind step {self.behind}"
        return f"{at}, writing {self.writing}" if self.writing else at


class Trial(NamedTuple):
    """The kills of a trial, the lines of the resumed run about checkpoints, and what came out differently."""

    kills: list[Kill]
    said: list[str]
    difference: str | None

    def line(self, number: int) -> Cells:
        return (
            str(number),
            ", ".join(f"{kill.seconds:.1f} s" for kill in self.kills),
            "; ".join(map(str, self.kills)),
            "; ".join(self.said) or "starts anew",
            self.difference or SAME,
        )


SAME = "the same bits"
HEAD: Cells = ("trial", "killed after", "where", "the run that went on said", "came out")


def main(arguments: list[str] | None = None) -> list[Trial]:
    """Runs all trials; exits with status 1 if any came out differently."""
    options = _parser().parse_args(arguments)
    record: dict[str, Any] = provenance("experiments.kills", arguments)
    draw = random.Random(options.seed)
    trials: list[Trial] = []
    with frame.Reporter() as reporter, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reporter.print(headline(record))
        _write_digits(folder / "digits")
        # The first run fills the folder of compiled programs; all others read theirs from there.
        reference = folder / "reference"
        _whole(folder, reference)
        length = None
        if options.trials > 1:
            length = _whole(folder, folder / "again")
            if other := difference(reference, folder / "again"):
                raise RuntimeError(
                    f"two runs without a kill differ, so nothing can be said: {other}"
                )
            reporter.print(f"a second run without a kill: {SAME}; {sum(length):.1f} s")
        cells = [HEAD]
        for number in range(1, options.trials + 1):
            out = folder / str(number)
            trial = _trial(folder, out, draw, None if number % 2 else length)
            if trial.difference is None:
                trial = trial._replace(difference=difference(reference, out))
            trials.append(trial)
            cells.append(trial.line(number))
            reporter.print("  ".join(cells[-1]))
        reporter.print(summary_table(cells))
        kills = [kill for trial in trials for kill in trial.kills]
        record["counts"] = counts = {
            "trials": len(trials),
            "killed": len(kills),
            "while_writing": sum(kill.writing is not None for kill in kills),
            "before_first": sum(kill.behind is None for kill in kills),
            "different": sum(trial.difference is not None for trial in trials),
        }
        counted = (
            "Kills: {killed} in {trials} trials, {while_writing} of them while a checkpoint was being "
            "written, {before_first} before the first one was whole. Trials that came out differently: "
            "{different}."
        ).format(**counts)
        reporter.print(counted)
        record["trials"] = [
            {**trial._asdict(), "kills": [kill._asdict() for kill in trial.kills]}
            for trial in trials
        ]
        written = [options.out / "kills.md", options.out / "kills.json"]
        frame.write_json(written[1], record)
        counted = f"{STEPS} steps, a checkpoint after every {EVERY}. {counted}"
        head = ("# Kills", f"`{record['command']}`", f"{headline(record)}.")
        frame.write_page(written[0], *head, counted, cells)
        frame.publish(reporter, written, options.report, "kills")
    if different := counts["different"]:
        raise SystemExit(f"error: {different} of {options.trials} trials came out differently")
    return trials


def difference(reference: Path, out: Path) -> str | None:
    """The first thing in which a run's newest checkpoint differs from the reference's, or None."""
    if leftovers := _leftovers(out):
        return f"{leftovers[0].name} is left"
    (want_number, want, want_notes), (number, have, notes) = map(_newest, (reference, out))
    if number != want_number:
        return f"the newest checkpoint is {number}, not {want_number}"
    if have.keys() != want.keys():
        return f"only one has {min(have.keys() ^ want.keys())}"
    for name, array in want.items():
        if have[name].dtype != array.dtype or have[name].tobytes() != array.tobytes():
            return f"{name} differs"
    return None if notes == want_notes else "the rows differ"


def wrong_start(behind: int | None, lines: Sequence[str], checkpoints: Path) -> str | None:
    """What a run did instead of going on from the checkpoint that the last kill left; None: it did."""
    folder = re.escape(str(checkpoints))
    text = "\n".join(lines)
    # Lines of `Checkpoints.restore_newest` and of `training.train`.
    torn = re.findall(rf"^the checkpoint {folder}/(\d+) cannot be read ", text, re.MULTILINE)
    starts = re.findall(rf"^\S+: goes on from {folder}/(\d+)$", text, re.MULTILINE)
    # An older one will do where the newest is torn, and only there.
    known = str(behind) in starts or (str(behind) in torn and any(int(s) < behind for s in starts))
    if behind is None or known:
        return None
    did = f"it went on from {starts[0]}" if starts else "it started anew"
    return f"{did}, but there was checkpoint {behind}"


def _newest(out: Path) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """Number, arrays and notes of a run's newest checkpoint, without times."""
    with Checkpoints(_checkpoints(out), read_only=True) as checkpoints:
        number = checkpoints.numbers()[0]
        notes = checkpoints.notes(number)
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in notes["rows"]]
        return number, jax.device_get(checkpoints.arrays(number)), notes | {"rows": rows}


def _whole(folder: Path, out: Path) -> tuple[float, float]:
    """A run that nobody stops: its seconds before it has left a checkpoint, and from there on."""
    began = time.perf_counter()
    with _running(folder, out, resume=False) as process:
        _wait(process, lambda: _newest_number(out) is not None)
        first = time.perf_counter()
        status = process.wait()
    _check(status, out)
    return first - began, time.perf_counter() - first


def _check(status: int, out: Path) -> None:
    if status:
        raise RuntimeError(
            f"a run without a kill ended with status {status}:\n{(out / 'log').read_text()}"
        )


def _checkpoints(out: Path) -> Path:
    """The folder of the checkpoints of the only net, or one that does not exist while there is none."""
    return next((out / "checkpoints").glob("[!.]*"), out / "checkpoints")


def _trial(
    folder: Path, out: Path, draw: random.Random, length: tuple[float, float] | None
) -> Trial:
    """Kills a run once or twice, at any moment of its `length`, or else while it writes a checkpoint."""
    count = 1 + (draw.random() < TWICE)
    kills: list[Kill] = []
    # The second kill falls away where the last checkpoint was there.
    while not kills or (len(kills) < count and (_newest_number(out) or 0) < STEPS):
        if kill := _killed(folder, out, draw, length, resume=bool(kills)):
            kills.append(kill)
        else:  # the run has ended first
            kills = []
            shutil.rmtree(out)
    status, lines = _ended(folder, out)
    checkpoints = _checkpoints(out)
    said = [line.replace(f"{checkpoints}/", "") for line in lines if "goes on from" in line]
    said = [line.removeprefix(f"{checkpoints.name}: ") for line in said]
    failed = wrong_start(kills[-1].behind, lines, checkpoints)
    if status:
        failed = f"status {status}: {lines[-1] if lines else 'no word'}"
    return Trial(kills, said, failed)


def _killed(
    folder: Path,
    out: Path,
    draw: random.Random,
    length: tuple[float, float] | None,
    *,
    resume: bool,
) -> Kill | None:
    """Starts a run and kills it; None where it ended first."""
    before = _newest_number(out) or 0
    with _running(folder, out, resume=resume) as process:
        began = time.perf_counter()
        if length is None:
            number = draw.randrange(before + EVERY, STEPS + 1, EVERY)
            name = f"checkpoints/*/{number}{ocp.utils.TMP_DIR_SUFFIX}*"
            _wait(process, lambda: any(out.glob(name)))
            time.sleep(draw.uniform(0, WRITING))
        elif draw.random() < EARLY:
            _wait(process, seconds=draw.uniform(0, length[0]))
        else:
            _wait(process, lambda: (_newest_number(out) or 0) > before)
            _wait(process, seconds=draw.uniform(0, length[1] * (1 - before / STEPS)))
    if process.returncode != -signal.SIGKILL:
        _check(process.returncode, out)
        return None
    leftovers = _leftovers(out)
    writing = int(leftovers[0].name.partition(".")[0]) if leftovers else None
    return Kill(time.perf_counter() - began, _newest_number(out), writing)


def _ended(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Lets a run go on until it ends; its exit status, and the lines it printed."""
    with _running(folder, out, resume=True) as process:
        status = process.wait()
    return status, (out / "log").read_text().splitlines()


@contextlib.contextmanager
def _running(folder: Path, out: Path, *, resume: bool) -> Iterator["subprocess.Popen[bytes]"]:
    """A run in a process group of its own, which is killed at the end where it has not ended."""
    arguments = [*SETTING, "--data-dir", str(folder / "digits"), "--out", str(out)]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    out.mkdir(exist_ok=True)
    with (out / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.mnist", *arguments, *["--resume"] * resume],
            cwd=ROOT,
            env=os.environ | compiled,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(
    process: "subprocess.Popen[bytes]",
    until: Callable[[], bool] = lambda: False,
    seconds: float = math.inf,
) -> None:
    end = time.perf_counter() + seconds
    while process.poll() is None and time.perf_counter() < end and not until():
        time.sleep(0.0005)


def _leftovers(out: Path) -> list[Path]:
    """Checkpoints that are not complete."""
    return list(_checkpoints(out).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))


def _newest_number(out: Path) -> int | None:
    """That of the newest complete checkpoint, read off the names: nothing is opened, nothing removed."""
    names = (path.name for path in _checkpoints(out).glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _write_digits(folder: Path) -> None:
    folder.mkdir()
    for part, digits, count in zip(("train", "t10k"), load_mnist(), (DIGITS, 40), strict=True):
        write_idx(folder / f"{part}-images-idx3-ubyte", digits.images[:count])
        write_idx(folder / f"{part}-labels-idx1-ubyte", digits.labels[:count])


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.kills", __doc__)
    add = parser.add_argument
    add("--trials", type=frame.positive_int, default=20, metavar="N", help="runs to be killed")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of the moments of the kills")
    frame.add_out(parser, "runs/kills")
    frame.add_report(parser, "kills.md and kills.json")
    return parser


if __name__ == "__main__":
    frame.run(main, resumes=False)
