"""The notebooks run from the first cell to the last, in a kernel of their own, as a reader runs them."""

import re
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def execute(path):
    """Runs all cells; returns what they printed and showed as text, and the number of pictures."""
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    data = [output.get("data", {}) for output in outputs]
    text = [o.get("text", "") for o in outputs] + [d.get("text/plain", "") for d in data]
    return "\n".join(text), sum("image/png" in d for d in data)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_notebook_executes(path):
    text, pictures = execute(path)
    assert "Warning" not in text
    assert pictures > 0
    if path.stem == "quick_start":
        (accuracy,) = re.findall(r"([\d.]+)% of 256 digits", text)
        # Chance is 10 %.
        assert float(accuracy) > 70
