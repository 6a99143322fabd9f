"""The picture of the MNIST grid: accuracy and runtime against the density bound."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.frame import save_figure

SPARSE, DENSE = "#0072b2", "0.35"


def grid_picture(path: Path, record: dict[str, Any]) -> None:
    """Draws the nets of the record of `experiments.mnist`.

    Accuracy: the mean over the seeds with their standard deviation, and a dot for each.
    """
    sparse = [net for net in record["nets"] if net["density_bound"] is not None]
    dense = [net for net in record["nets"] if net["density_bound"] is None]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = [net["density_bound"] for net in sparse]

    # A line for the dense twin, which has no bound.
    for net in dense:
        line = {"color": DENSE, "linestyle": "--", "linewidth": 1, "label": "dense twin"}
        left.axhline(100 * net["mean"], **line)
        right.axhline(net["epoch_s"], **line)
        if net["deviation"]:
            edges = (100 * (net["mean"] + sign * net["deviation"]) for sign in (-1, 1))
            left.axhspan(*edges, color=DENSE, alpha=0.15, linewidth=0)
    style = {"color": SPARSE, "marker": "o", "markersize": 4}
    means = [100 * net["mean"] for net in sparse]
    spread = [100 * (net["deviation"] or 0) for net in sparse]
    left.errorbar(bounds, means, yerr=spread, capsize=3, label="sparse", **style)
    for net in sparse:
        for accuracy in net["test_accuracies"]:
            left.plot(net["density_bound"], 100 * accuracy, ".", color=SPARSE, alpha=0.4)
    left.set_ylabel("test accuracy [%]")
    right.plot(bounds, [net["epoch_s"] for net in sparse], **style)
    right.set_ylabel("training epoch [s]")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel(r"bound of the first block, $\rho_{up}$")
        axis.set_xticks(bounds, [f"{bound:g}" for bound in bounds])
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    save_figure(figure, path)
