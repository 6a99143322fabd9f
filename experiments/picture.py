"""The activations picture, laid out as the paper's figure 2: dense on the left, sparse on the right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.pyplot import get_cmap

from experiments.frame import save_figure

# Sites without an entry are white, as paper is; stored ones start at a hue that stands out from it.
STORED = ListedColormap(get_cmap("magma_r")(np.linspace(0.12, 1.0, 256)))


def activations_picture(
    path: Path,
    digits: np.ndarray,
    dense: Sequence[np.ndarray],
    sparse: Sequence[np.ndarray],
    *,
    bound: float,
) -> None:
    """Draws one channel of the first layers for some digits, dense beside sparse.

    All are [R, H, W], a row for each digit: the inputs, and of each layer the same channel of both nets. The
    bound is that of these layers.
    """
    layers = [f"conv {n + 1}" for n in range(len(dense))]
    groups = [
        (" ", ["input"], [digits]),
        ("dense", layers, dense),
        (rf"sparse, $\rho_{{up}}$ = {100 * bound:g}%", layers, sparse),
    ]
    columns = [len(names) for _, names, _ in groups]
    figure = Figure(figsize=(1.33 * sum(columns), 1.3 * len(digits) + 0.4), layout="constrained")
    parts = figure.subfigures(1, len(groups), width_ratios=columns)
    for part, (title, names, maps) in zip(parts, groups, strict=True):
        part.suptitle(title, fontsize=10)
        axes = part.subplots(len(digits), len(names), squeeze=False)
        for column, name, images in zip(axes.T, names, maps, strict=True):
            column[0].set_title(name, fontsize=9, pad=3)
            for axis, image in zip(column, images, strict=True):
                _draw(axis, image)
    save_figure(figure, path)


def _draw(axis: Axes, image: np.ndarray) -> None:
    """One map: white where nothing is stored, and the share of stored sites in a corner."""
    stored = image != 0
    top = max(image.max(), 1e-6)
    axis.imshow(np.where(stored, image, np.nan), cmap=STORED, vmin=min(0.0, image.min()), vmax=top)
    corner = {"transform": axis.transAxes, "ha": "right", "va": "bottom"}
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    axis.text(0.97, 0.03, f"{stored.mean():.1%}", fontsize=7, bbox=paper, **corner)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("0.75")
        spine.set_linewidth(0.6)
