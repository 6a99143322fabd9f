"""What mkdocstrings cannot know: how docstrings are laid out, and functions named like their file."""

import itertools
import re
import textwrap
from typing import Any

import griffe

LIST = re.compile(r"\s*(\d+\.|-) ")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _with_blocks(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Makes ilajax.optim.compact the function that `import` gives, not the file that holds it."""
        for package in pkg.modules.values():
            files = dict(package.modules)
            for name, path in package.imports.items():
                file = path.rpartition(".")[0].removeprefix(f"{package.path}.")
                if file in files:
                    function = files[file].members[name]
                    package.set_member(name, griffe.Alias(name, function, parent=package))


def _with_blocks(docstring: str) -> str:
    """Fences examples and formulas, which are indented; calls the section "Example" by its parser's name."""
    paragraphs = docstring.split("\n\n")
    for before, paragraph in itertools.pairwise(paragraphs):
        lines = paragraph.splitlines()
        in_section = before.splitlines()[-1].startswith(" ")
        if in_section or LIST.match(paragraph) or not all(line.startswith("  ") for line in lines):
            continue
        language = "pycon" if paragraph.lstrip().startswith(">>>") else "text"
        block = f"```{language}\n{textwrap.dedent(paragraph)}\n```"
        docstring = docstring.replace(f"\n\n{paragraph}", f"\n\n{block}")
    return re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
