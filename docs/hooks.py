"""What MkDocs does beyond mkdocs.yml: links to any file of the repository, and formulas as MathML."""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

import ilajax

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[^)#:\s]+(?=[)#])")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds the files outside docs/ that pages link to: Markdown as pages of the site, the rest as it is."""
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:
        for link in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, link)
            if not (ROOT / path).is_file() or files.get_file_from_path(_in_site(path)):
                continue
            added = File.generated(config, _in_site(path), abs_src_path=str(ROOT / path))
            files.append(added)
            if added.is_documentation_page():
                pages.append(added)  # its own links are followed, too


def on_page_markdown(markdown, page, config, files):
    """Links are written for a reader of the repository; here they become those of the site."""
    here = page.file.src_uri
    if here == "api/operations.md":
        markdown = with_operations(markdown)

    def of_the_site(link):
        path = _in_repository(here, link[0])
        if not (ROOT / path).is_file():
            return link[0]
        return posixpath.relpath(_in_site(path), posixpath.dirname(here) or ".")

    return LINK.sub(of_the_site, markdown)


def with_operations(markdown: str) -> str:
    """The page of operations with those of ilajax.ops that no other page of the reference has."""
    elsewhere = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    names = [
        name
        for name in ilajax.__all__
        if getattr(getattr(ilajax, name), "__module__", "").startswith("ilajax.ops.")
        and f"::: ilajax.{name}\n" not in elsewhere
    ]
    return markdown + "".join(f"\n::: ilajax.{name}\n" for name in names)


def on_page_content(content, page, config, files):
    """Every browser draws MathML: no script has to be fetched or shipped."""

    def formula(found):
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(formula, content)


def _in_repository(page: str, link: str) -> str:
    """The file that a page links to, from the repository's root."""
    source = f"docs/{page}" if (ROOT / "docs" / page).exists() else page
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(path: str) -> str:
    # MkDocs takes a README.md for the index of its folder.
    return path.removeprefix("docs/").replace("README", "readme")
