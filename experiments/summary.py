"""Tables on the terminal."""

from collections.abc import Sequence

from rich.table import Table

# A line; the first one of a table is its head.
Cells = tuple[str, ...]


def summary_table(cells: Sequence[Cells]) -> Table:
    """For the terminal."""
    table = Table()
    for at, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if at else "left")
    for line in cells[1:]:
        table.add_row(*line)
    return table
