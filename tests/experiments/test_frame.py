"""Tables, sections and progress."""

import csv
import errno
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments import frame
from experiments.checkpoints import CheckpointError
from experiments.frame import Reporter, minutes, write_json, write_section, write_table


def test_a_table_replaces_the_one_before(tmp_path):
    path = tmp_path / "new" / "table.csv"
    rows = [{"epoch": 1, "loss": 0.5}]
    for epoch in (2, 3):
        rows.append({"epoch": epoch, "loss": 1 / 3, "density": 0.25})
        write_table(path, ["epoch", "loss", "density"], rows)
        with path.open() as file:
            read = list(csv.DictReader(file))
        assert [row["epoch"] for row in read] == [str(n) for n in range(1, epoch + 1)]
    assert read[0]["density"] == ""
    assert float(read[2]["loss"]) == 1 / 3


def test_a_page_has_paragraphs_and_tables(tmp_path):
    cells = [("net", "loss"), ("a", "1"), ("b", "2")]
    frame.write_page(tmp_path / "page.md", "# Nets", cells, "The end.")
    table = "| net | loss |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"
    assert (tmp_path / "page.md").read_text() == f"# Nets\n\n{table}\n\nThe end.\n"


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


def test_the_time_left_counts_the_nets_to_come():
    now = [0.0]
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, get_time=lambda: now[0])
    with Reporter(console) as reporter:
        reporter.begin("sparse", total=100, done=0, after=300)
        for _ in range(10):  # a step takes two seconds: 390 are to come
            now[0] += 2
            reporter.step("")
    assert "13:00 left" in output.getvalue()


def test_minutes():
    assert [minutes(s) for s in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "60:00"]


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path):
    """/dev/full is one: it takes nothing."""
    (tmp_path / "table.csv.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*table\.csv'") as raised:
        write_table(tmp_path / "table.csv", ["epoch"], [{"epoch": 1}])
    assert raised.value.errno == errno.ENOSPC

    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    temporary = tmp_path / "record.json.tmp"
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*record\.json'"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert not temporary.is_symlink()
    path.with_suffix(".md").write_text("# A\n")
    (tmp_path / "record.md.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*record\.md'"):
        write_section(path.with_suffix(".md"), "B", "second", title="A")
    assert path.with_suffix(".md").read_text() == "# A\n"


def test_an_error_in_words_keeps_them(tmp_path):
    with (
        pytest.raises(OSError, match=r"^the net cannot be drawn$"),
        frame.replacing(tmp_path / "net.png"),
    ):
        raise OSError("the net cannot be drawn")


def test_a_users_own_file_stays(tmp_path):
    (tmp_path / "net.tmp").write_text("mine")
    write_table(tmp_path / "net.csv", ["epoch"], [])
    write_json(tmp_path / "net.json", {})
    assert (tmp_path / "net.tmp").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_report_into_the_folder_of_the_run_leaves_its_files(tmp_path):
    written = [tmp_path / "net.json", tmp_path / "net.csv"]
    for path in written:
        path.write_text(path.name)
    assert frame.report(tmp_path, "net", written) == []
    copies = frame.report(tmp_path / "results", "copy", written)
    assert [copy.name for copy in copies] == ["copy.json", "copy.csv"]
    assert [path.read_text() for path in (*written, *copies)] == ["net.json", "net.csv"] * 2


def test_the_command_line_of_an_experiment():
    parser = frame.parser("experiments.some", "What it does.\n\nMore.")
    frame.add_out(parser, "runs/some")
    assert parser.parse_args([]).out == Path("runs/some")
    text = re.sub(r"\s+", " ", parser.format_help())
    assert text.startswith("usage: python -m experiments.some")
    assert "What it does. options:" in text
    assert "replaces an earlier one's (default: runs/some)" in text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "stopped; --resume goes on from the last checkpoint"),
        (OSError(errno.ENOSPC, "No space left", "a"), "error: [Errno 28] No space left: 'a'"),
        (CheckpointError("another run writes to a"), "error: another run writes to a"),
    ],
)
def test_what_a_user_can_mend_ends_with_a_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as raised:
        frame.run(main)
    assert raised.value.code == line  # Python writes it to stderr and ends with status 1
