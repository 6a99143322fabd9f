"""What docs/paper.md says exists: its commands and their options, its links, the names of the library."""

import functools
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import ilajax

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
COMMANDS = re.findall(r"`(python -m [^`]+)`", PAGE)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_commands_run_what_exists(command):
    """Catches an experiment that was renamed, and an option that it does not have."""
    module, *words = command.removeprefix("python -m ").split()
    importlib.import_module(module)._parser().parse_args(words)  # exits where one does not fit


def test_the_names_of_the_library_resolve():
    names = set(re.findall(r"\bilajax(?:\.\w+)+", PAGE))
    assert len(names) > 10
    for name in names:
        functools.reduce(getattr, name.split(".")[1:], ilajax)


def test_modules_of_the_experiments_exist():
    names = set(re.findall(r"`((?:benchmarks|experiments)(?:\.\w+)+)`", PAGE))
    assert len(names) > 4
    assert [name for name in names if not importlib.util.find_spec(name)] == []


def test_links_lead_somewhere():
    links = set(re.findall(r"\]\(([^)#]+)\)", PAGE))
    assert len(links) > 10
    missing = [link for link in links if not (ROOT / "docs" / link).exists()]
    assert missing == []


def test_nothing_of_the_paper_is_left_out():
    first_cells = re.findall(r"^\| ([^|]+) \|", PAGE, re.MULTILINE)
    parts = {"Figure": 6, "Table": 2, "Equation": 4, "Algorithm": 2}
    expected = [f"{kind} {number}" for kind, last in parts.items() for number in range(1, last + 1)]
    assert [part for part in expected if first_cells.count(part) != 1] == []
