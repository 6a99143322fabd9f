"""What the experiments share: argument types, a CSV table, and progress on a terminal or in a log."""

import argparse
import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Files of figures that the documentation quotes.
RESULTS = Path("experiments/results")


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
seed = number(int, lambda n: 0 <= n < 2**32, "a whole number in [0, 2**32)")
positive = number(float, lambda v: v > 0, "a number above 0")
not_negative = number(float, lambda v: v >= 0, "a number of at least 0")
density_bound = number(float, lambda v: 0 < v <= 1, "a share of the sites in (0, 1]")


class Table:
    """A CSV file that is complete after every row, so that a killed run leaves what it measured."""

    def __init__(self, path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]] = ()):
        """Starts the file anew with a header and `rows`."""
        self.path = path
        self._columns = list(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Rows of a resumed run are replaced in one move: a kill in between loses none.
        fresh = path.with_suffix(".tmp")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(fresh, path)

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)


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
            TimeRemainingColumn(),
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

    def begin(self, name: str, total: int, done: int) -> None:
        """Shows a bar of `total` steps, of which `done` are behind."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(name, total=total, completed=done, status="")

    def step(self, status: str) -> None:
        for task in self._bar.task_ids:
            self._bar.update(task, advance=1, status=status)


def minutes(seconds: float) -> str:
    """Seconds as m:ss."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def write_section(path: Path, heading: str, body: str, *, title: str) -> None:
    """Writes a section of a markdown file, in place of one with the same heading if there is any."""
    sections = path.read_text().split("\n## ") if path.exists() else [f"# {title}\n"]
    section = f"{heading}\n\n{body.strip()}\n"
    for at, other in enumerate(sections):
        if at and other.partition("\n")[0] == heading:
            sections[at] = section
            break
    else:
        sections.append(section)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n## ".join(s.strip() for s in sections) + "\n")


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """A head and its lines as those of a markdown table; the first column stands left, the others right."""
    head, *body = cells
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]


def add_report(parser: argparse.ArgumentParser, files: str) -> None:
    """Adds --report [DIR]; without a folder it is `RESULTS`."""
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="DIR",
        help=f"write {files} to this folder, {RESULTS} where none is named",
    )


def report(folder: Path, stem: str, written: Sequence[Path]) -> list[Path]:
    """Copies the files of a run that has ended to `folder`, under the name `stem`."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / f"{stem}{path.suffix}" for path in written]
    for path, copy in zip(written, copies, strict=True):
        shutil.copyfile(path, copy)
    return copies


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one move, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(fresh, path)
