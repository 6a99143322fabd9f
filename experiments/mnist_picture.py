"""The picture of the MNIST grid: accuracy and runtime against the density bound."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.frame import replacing

SPARSE, DENSE = "#0072b2", "0.35"


def grid_picture(path: Path, record: dict[str, Any]) -> None:
    """Draws the nets of the record of `experiments.mnist`.

    Accuracy: the mean over the seeds with their standard deviation, and a dot for each. The dense twin is a
    line from side to side.
    """
    sparse = [net for net in record["nets"] if net["density_bound"] is not None]
    dense = [net for net in record["nets"] if net["density_bound"] is None]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = [net["density_bound"] for net in sparse]

    for net in dense:
        _across(left, 100 * net["mean"], 100 * (net["deviation"] or 0))
        _across(right, net["epoch_s"])
    left.errorbar(
        bounds,
        [100 * net["mean"] for net in sparse],
        yerr=[100 * (net["deviation"] or 0) for net in sparse],
        color=SPARSE,
        marker="o",
        markersize=4,
        capsize=3,
        label="sparse",
    )
    for net in sparse:
        accuracies = [100 * accuracy for accuracy in net["test_accuracies"]]
        left.plot(
            [net["density_bound"]] * len(accuracies), accuracies, ".", color=SPARSE, alpha=0.4
        )
    left.set_ylabel("test accuracy [%]")
    seconds = [net["epoch_s"] for net in sparse]
    right.plot(bounds, seconds, color=SPARSE, marker="o", markersize=4)
    right.set_ylabel("training epoch [s]")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel(r"bound of the first block, $\rho_{up}$")
        axis.set_xticks(bounds, [f"{bound:g}" for bound in bounds])
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    with replacing(path) as fresh:
        figure.savefig(fresh, format=path.suffix[1:], dpi=160)


def _across(axis: Axes, level: float, spread: float = 0.0) -> None:
    """A line for the dense twin, which has no bound."""
    axis.axhline(level, color=DENSE, linestyle="--", linewidth=1, label="dense twin")
    if spread:
        axis.axhspan(level - spread, level + spread, color=DENSE, alpha=0.15, linewidth=0)
