"""What docs/results.md says was measured: its figures stand in the reports that their sections link to."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "results.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
TOLD = re.compile(
    r"^\*\*(?:Here|Classification|Segmentation)\*\*: .*?(?=\n\n)", re.MULTILINE | re.DOTALL
)
FIGURE = re.compile(r"[-+]?\d[\d,]*\.\d+|\d+(?= times)")


def reports(section: str) -> str:
    links = re.findall(r"\]\(([^)#]+\.(?:md|csv|json))\)", section)
    return " ".join((DOCS / link).read_text() for link in links)


def stands(figure: str, text: str) -> bool:
    """Whether a text has a number that is `figure`, if it is rounded so."""
    digits = len(figure.partition(".")[2])
    wanted = abs(float(figure.replace(",", "")))
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    return any(abs(float(number) - wanted) <= 0.5001 * 10**-digits for number in numbers)


@pytest.mark.parametrize("name", [name for name, text in SECTIONS.items() if TOLD.search(text)])
def test_the_figures_are_those_of_the_reports(name):
    """Catches a figure of an earlier report."""
    section = SECTIONS[name]
    figures = [found for told in TOLD.findall(section) for found in FIGURE.findall(told)]
    assert [figure for figure in figures if not stands(figure, reports(section))] == []


def test_the_page_has_figures():
    """Catches a test that looks for none."""
    told = [found for text in SECTIONS.values() for found in TOLD.findall(text)]
    assert len(FIGURE.findall(" ".join(told))) > 20


def test_links_and_pictures_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert [link for link in links if not (DOCS / link).exists()] == []
