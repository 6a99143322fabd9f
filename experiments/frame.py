"""What experiments and benchmarks share: command lines, tables, and progress on a terminal or in a log."""

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

# Files of figures that the documentation quotes.
RESULTS = Path("experiments/results")

# A line of a table; the first one is its head.
Cells = tuple[str, ...]


def number(
    kind: type[int] | type[float], holds: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """An argparse type: a finite number for which `holds`, else an error that says what is expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


positive_int = number(int, lambda n: n >= 1, "a whole number of at least 1")
whole = number(int, lambda n: n >= 0, "a whole number of at least 0")
seed = number(int, lambda n: 0 <= n < 2**32, "a whole number in [0, 2**32)")
positive = number(float, lambda v: v > 0, "a number above 0")
not_negative = number(float, lambda v: v >= 0, "a number of at least 0")
density_bound = number(float, lambda v: 0 < v <= 1, "a share of the sites in (0, 1]")


def parser(module: str, doc: str) -> argparse.ArgumentParser:
    """The parser of `python -m <module>`, described by the first line of its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_out(parser: argparse.ArgumentParser, default: Path | str) -> None:
    """Adds --out DIR."""
    help = "folder for all that is written; a new run replaces an earlier one's"
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR", help=help)


def add_resolutions(
    parser: argparse.ArgumentParser, default: Sequence[int], choices: Sequence[int] | None = None
) -> None:
    """Adds --resolutions R..., all numbers or some."""
    many = {"type": positive_int, "nargs": "+", "metavar": "R", "choices": choices}
    help = "of each of the three axes"
    parser.add_argument("--resolutions", default=list(default), help=help, **many)


def run(main: Callable[[], object], *, resumes: bool = True) -> None:
    """Calls the `main` of an experiment for the shell: what a user can mend is a line, no traceback.

    A run that is stopped says how to go on, if it `resumes`.
    """
    try:
        main()
    except KeyboardInterrupt:
        how = "; --resume goes on from the last checkpoint" if resumes else ""
        raise SystemExit(f"stopped{how}") from None
    except OSError as error:
        raise SystemExit(f"error: {error}") from None


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes a CSV file in one move: written after each row, it keeps what a killed run measured."""
    with replacing(path) as fresh, fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write, which becomes `path` in one move: a reader never sees half of it.

    After an `OSError`, which names `path`, an old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with named(path):
        try:
            yield fresh
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Lets an `OSError` name the file: one of a write, as on a full disk, does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: it has words of its own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class Reporter:
    """Progress: a live bar on a terminal, nothing but the printed lines in a log.

    Use it as a context manager around the whole run.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            _TimeLeft(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def print(self, content: Any) -> None:
        """Prints a line or a rich object above the bar; a line is not wrapped, for logs to be searched."""
        self.console.print(content, soft_wrap=isinstance(content, str), highlight=False)

    def begin(self, name: str, total: int, done: int, *, after: int = 0) -> None:
        """Shows a bar of `total` steps, of which `done` are behind; the time left counts `after` more."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(name, total=total, completed=done, status="", after=after)

    def step(self, status: str) -> None:
        for task in self._bar.task_ids:
            self._bar.update(task, advance=1, status=status)


class _TimeLeft(ProgressColumn):
    """The time left at the present speed, for the bar's steps and those that come after it."""

    max_refresh = 0.5  # seconds: digits that change faster cannot be read

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        steps = (task.remaining or 0) + task.fields["after"]
        return Text(f"{minutes(steps / speed)} left" if speed else "")


def minutes(seconds: float) -> str:
    """Seconds as m:ss."""
    rounded = round(seconds)
    return f"{rounded // 60}:{rounded % 60:02d}"


def write_section(path: Path, heading: str, body: str, *, title: str) -> None:
    """Writes a section of a markdown file, in place of one with the same heading if there is any."""
    first, *others = path.read_text().split("\n## ") if path.exists() else [f"# {title}\n"]
    sections = {other.partition("\n")[0]: other for other in others}
    sections[heading] = f"{heading}\n\n{body}"
    write_text(path, "\n\n## ".join(s.strip() for s in (first, *sections.values())) + "\n")


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """A head and its lines as those of a markdown table; the first column stands left, the others right."""
    head, *body = cells
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]


def summary_table(cells: Sequence[Cells]) -> RichTable:
    """A head and its lines for the terminal."""
    table = RichTable()
    for at, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if at else "left")
    for line in cells[1:]:
        table.add_row(*line)
    return table


def add_report(parser: argparse.ArgumentParser, files: str, folder: Path = RESULTS) -> None:
    """Adds --report [DIR], by default `folder`."""
    help = f"write {files} to this folder, {folder} where none is named"
    parser.add_argument("--report", type=Path, nargs="?", const=folder, metavar="DIR", help=help)


def report(folder: Path, stem: str, written: Sequence[Path]) -> list[Path]:
    """Copies the files of a run that has ended to `folder`, under the name `stem`; returns the copies.

    A file that is there already, as where the run wrote to `folder` itself, gets none.
    """
    copies = []
    for path in written:
        copy = folder / f"{stem}{path.suffix}"
        if copy.exists() and copy.samefile(path):
            continue
        with replacing(copy) as fresh:
            shutil.copyfile(path, fresh)
        copies.append(copy)
    return copies


def earlier(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on by --resume; ValueError: it is damaged, or of other options."""
    try:
        record = json.loads(path.read_text())
        made_with, _ = record["options"], record["rows"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--resume: {path} is damaged ({type(error).__name__}: {error}). Start anew without --resume."
        ) from None
    if made_with != options:
        raise ValueError(f"--resume: {path} was made with {made_with}, not with {options}")
    return record


def publish(reporter: Reporter, written: Sequence[Path], folder: Path | None, stem: str) -> None:
    """Copies what a run wrote to the folder of --report, if there is one, and says what is written."""
    copies = report(folder, stem, written) if folder else []
    reporter.print("wrote " + ", ".join(map(str, [*written, *copies])))


def write_page(path: Path, *blocks: str | Sequence[Cells]) -> None:
    """Writes a markdown file of paragraphs and tables."""
    texts = [b if isinstance(b, str) else "\n".join(markdown_table(b)) for b in blocks]
    write_text(path, "\n\n".join(texts) + "\n")


def save_figure(figure: Any, path: Path, *, dpi: int = 160) -> None:
    """Writes a picture in one move; the name's ending chooses the format."""
    with replacing(path) as fresh:
        figure.savefig(fresh, format=path.suffix[1:], dpi=dpi, facecolor="white")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one move; an `OSError` names it."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one move; an `OSError` names it."""
    with replacing(path) as fresh:
        fresh.write_text(text)
