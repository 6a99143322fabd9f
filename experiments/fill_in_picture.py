"""Pictures after the paper's figures 1 and 3: density against resolution, and over layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.frame import save_figure

Row = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = BLUE, VERMILION = ("#0072B2", "#D55E00")
INK, GREY = "0.15", "0.5"
# The lines of the layers' picture.
Style = dict[str, Any]
FREE: Style = {"marker": "o", "ms": 5, "lw": 1.8}
BOUND: Style = {"marker": "s", "ms": 4.5, "mfc": "white", "lw": 1.8}
STEEP: Style = {"ls": ":", "lw": 1.3, "zorder": 1}
EXPECTED: Style = {"color": INK, "lw": 1, "zorder": 3}
PLANE: Style = {"color": INK, "ls": (0, (6, 2)), "lw": 1, "zorder": 3}
LEGEND: dict[str, Style] = {
    "all responses": {"color": GREY, **FREE},
    "under a bound: the strongest stay": {"color": GREY, **BOUND},
    "× 27 (in 2-D × 9) a layer, until dense": {"color": GREY, **STEEP},
    "expected of random sites": EXPECTED,
    "a plane: 2 n + 1 behind n layers": PLANE,
}
SHADES = ("#5b9ecb", "#2f77a8", "#b5d5ea")  # of a voxel's faces towards x, y and z
EDGE = "#1d4f73"


def _projection(azimuth: float, elevation: float) -> np.ndarray:
    """float64[3, 2], from x, y and z to the right and up, for a view from these degrees."""
    a, e = np.radians([azimuth, elevation])
    right = (-np.sin(a), np.cos(a), 0)
    up = (-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e))
    return np.stack([right, up], axis=1)


PROJECTION = _projection(azimuth=52, elevation=28)


def resolution_picture(
    path: Path,
    rows: Sequence[Row],
    examples: Mapping[str, Sequence[np.ndarray]],
    *,
    limited: Sequence[bool],
    constant: float,
) -> None:
    """Draws the density of occupied voxels against the resolution, beside some shapes as voxels.

    The rows are those of `fill_in_measure.occupancy`, by resolution; limited are those with too few points to
    meet the voxels of the surface. Each class has an example at some resolutions. The line is constant / r.
    """
    figure = Figure(figsize=(9.2, 3.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    _against_resolution(left.add_subplot(), rows, limited, constant)
    columns = max(map(len, examples.values()))
    panels = right.subplots(len(examples), columns, squeeze=False, sharex="row", sharey="row")
    for line, (name, grids) in zip(panels, examples.items(), strict=True):
        for axis, occupied in zip(line, grids, strict=True):
            _voxels(axis, occupied)
            axis.set_title(
                rf"${len(occupied)}^3$, $\rho$ = {_percent(occupied.mean())}", fontsize=9, pad=1
            )
        # In place of the axis's label, which goes with the axis.
        place = {"transform": line[0].transAxes, "rotation": 90, "ha": "right", "va": "center"}
        line[0].text(-0.04, 0.5, name.replace("_", " "), fontsize=9, **place)
    save_figure(figure, path, dpi=200)


def layers_picture(path: Path, panels: Mapping[str, Sequence[Row]]) -> None:
    """Draws the density behind each layer, without a bound and with one: a panel for each kind of data.

    The panels have a title, and the rows of `fill_in_measure`.
    """
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        _over_layers(axis, rows)
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel(f"convolutions of {' × '.join('3' * rows[0]['rank'])}", fontsize=9)
    axes[0].set_ylabel(r"density $\rho$", fontsize=9)
    lines = [Line2D([], [], label=label, **style) for label, style in LEGEND.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    save_figure(figure, path, dpi=200)


def _against_resolution(
    axis: Axes, rows: Sequence[Row], limited: Sequence[bool], constant: float
) -> None:
    x = np.array([row["resolution"] for row in rows])
    mean, low, high = _curves(rows)
    axis.fill_between(x, low, high, color=BLUE, alpha=0.18, lw=0, label="10th to 90th percentile")
    # Points a voxel become fewer from one resolution to the next: the last part of the line is dashed.
    whole = int(np.sum(~np.array(limited)))
    style: Style = {"color": BLUE, "marker": "o", "ms": 5, "lw": 1.8}
    axis.plot(x[:whole], mean[:whole], label=f"{rows[0]['data']}, mean", zorder=3, **style)
    if whole < len(x):
        bend = slice(max(0, whole - 1), None)
        axis.plot(x[bend], mean[bend], mfc="white", ls="--", label="too few points", **style)
        points = rows[-1]["points"]
        fewer = x[x**3 > points]
        axis.plot(fewer, points / fewer**3, color=GREY, ls=":", label=f"{points:,} points / r³")
    line = {"color": INK, "ls": (0, (6, 2)), "lw": 1}
    axis.plot(x, constant / x, zorder=1, label=f"{constant:.1f} / r, a surface", **line)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{r}" for r in x])
    axis.set_xlabel("resolution r, voxels along an edge")
    axis.set_ylabel(r"density $\rho$ of occupied voxels")
    _logarithmic(axis, low.min() / 1.6, 1.6 * max(high.max(), constant / x[0]))
    axis.legend(fontsize=8, frameon=False, loc="lower left", handlelength=2.8)


def _over_layers(axis: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row["data"] for row in rows))
    for name, colour in zip(names, COLOURS, strict=False):
        free = [row for row in rows if row["data"] == name and row["bound"] is None]
        bound = [row for row in rows if row["data"] == name and row["bound"] is not None]
        layers = np.array([row["layer"] for row in free])
        mean, low, high = _curves(free)
        axis.plot(layers, mean, color=colour, **FREE)
        axis.fill_between(layers, low, high, color=colour, alpha=0.18, lw=0)
        axis.plot(layers, _curves(bound)[0], color=colour, **BOUND)
        place: Style = {
            "xytext": (0, -6),
            "textcoords": "offset points",
            "ha": "right",
            "va": "top",
        }
        end = (layers[-1], bound[-1]["density"])
        axis.annotate(rf"$\rho$ = {_percent(mean[0])}", end, fontsize=9, color=colour, **place)
        steep = mean[0] * 3.0 ** (free[0]["rank"] * layers)
        axis.plot(layers, np.minimum(1, steep), color=colour, **STEEP)
        if free[0]["expected"] is not None:
            axis.plot(layers, [row["expected"] for row in free], **EXPECTED)
        elif free[0]["rank"] == 3:
            axis.plot(layers, np.minimum(1, mean[0] * (2 * layers + 1)), **PLANE)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _logarithmic(axis, 5e-4, 1.5)


def _curves(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, 10th and 90th percentile."""
    names = ("density", "density_p10", "density_p90")
    mean, low, high = (np.array([row[name] for row in rows]) for name in names)
    return mean, low, high


