"""What to keep, an ablation that the paper lacks: three selections, with and without the density bias.

    python -m experiments.attention                       # solids made on the spot, in 16^3 voxels; minutes
    python -m experiments.attention --data kicad --data-dir FOLDER --seeds 3 --report
    python -m experiments.attention --selections positive magnitude --bounds 0.06 0.33
    python -m experiments.attention --resume              # goes on where a run was stopped

--report writes experiments/results/attention.{csv,json,md,png} too. A selection keeps the largest positive
responses, the largest values, or the largest magnitudes; after the last two comes a ReLU. The density bias
pushes channels under their bound, so that selection has less to cut. The first block has the bound, the
others twice as much, at most 1.
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
    deviation,
    layer_cells,
    mean_over_seeds,
    paper_bounds,
    summary_cells,
    train_variants,
)

SELECTIONS = {"positive": "#0072b2", "value": "#e69f00", "magnitude": "#c8442b"}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns its record, as the JSON file has it."""
    return train_variants("experiments.attention", _parser(), arguments, _variants, _finish)


def _variants(options: argparse.Namespace) -> list[Variant]:
    blocks = len(paper_bounds(options.resolution))
    return [
        Variant(
            f"{select}, bound {bound:g}" + (f", scale {scale:g}" if scale else ""),
            options.resolution,
            (bound, *(min(1.0, 2 * bound) for _ in range(blocks - 1))),
            select,
            scale,
        )
        for bound in sorted(set(options.bounds))
        for scale in dict.fromkeys((0.0, options.scale))
        for select in dict.fromkeys(options.selections)
    ]


def _finish(record: dict[str, Any], written: Sequence[Path]) -> list[Cells]:
    """Writes the page and the picture; returns the table."""
    head, *lines = summary_cells(record)
    cells = [(*head, "channels above their bound")]
    for line, each in zip(lines, record["variants"], strict=True):
        cells.append((*line, f"{mean_over_seeds(each, 'over_bound')[-1]:.0%}"))
    page, picture = written
    frame.write_page(
        page,
        "# Attention",
        about(record),
        f"{timing.headline(record)}.",
        "Channels above their bound: in the steps of the last epoch, those of whose responses selection cuts "
        "some.",
        cells,
        "![](attention.png)",
        "What the bounds cut, on a batch to train on, in the first seed's net: share of the sites with a "
        "response before the selection and behind it, as means over the channels. Before the ReLU a value "
        "or a magnitude is a response, whatever its sign.",
        layer_cells(record),
    )
    _draw(picture, record)
    return cells


def _draw(path: Path, record: dict[str, Any]) -> None:
    """Accuracy and time against the bound, and the channels that are cut by epoch."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axis in panels:
        style_panel(axis)
    variants = record["variants"]
    titles = ("test accuracy", "seconds of a step", "channels above their bound")
    for axis, title in zip(panels, titles, strict=True):
        title_panel(axis, title)
    bounds = sorted({each["bounds"][0] for each in variants})
    for scale in sorted({each["scale"] for each in variants}):
        for select, colour in SELECTIONS.items():
            shown = [v for v in variants if v["select"] == select and v["scale"] == scale]
            if not shown:
                continue
            drawn = [each["bounds"][0] for each in shown]
            label = select + (f", scale {scale:g}" if scale else "")
            how = {"color": colour, "ls": "--" if scale else "-", "label": label}
            means = [each["mean"] for each in shown]
            panels[0].errorbar(drawn, means, [deviation(v) for v in shown], capsize=3, **how)
            panels[1].plot(drawn, [each["step"]["median_s"] for each in shown], marker="o", **how)
            strict = next(each for each in shown if each["bounds"][0] == bounds[0])
            curve = mean_over_seeds(strict, "over_bound")
            panels[2].plot(range(1, len(curve) + 1), curve, **how)
    for axis in panels[:2]:
        axis.set_xlabel("bound of the first block", fontsize=9, color=INK)
        axis.set_xscale("log")
        axis.set_xticks(bounds, [f"{bound:g}" for bound in bounds])
        axis.minorticks_off()
    panels[2].set_xlabel(f"epoch, bound {bounds[0]:g}", fontsize=9, color=INK)
    for axis in (panels[0], panels[2]):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in panels[1:]:
        axis.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    frame.save_figure(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.attention", __doc__)
    add = parser.add_argument
    add("--selections", choices=SELECTIONS, nargs="+", default=list(SELECTIONS), help="to compare")
    bounds = "bounds of the first block"
    add("--bounds", type=frame.density_bound, nargs="+", default=[0.06, 0.33], help=bounds)
    scale = "of the density-biased L2 that every selection is trained with, too; 0: without alone"
    add("--scale", type=frame.not_negative, default=0.03, metavar="S", help=scale)
    add_resolution(parser, 16)
    files = "attention.{csv,json,md,png}"
    add_options(parser, epochs=30, out="runs/attention", files=files)
    return parser


if __name__ == "__main__":
    frame.run(main)
