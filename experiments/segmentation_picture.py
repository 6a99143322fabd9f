"""The picture of the segmentation experiment: scenes with true and found labels, and curves over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.data.scenes import CLASSES, Scene
from experiments.frame import save_figure

# Of `CLASSES`: what makes up the room is pale, what stands in it is not.
COLOURS = np.array(
    ["#c9b79c", "#eeeeee", "#b3c4d0", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e6b800"]
)
LINES = {"submanifold": "#0072b2", "dilating": "#d55e00"}


def segmentation_picture(
    path: Path, record: dict[str, Any], scenes: Sequence[Scene], found: Mapping[str, np.ndarray]
) -> None:
    """Draws scenes with their true labels and those that each net found, int[M, P], then the mean IoU."""
    titles = ["true", *found]
    figure = Figure(figsize=(3.4 * len(titles), 2.9 * len(scenes) + 2.6), layout="constrained")
    heights = [2.9 * len(scenes), 2.6]
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    axes = above.subplots(
        len(scenes),
        len(titles),
        squeeze=False,
        subplot_kw={"projection": "3d", "computed_zorder": False},
    )
    for number, (line, scene) in enumerate(zip(axes, scenes, strict=True)):
        shown = [scene.labels, *(labels[number, : len(scene.labels)] for labels in found.values())]
        for axis, title, labels in zip(line, titles, shown, strict=True):
            _draw(axis, scene, labels)
            if number == 0:
                axis.set_title(title, fontsize=10, pad=0)
    dots = [
        Line2D([], [], marker="o", linestyle="", color=c, label=n)
        for n, c in zip(CLASSES, COLOURS, strict=True)
    ]
    above.legend(
        handles=dots, loc="outside lower center", ncols=len(CLASSES), fontsize=8, frameon=False
    )
    _curves(below.subplots(), record)
    save_figure(figure, path)


def _draw(axis: Any, scene: Scene, labels: np.ndarray) -> None:
    """The points as seen from above a corner, without what hides the inside: the ceiling and two walls."""
    x, y, z = (scene.points - scene.low).T
    width, depth, height = scene.high - scene.low
    # By place, not by label: a label that is wrong must not vanish.
    shown = (z < height - 0.1) & (x > 0.08) & (y > 0.08)
    # From far to near, as matplotlib draws them in this order: the corner at 0 is the nearest.
    order = np.flatnonzero(shown)[np.argsort((z - x - y)[shown])]
    axis.scatter(
        x[order],
        y[order],
        z[order],
        c=COLOURS[labels[order]],
        s=3,
        linewidths=0,
        depthshade=False,
    )
    axis.set_box_aspect((width, depth, height), zoom=1.35)
    axis.view_init(elev=38, azim=225)
    axis.set_axis_off()


def _curves(axis: Any, record: dict[str, Any]) -> None:
    for net in record["nets"]:
        minutes = [m for m, _ in net["curve"]]
        values = [v for _, v in net["curve"]]
        axis.plot(minutes, values, color=LINES[net["net"]], label=net["net"], linewidth=1.4)
    axis.axhline(
        record["baseline"]["mean_iou"], color="0.35", linestyle="--", linewidth=1, label="baseline"
    )
    axis.set_xlabel("minutes of training")
    axis.set_ylabel("mean IoU, held-out scenes")
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1)
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
