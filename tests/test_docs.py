"""What the site says: Python blocks run, links lead somewhere, the reference leaves no name out."""

import contextlib
import importlib.util
import io
import re
import runpy
from pathlib import Path

import matplotlib
import pytest

import ilajax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# These have tests of their own: the others' blocks run one behind the other, as a page is read.
TESTED_ELSEWHERE = {"adding_an_op.md", "checkpoints.md", "data.md", "scaling_out.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROMISE = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def of_pages(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(DOCS)))


@of_pages([p for p in PAGES if BLOCK.search(p.read_text()) and p.name not in TESTED_ELSEWHERE])
def test_blocks_print_what_their_comments_say(page):
    code = "\n".join(BLOCK.findall(page.read_text()))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, page.name, "exec"), {})
    assert printed.getvalue().splitlines() == PROMISE.findall(code)


@of_pages(PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)", prose):
        assert "://" in link or (page.parent / link).exists(), link


def test_the_reference_has_every_public_name():
    pytest.importorskip("latex2mathml", reason="comes with the documentation's extra")
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    text = hooks["with_operations"]("".join(p.read_text() for p in (DOCS / "api").glob("*.md")))
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    packages = {f"ilajax.{name}" for name in ("data", "models", "nn", "optim")}
    names = {f"ilajax.{name}" for name in ilajax.__all__} - packages
    for package in packages:
        names |= {f"{package}.{name}" for name in getattr(ilajax, package.split(".")[1]).__all__}
    assert sorted(entries) == sorted(names)


def test_every_page_stands_in_the_navigation():
    navigation = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {str(page.relative_to(DOCS)) for page in PAGES} <= set(navigation)


def test_pictures_show_what_the_library_computes(tmp_path):
    """Catches a picture of an earlier computation, by the numbers that are written in it."""
    spec = importlib.util.spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with matplotlib.rc_context({"backend": "agg"}):
        script.draw(tmp_path)
    drawn = {path.name: _written_in(path) for path in tmp_path.iterdir()}
    assert drawn == {p.name: _written_in(p) for p in (DOCS / "pictures").glob("*.svg")}
    assert all(drawn.values())


def _written_in(picture):
    return re.findall(r"<text[^>]*>([^<]+)</text>", picture.read_text())
