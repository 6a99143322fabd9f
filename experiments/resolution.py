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
from matplotlib.ticker import PercentFormatter

from benchmarks import timing
from experiments import frame
from experiments.data.sets import GRIDS
from experiments.demo_picture import INK, style_panel, title_panel
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
        bounds = [paper_bounds(resolution)] if resolution > 16 else list(BOUNDS_16)
        if resolution in options.trivial:
            bounds.insert(0, tuple(1.0 for _ in bounds[0]))
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
    """Accuracy against the bound, against the resolution, and against the time of a step."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    variants = record["variants"]
    coarsest = min(each["resolution"] for each in variants)
    bounded = [v for v in variants if v["bounds"] and v["resolution"] == coarsest]
    bounded.sort(key=lambda each: each["bounds"])
    title_panel(panels[0], f"{coarsest}^3: bound of the first block")
    panels[0].errorbar(
        [each["bounds"][0] for each in bounded],
        [each["mean"] for each in bounded],
        [deviation(each) for each in bounded],
        color=COLOURS["bounded"],
        capsize=3,
        marker="o",
    )
    for each in variants:
        if _kind(each) == "dense" and each["resolution"] == coarsest:
            panels[0].axhline(each["mean"], color=COLOURS["dense"], ls="--", label="dense")
            panels[0].legend(frameon=False, fontsize=9)
    panels[0].set_xlabel("bound", fontsize=9, color=INK)
    title_panel(panels[1], "resolution")
    title_panel(panels[2], "seconds of a step")
    for kind, colour in COLOURS.items():
        # Of several bounds at one resolution, the paper's strictest without a loss.
        of_kind = {v["resolution"]: v for v in variants if _kind(v) == kind}
        if not of_kind:
            continue
        shown = [of_kind[resolution] for resolution in sorted(of_kind)]
        how = {"color": colour, "capsize": 3, "marker": "o", "label": kind}
        heights = [each["mean"] for each in shown], [deviation(each) for each in shown]
        panels[1].errorbar([each["resolution"] for each in shown], *heights, **how)
        panels[2].errorbar([each["step"]["median_s"] for each in shown], *heights, **how)
    resolutions = sorted({each["resolution"] for each in variants})
    panels[1].set_xscale("log", base=2)
    panels[1].set_xticks(resolutions, [f"{resolution}^3" for resolution in resolutions])
    panels[2].set_xscale("log")
    panels[2].legend(frameon=False, fontsize=9)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in panels:
        style_panel(axis)
    frame.save_figure(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.resolution", __doc__)
    some = {"type": int, "choices": GRIDS, "nargs": "*", "metavar": "R"}
    frame.add_resolutions(parser, [16, 32], choices=GRIDS)
    parser.add_argument("--trivial", default=[16], help="where to train bounds of 1 too", **some)
    parser.add_argument("--dense", default=[], help="where to train the dense twin too", **some)
    files = "resolution.{csv,json,md,png}"
    add_options(parser, epochs=30, out="runs/resolution", files=files)
    return parser


if __name__ == "__main__":
    frame.run(main)
