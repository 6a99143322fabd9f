"""The demonstration's picture: solids, what attention keeps of one of them, and how the net gets smaller."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.frame import save_figure

INK, GREY = "0.2", "0.55"
SPARSE = "#c8442b"

Box = tuple[float, float, float, float]


def demo_picture(
    path: Path,
    solids: Mapping[str, np.ndarray],
    kept: Mapping[str, np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
) -> None:
    """Draws examples of classes, bool[r, r, r]; what is kept, float[s, s, s], 0: nothing; and the epochs.

    The weights are the share that is left of the sparse layers', before the first epoch and after each.
    """
    size = len(next(iter(solids.values())))
    figure = Figure(figsize=(9, 6.6))
    surfaces = f"eight classes of surfaces in {size}³ voxels, turned and stretched at random"
    _row(figure, surfaces, 0.98, solids, bottom=0.79, height=0.15)
    stored = "what the strongest channel of each sparse block stores; darker: a stronger response"
    _row(figure, stored, 0.745, kept, bottom=0.41, height=0.29)
    panels = [figure.add_axes((left, 0.075, 0.26, 0.25)) for left in (0.065, 0.39, 0.715)]
    epochs = np.arange(1, len(rows) + 1)
    milliseconds = [1e3 * row["seconds_per_step"] for row in rows]
    dots: dict[str, Any] = {"color": SPARSE, "lw": 2, "marker": "o", "ms": 4}
    title_panel(panels[0], "weights left in the sparse layers")
    panels[0].plot([0, *epochs], weights, **dots)
    panels[0].set_ylim(0, 1.05)
    title_panel(panels[1], "milliseconds a training step")
    panels[1].plot(epochs, milliseconds, **dots)
    panels[1].set_ylim(0, 1.1 * max(milliseconds))
    title_panel(panels[2], "accuracy")
    for name, style in (("train", {"color": GREY, "ls": "--"}), ("test", {"color": SPARSE})):
        values = [row[f"{name}_accuracy"] for row in rows]
        panels[2].plot(epochs, values, lw=2, label=name, **style)
    panels[2].set_ylim(0, 1.02)
    panels[2].legend(frameon=False, loc="best", fontsize=9)
    for axis in panels:
        axis.set_xlabel("epoch", fontsize=9, color=INK)
        style_panel(axis)
    for axis in (panels[0], panels[2]):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    save_figure(figure, path, dpi=200)


def title_panel(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left", weight="bold")


def style_panel(axis: Any) -> None:
    """A curve over epochs, with a grid and without a box."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=9, colors=INK, length=3)
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("0.7")


def _row(
    figure: Figure,
    title: str,
    top: float,
    volumes: Mapping[str, np.ndarray],
    *,
    bottom: float,
    height: float,
) -> None:
    figure.text(0.015, top, title, fontsize=10, color=INK, va="center", weight="bold")
    width = 1 / len(volumes)
    for at, (name, strength) in enumerate(volumes.items()):
        _voxels(figure, (at * width, bottom, width, height), strength.astype(float), name)


def _voxels(figure: Figure, box: Box, strength: np.ndarray, title: str) -> None:
    """A scatter of what is not 0, as large as it goes. Colour is strength, by rank: all shades occur."""
    left, bottom, width, height = box
    axis: Any = figure.add_axes(box, projection="3d")
    position, values = np.argwhere(strength > 0), strength[strength > 0]
    # One value alone says nothing: then the place gives the shape some depth.
    alike = len(values) == 0 or values.max() == values.min()
    shade = position.sum(axis=1) if alike else np.argsort(np.argsort(values))
    low, high = position.min(axis=0, initial=len(strength)), position.max(axis=0, initial=0)
    middle, reach = (low + high) / 2, max(1, (high - low).max() / 2)
    inches = min(width * figure.get_figwidth(), height * figure.get_figheight())
    axis.scatter(
        *position.T,
        c=shade,
        cmap="GnBu" if alike else "YlOrRd",
        vmin=(-1 if alike else -0.15) * shade.max(initial=1),
        s=(0.75 * 72 * inches / (2.6 * reach)) ** 2,
        linewidths=0,
        depthshade=False,
    )
    for name, at in zip("xyz", middle, strict=True):
        axis.set(**{f"{name}lim": (at - reach, at + reach)})
    axis.set_box_aspect((1, 1, 1), zoom=1.12)
    axis.set_axis_off()
    axis.view_init(elev=22, azim=-55)
    figure.text(left + width / 2, bottom + height, title, fontsize=9, color=INK, ha="center")