def _logarithmic(axis: Axes, low: float, high: float) -> None:
    """A logarithmic y axis in percent."""
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    if high < 100 * low:  # powers of ten alone would leave little to read off
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(which="major", color="0.92")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _voxels(axis: Axes, occupied: np.ndarray) -> None:
    """Cubes in parallel projection, seen from where x, y and z are large; the grid is the unit cube."""
    places, corners, colours = [], [], []
    for direction, shade in enumerate(SHADES):
        seen = np.argwhere(occupied & ~_next(occupied, direction))
        # The corners of the voxel's face in this direction, in order.
        square = np.insert([(0, 0), (0, 1), (1, 1), (1, 0)], direction, 1, axis=1)
        places.append(seen.sum(axis=1))
        corners.append(seen[:, None] + square)
        colours.append(np.full(len(seen), shade))
    # What is nearer is painted later: no cube hides one with a larger x + y + z.
    order = np.argsort(np.concatenate(places), kind="stable")
    faces = PolyCollection(
        np.concatenate(corners)[order] @ PROJECTION / len(occupied),
        facecolors=np.concatenate(colours)[order],
        edgecolors=EDGE,
        linewidths=5 / len(occupied),
    )
    axis.add_collection(faces)
    axis.autoscale_view()
    axis.set_aspect("equal")
    axis.set_axis_off()


def _next(occupied: np.ndarray, axis: int) -> np.ndarray:
    """Whether the next voxel along an axis is occupied; outside of the grid none is."""
    padded = np.pad(occupied, [(0, each == axis) for each in range(3)])
    return padded.take(range(1, len(occupied) + 1), axis)
