"""Density-biased L2 and pruning at several strengths: the paper's figure 5.

    python -m experiments.regularisation                    # solids made on the spot, in 16^3 voxels; minutes
    python -m experiments.regularisation --data kicad --data-dir FOLDER --seeds 5 --report
    python -m experiments.regularisation --resolution 64 --epochs 90 --optimizer adagrad    # as in the paper
    python -m experiments.regularisation --resume           # goes on where a run was stopped

--report writes experiments/results/regularisation.{csv,json,md,png} too. As in the paper, the net of scale 0
is neither regularised nor pruned. All nets of a seed start from the same weights and see the same batches.
Steps, and the sparse layers of a step alone, are timed at the end, the nets in turn.

Scales are those of a loss that is summed over the batch. The paper does not say; the authors' release takes
the mean (--mean-loss), with filters of 64^3, whose gradients sum over 64 times as many sites.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import timing
from experiments import frame
from experiments.data.sets import add_resolution
from experiments.demo_picture import INK, style_panel, title_panel
from experiments.frame import Cells
from experiments.variants import (
    Variant,
    about,
    add_options,
    mean_over_seeds,
    paper_bounds,
    summary_cells,
    train_variants,
)

SCALES = [0.0, 0.1, 0.2, 0.3]
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#c8442b", "#009e73", "#8f5fbf")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns its record, as the JSON file has it."""
    return train_variants("experiments.regularisation", _parser(), arguments, _variants, _finish)


def _variants(options: argparse.Namespace) -> list[Variant]:
    # Training takes the mean loss: what holds for the sum is divided by the batch's size.
    share = 1 if options.mean_loss else 1 / options.batch_size
    return [
        Variant(
            f"scale {scale:g}",
            options.resolution,
            paper_bounds(options.resolution),
            scale=scale * share,
            threshold=options.threshold if scale else 0.0,
        )
        for scale in sorted(set(options.scales))
    ]


def _finish(record: dict[str, Any], written: Sequence[Path]) -> list[Cells]:
    """Writes the page and the picture; returns the table."""
    cells = _with_gains(record)
    page, picture = written
    strongest = record["variants"][-1]
    frame.write_page(
        page,
        "# Regularisation and pruning",
        f"OctNet3-{strongest['resolution']}^3. {about(record)}",
        f"{timing.headline(record)}.",
        "Scale 0: without regularisation and pruning. The others: offset = b1 = b2 = 0.1; beside the mean "
        f"loss of a batch stands {strongest['scale']:.3g} times the regulariser under {strongest['label']}; "
        f"weights that stay below {strongest['threshold']:g} for two epochs go. Speed: a step of the first "
        "net takes so many times as long, and its sparse layers alone do.",
        cells,
        "![](regularisation.png)",
        "Share of the weights that is left, and how many points the layers' mean density stands above that "
        "of their bounds, by epoch:",
        _epoch_cells(record),
    )
    _draw(picture, record)
    return cells


def _with_gains(record: dict[str, Any]) -> list[Cells]:
    """The summary, with how much faster a step became."""
    head, *lines = summary_cells(record)
    first = record["variants"][0]
    cells = [(*head, "speed", "of the sparse layers")]
    for line, each in zip(lines, record["variants"], strict=True):
        gains = [first[p]["median_s"] / each[p]["median_s"] for p in ("step", "sparse layers")]
        cells.append((*line, *(f"{gain:.2f}x" for gain in gains)))
    return cells


def densities(variant: dict[str, Any]) -> tuple[list[str], list[Any], list[float]]:
    """The names of the sparse layers, their densities by epoch, and their bounds."""
    columns = [name for name in variant["epochs"][0][0] if name.startswith("density_")]
    bounds = [bound for bound in variant["bounds"] for _ in range(3)]  # a block has three layers
    return columns, [mean_over_seeds(variant, column) for column in columns], bounds


def _epoch_cells(record: dict[str, Any]) -> list[Cells]:
    count = len(record["variants"][0]["epochs"][0])
    shown = sorted({1, *range(5, count + 1, 5), count})
    cells: list[Cells] = [("net", *(f"epoch {n}" for n in shown))]
    for each in record["variants"]:
        weights = mean_over_seeds(each, "live_weights")
        _, measured, bounds = densities(each)
        above = sum(measured) / len(measured) - sum(bounds) / len(bounds)
        left = weights / weights.max()
        cells.append(
            (each["label"], *(f"{left[n - 1]:.0%}, {100 * above[n - 1]:+.1f}" for n in shown))
        )
    return cells


def _draw(path: Path, record: dict[str, Any]) -> None:
    """Weights, time, accuracy, what stands above its bound, and densities of the first and last net."""
    variants = record["variants"]
    epochs = range(1, len(variants[0]["epochs"][0]) + 1)
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3)
    drawn = (
        ("live_weights", "filter weights left"),
        ("seconds_per_step", "seconds a step, in training"),
        ("test_accuracy", "test accuracy"),
        ("over_bound", "channels above their bound, share of steps"),
    )
    for axis, (column, title) in zip(panels.flat, drawn, strict=False):
        title_panel(axis, title)
        for each, colour in zip(variants, COLOURS, strict=False):
            axis.plot(
                epochs, mean_over_seeds(each, column), color=colour, lw=1.8, label=each["label"]
            )
        axis.set_ylim(bottom=0)
        if column in ("test_accuracy", "over_bound"):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0, 0].legend(frameon=False, fontsize=9)
    for axis, each in zip(panels.flat[4:], (variants[0], variants[-1]), strict=True):
        title_panel(axis, f"densities, {each['label']}; dashed: the bounds")
        names, measured, bounds = densities(each)
        for name, density, bound, colour in zip(names, measured, bounds, COLOURS * 2, strict=False):
            axis.plot(epochs, density, color=colour, lw=1.4, label=name.removeprefix("density_"))
            axis.axhline(bound, color=colour, lw=0.8, ls="--")
        axis.set_ylim(0, None)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.legend(frameon=False, fontsize=8, ncols=2)
    for axis in panels.flat:
        axis.set_xlabel("epoch", fontsize=9, color=INK)
        style_panel(axis)
    frame.save_figure(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.regularisation", __doc__)
    add = parser.add_argument
    scales = "of the density-biased L2; 0: without it and without pruning"
    add("--scales", type=frame.not_negative, nargs="+", default=SCALES, metavar="S", help=scales)
    mean = "take the scales as those of a loss that is a mean over the batch, not its sum"
    add("--mean-loss", action="store_true", help=mean)
    threshold = "filter weights that stay below it for two epochs go"
    add("--threshold", type=frame.positive, default=0.04, metavar="W", help=threshold)
    add_resolution(parser, 16)
    files = "regularisation.{csv,json,md,png}"
    add_options(parser, epochs=60, out="runs/regularisation", files=files)
    return parser


if __name__ == "__main__":
    frame.run(main)
