"""What density bounds cost in accuracy, and what resolution brings: the paper's figure 6.

    python -m experiments.resolution                      # solids made on the spot, 16^3 and 32^3
    python -m experiments.resolution --data kicad --data-dir FOLDER --seeds 5 --report
    python -m experiments.resolution --resolutions 16 32 64 128 --trivial 16 --dense 16
    python -m experiments.resolution --resume             # goes on where a run was stopped

--report writes experiments/results/resolution.{csv,json,md,png} too. At 16^3 the bounds are the paper's four
pairs, at finer grids those of its table 2. The trivial bound stores every site: the same net, in which
selection cuts nothing. All nets of a resolution and seed start from the same weights and see the same
batches.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, PercentFormatter

from benchmarks import timing
from experiments import frame
from experiments.data.sets import GRIDS
from experiments.demo_picture import style_panel, title_panel
from experiments.frame import Cells
from experiments.variants import (
    Variant,
    about,
    add_options,
    deviation,
    layer_cells,
    mean_over_seeds,
    paper_bounds,
    summary_cells,
    train_variants,
)

# The paper's pairs at 16^3, the strictest first.
BOUNDS_16 = ((0.06, 0.12), (0.12, 0.24), (0.33, 0.33))
COLOURS = {"trivial": "#7f7f7f", "bounded": "#0072b2", "dense": "#c8442b"}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns its record, as the JSON file has it."""
    return train_variants("experiments.resolution", _parser(), arguments, _variants, _finish)


def _variants(options: argparse.Namespace) -> list[Variant]:
    """For each resolution the trivial bound, the paper's, and the dense twin, where they are asked for."""
    found = []
    for resolution in dict.fromkeys(options.resolutions):
        paper = paper_bounds(resolution)
        asked = [pair for pair in BOUNDS_16 if pair[0] in options.bounds]
        bounds = asked if resolution == 16 else [paper]
        if resolution in options.trivial:
            bounds.insert(0, (1.0,) * len(paper))
        if resolution in options.dense:
            bounds.append(())
        found += [Variant(_label(resolution, each), resolution, each) for each in bounds]
    return found


def _label(resolution: int, bounds: Sequence[float]) -> str:
    shown = "dense" if not bounds else ", ".join(f"{bound:g}" for bound in bounds)
    return f"{resolution}^3, {shown}"


def _kind(variant: dict[str, Any]) -> str:
    if not variant["bounds"]:
        return "dense"
    return "trivial" if min(variant["bounds"]) == 1 else "bounded"


def _finish(record: dict[str, Any], written: Sequence[Path]) -> list[Cells]:
    """Writes the page and the picture; returns the table."""
    cells = summary_cells(record)
    page, picture = written
    epochs: list[Cells] = [
        ("net", *map(str, range(1, len(record["variants"][0]["epochs"][0]) + 1)))
    ]
    for each in record["variants"]:
        shown = (f"{value:.1%}" for value in mean_over_seeds(each, "test_accuracy"))
        epochs.append((each["label"], *shown))
    frame.write_page(
        page,
        "# Bounds and resolution",
        about(record),
        f"{timing.headline(record)}.",
        cells,
        "![](resolution.png)",
        "Test accuracy after each epoch:",
        epochs,
        "What the bounds cut, on a batch to train on, in the first seed's net: share of the sites with a "
        "response above 0 before the selection and behind it, as means over the channels.",
        layer_cells(record),
    )
    _draw(picture, record)
    return cells


def _draw(path: Path, record: dict[str, Any]) -> None:
    """Accuracy against the bound, against the resolution (or by epoch), and against the time of a step."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axis in panels:
        style_panel(axis)
    variants = record["variants"]
    resolutions = sorted({each["resolution"] for each in variants})
    coarse = [each for each in variants if each["resolution"] == resolutions[0]]
    _draw_bounds(panels[0], coarse)
    of_kind: dict[str, dict[int, dict[str, Any]]] = {}
    for each in variants:  # of several bounds at one resolution the last, the paper's own
        of_kind.setdefault(_kind(each), {})[each["resolution"]] = each
    for kind, shown in of_kind.items():
        nets = [shown[resolution] for resolution in sorted(shown)]
        how = {"color": COLOURS[kind], "capsize": 3, "marker": "o", "label": kind}
        heights = [each["mean"] for each in nets], [deviation(each) for each in nets]
        panels[2].errorbar([each["step"]["median_s"] for each in nets], *heights, **how)
        if len(resolutions) > 1:
            panels[1].errorbar([each["resolution"] for each in nets], *heights, **how)
    if len(resolutions) > 1:
        title_panel(panels[1], "resolution")
        panels[1].set_xscale("log", base=2)
        panels[1].set_xticks(resolutions, [f"{resolution}^3" for resolution in resolutions])
    else:
        title_panel(panels[1], "epoch")
        for each in coarse:
            curve = mean_over_seeds(each, "test_accuracy")
            panels[1].plot(range(1, len(curve) + 1), curve, label=each["label"].partition(", ")[2])
        panels[1].legend(frameon=False, fontsize=9)
    title_panel(panels[2], "seconds of a step")
    panels[2].legend(frameon=False, fontsize=9)
    panels[2].set_xlim(left=0)
    panels[2].xaxis.set_major_locator(AutoLocator())
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    frame.save_figure(figure, path)


def _draw_bounds(axis: Any, variants: Sequence[dict[str, Any]]) -> None:
    """Accuracy against the first block's bound, and that of the dense twin as a line."""
    bounded = sorted((v for v in variants if v["bounds"]), key=lambda each: each["bounds"])
    bounds = [each["bounds"][0] for each in bounded]
    heights = [each["mean"] for each in bounded], [deviation(each) for each in bounded]
    axis.errorbar(bounds, *heights, color=COLOURS["bounded"], capsize=3, marker="o")
    title_panel(axis, f"bound of the first block, {variants[0]['resolution']}^3")
    for each in variants:
        if _kind(each) == "dense":
            axis.axhline(each["mean"], color=COLOURS["dense"], ls="--", label="dense")
            axis.legend(frameon=False, fontsize=9)
    axis.set_xscale("log")
    axis.set_xticks(bounds, [f"{bound:g}" for bound in bounds])
    axis.minorticks_off()


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.resolution", __doc__)
    some = {"type": int, "choices": GRIDS, "nargs": "*", "metavar": "R"}
    frame.add_resolutions(parser, [16, 32], choices=GRIDS)
    parser.add_argument("--trivial", default=[16], help="where to train bounds of 1 too", **some)
    firsts = [pair[0] for pair in BOUNDS_16]
    help = "which pairs to train at 16^3, by the first block's bound (default: all)"
    how = {"type": float, "choices": firsts, "nargs": "*", "metavar": "RHO"}
    parser.add_argument("--bounds", default=firsts, help=help, **how)
    parser.add_argument("--dense", default=[], help="where to train the dense twin too", **some)
    files = "resolution.{csv,json,md,png}"
    add_options(parser, epochs=30, out="runs/resolution", files=files)
    return parser


if __name__ == "__main__":
    frame.run(main)
