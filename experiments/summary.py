"""The summary of a run, sparse against dense: a table on the terminal, a section in a markdown file."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from experiments.frame import markdown_table, write_section
from experiments.training import Row, Run, live_weights

Cells = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A trained net.

    Attributes:
      run: what was trained.
      rows: one for each epoch.
      filter_weights: weights of its convolution filters before any pruning.
      activation_bytes: of all feature maps of a batch.
    """

    run: Run
    rows: Sequence[Row]
    filter_weights: int
    activation_bytes: int

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.rows[-1]["test_accuracy"]

    @property
    def live_weights(self) -> int:
        return live_weights(self.run.model)

    def median(self, column: str) -> float:
        """Over the epochs: one that something else disturbed, or that compiled, does not count."""
        return statistics.median(row[column] for row in self.rows)


def summary_cells(outcomes: Sequence[Outcome]) -> list[Cells]:
    """A head, then a line for each quantity: a column for each net, and how two compare."""

    def line(name: str, value: Callable[[Outcome], float], show: Callable[[float], str]) -> Cells:
        values = [value(outcome) for outcome in outcomes]
        cells = [show(v) for v in values]
        if len(values) == 2:
            first, second = values
            points = f"{(second - first) * 100:+.2f} points"
            cells.append(points if "accuracy" in name else f"x {second / first:.2f}")
        return (name, *cells)

    names = [outcome.run.name for outcome in outcomes]
    return [
        ("", *names, *([f"{names[1]} against {names[0]}"] if len(names) == 2 else [])),
        line("test accuracy", lambda o: o.test_accuracy, "{:.2%}".format),
        line("filter weights", lambda o: o.filter_weights, "{:,}".format),
        line("filter weights left", lambda o: o.live_weights, "{:,}".format),
        line("activations of a batch", lambda o: o.activation_bytes / 1e6, "{:.2f} MB".format),
        line("median step", lambda o: o.median("seconds_per_step") * 1e3, "{:.1f} ms".format),
        line("median epoch, tests included", lambda o: o.median("seconds"), "{:.1f} s".format),
    ]


def summary_table(cells: Sequence[Cells]) -> Table:
    """For the terminal."""
    table = Table()
    for at, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if at else "left")
    for line in cells[1:]:
        table.add_row(*line)
    return table


def write_report(
    path: Path, heading: str, notes: Sequence[str], outcomes: Sequence[Outcome]
) -> None:
    """Writes the summary, and the test accuracy after each epoch, as a section of a markdown file."""
    cells = summary_cells(outcomes)
    epochs = [("epoch", *(f"{o.run.name}: loss, test accuracy, seconds" for o in outcomes))]
    for rows in zip(*(o.rows for o in outcomes), strict=True):
        shown = [
            f"{r['train_loss']:.4f}, {r['test_accuracy']:.2%}, {r['seconds']:.1f}" for r in rows
        ]
        epochs.append((str(rows[0]["epoch"]), *shown))
    body = "\n".join([*notes, "", *markdown_table(cells), "", *markdown_table(epochs)])
    write_section(path, heading, body, title="MNIST")
