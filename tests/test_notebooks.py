"""The notebooks run from the first cell to the last, in a kernel of their own, as a reader runs them."""

import re
from pathlib import Path

import jupytext
import numpy as np
import pytest
from nbclient import NotebookClient

from experiments.data.mnist import load_mnist

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
    CHECKS[path.stem](text)


def learned(text):
    (accuracy,) = re.findall(r"([\d.]+)% of 256 digits", text)
    # Chance is 10 %.
    assert float(accuracy) > 70


def selected(text):
    """The tables of kept responses and of pixels with a gradient are those of a selection in NumPy."""
    pixels = load_mnist(None)[0].images[8].astype(int)
    pixels[pixels / 256 < 0.2] = 0
    blurred = np.tensordot([1, 2, 1, 2, 4, 2, 1, 2, 1], patches(pixels), 1)
    best = np.argsort(-blurred, axis=None, kind="stable")  # equal responses: the lower key first
    candidates = (blurred > 0).sum()
    ranked = blurred.ravel()[best] / (16 * 256)
    for bound, kept in (("0.02", 15), ("0.05", 39), ("0.1", 78), ("0.2", 156)):
        row = [f"{kept}", f"{candidates - kept}", f"{ranked[kept - 1]:.4f}", f"{ranked[kept]:.4f}"]
        assert [bound, *row] in [line.split() for line in text.splitlines()]
    for bound, kept in ((0.005, 3), (0.02, 15), (0.1, 78)):
        is_kept = np.zeros(blurred.shape, bool)
        is_kept.flat[best[:kept]] = True
        reached = (patches(is_kept).any(axis=0) & (pixels > 0)).sum()
        line = f"bound {bound}: a gradient reaches {reached} of {(pixels > 0).sum()} pixels"
        assert line in text


def patches(image):
    """For each site what lies in a window of 3 x 3, 0 beyond the border: [9, 28, 28]."""
    padded = np.pad(image, 1)
    return np.array([padded[i : i + 28, j : j + 28] for i in range(3) for j in range(3)])


def pruned(text):
    """Weights went, storage with them, and the network has learned all the same."""
    left, before, slots = map(
        int, re.search(r"(\d+) of (\d+) filter weights are left, stored in (\d+)", text).groups()
    )
    assert before == 9 * (8 + 64 + 128)
    assert left < before / 2
    assert left <= slots < before
    (accuracy,) = re.findall(r"([\d.]+)% of 512 digits", text)
    assert float(accuracy) > 70


def named(text):
    """Shapes are told apart, and the bound has cut something that the picture shows."""
    assert int(re.search(r"(\d+)% of 64 new shapes", text)[1]) > 70
    kept, responses = map(int, re.search(r"channel \d+: (\d+) of (\d+) kept", text).groups())
    assert kept == int(0.1 * 32**3) < responses


CHECKS = {
    "quick_start": learned,
    "k_selection": selected,
    "pruning": pruned,
    "mesh_to_shape": named,
}
