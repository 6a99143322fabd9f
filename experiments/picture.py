"""The activations picture, laid out as the paper's figure 2: dense on the left, sparse on the right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.pyplot import get_cmap

from experiments.frame import replacing

# Sites without an entry are white, as paper is; stored ones start at a hue that stands out from it.
STORED = ListedColormap(get_cmap("magma_r")(np.linspace(0.12, 1.0, 256)))

# Inches.
CELL, GAP, GROUP_GAP, MARGIN, HEADER = 1.2, 0.07, 0.35, 0.12, 0.5


def activations_picture(
    path: Path,
    digits: np.ndarray,
    dense: Sequence[np.ndarray],
    sparse: Sequence[np.ndarray],
    *,
    bound: float,
) -> None:
    """Draws one channel of the first layers for some digits, dense beside sparse.

    Args:
      path: where the picture goes; the name's ending chooses the format.
      digits: [R, H, W], the inputs, one row each.
      dense: for each layer [R, H, W], a channel of the dense network.
      sparse: for each layer [R, H, W], the same channel of the sparse one.
      bound: the density bound of these layers, for the title.
    """
    layers = [f"conv {n + 1}" for n in range(len(dense))]
    groups = [
        ("", ["input"], [digits]),
        ("dense", layers, dense),
        (rf"sparse, $\rho_{{up}}$ = {100 * bound:g}%", layers, sparse),
    ]
    rows, columns = len(digits), 1 + len(dense) + len(sparse)
    width = 2 * MARGIN + columns * CELL + (columns - 3) * GAP + 2 * GROUP_GAP
    height = HEADER + rows * CELL + (rows - 1) * GAP + MARGIN
    figure = Figure(figsize=(width, height))
    left = MARGIN
    for title, names, maps in groups:
        extent = len(names) * CELL + (len(names) - 1) * GAP
        figure.text((left + extent / 2) / width, 1 - 0.15 / height, title, ha="center", va="center")
        for name, images in zip(names, maps, strict=True):
            for row, image in enumerate(images):
                bottom = height - HEADER - CELL - row * (CELL + GAP)
                box = (left / width, bottom / height, CELL / width, CELL / height)
                axis = figure.add_axes(box)
                _draw(axis, image)
                if row == 0:
                    axis.set_title(name, fontsize=9, pad=3)
            left += CELL + GAP
        left += GROUP_GAP - GAP
    with replacing(path) as fresh:
        figure.savefig(fresh, format=path.suffix[1:], dpi=160)


def _draw(axis: Axes, image: np.ndarray) -> None:
    """One map: white where nothing is stored, and the share of stored sites in a corner."""
    stored = image != 0
    top = max(image.max(), 1e-6)
    axis.imshow(np.where(stored, image, np.nan), cmap=STORED, vmin=min(0.0, image.min()), vmax=top)
    axis.text(
        0.97,
        0.03,
        f"{stored.mean():.1%}",
        transform=axis.transAxes,
        ha="right",
        va="bottom",
        fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
    )
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("0.75")
        spine.set_linewidth(0.6)
