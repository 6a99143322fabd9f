"""Tables, sections and progress."""

import csv
import io

from rich.console import Console

from experiments.frame import Reporter, Table, minutes, write_section


def test_a_table_is_complete_after_every_row(tmp_path):
    path = tmp_path / "new" / "table.csv"
    table = Table(path, ["epoch", "loss", "density"], [{"epoch": 1, "loss": 0.5}])
    for epoch in (2, 3):
        table.append({"epoch": epoch, "loss": 1 / 3, "density": 0.25})
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == [str(n) for n in range(1, epoch + 1)]
    assert rows[0]["density"] == ""
    assert float(rows[2]["loss"]) == 1 / 3


def test_a_section_replaces_the_one_with_its_heading(tmp_path):
    path = tmp_path / "results" / "report.md"
    write_section(path, "A", "first", title="Title")
    write_section(path, "B", "second", title="Title")
    write_section(path, "A", "third", title="Title")
    assert path.read_text() == "# Title\n\n## A\n\nthird\n\n## B\n\nsecond\n"


def test_a_log_gets_whole_lines_and_no_bar():
    output = io.StringIO()
    with Reporter(Console(file=output, force_terminal=False, width=40)) as reporter:
        reporter.begin("sparse", total=3, done=1)
        reporter.step("loss 1.0")
        reporter.print("a line longer than the forty columns that this console has")
    assert output.getvalue() == "a line longer than the forty columns that this console has\n"


def test_a_terminal_gets_a_bar():
    output = io.StringIO()
    with Reporter(Console(file=output, force_terminal=True, width=120)) as reporter:
        reporter.begin("sparse", total=3, done=1)
        reporter.step("loss 1.0")
    shown = output.getvalue()
    assert "sparse" in shown
    assert "2/3" in shown
    assert "loss 1.0" in shown


def test_minutes():
    assert [minutes(s) for s in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "60:00"]
