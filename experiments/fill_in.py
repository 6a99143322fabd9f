"""How sparse data are, how convolutions fill them in, and how a bound stops it: the paper's figures 1 to 3.

    python -m experiments.fill_in                     # generated shapes, shipped digits: some minutes
    python -m experiments.fill_in --data kicad --data-dir ../shared/data/kicad
    python -m experiments.fill_in --figures layers    # of resolution, layers and activations
    python -m experiments.fill_in --resume            # goes on after the last whole part
    python -m experiments.fill_in --report            # writes experiments/results/fill_in* too

- resolution, figure 1: the density of occupied voxels falls as 1 / r, as a surface's does.
- layers, figure 3: the density behind convolutions of 3 x 3 x 3 whose weights are all 1, so that there is a
  response wherever the window meets an entry. Once with a slot for each site; and once under a bound, the
  density of the data, where the strongest responses stay.
- activations, figure 2: a channel of the first layers for some digits, of a dense net and of its sparse twin,
  trained alike for some hundred steps.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from experiments import frame
from experiments.data import sets
from experiments.fill_in_measure import (
    PIXELS,
    UNIFORM,
    Shapes,
    activations,
    digit_layers,
    occupancy,
    shape_layers,
    uniform_layers,
)
from experiments.fill_in_picture import layers_picture, resolution_picture

FIGURES = ("resolution", "layers", "activations")
COLUMNS = [
    *("figure", "data", "resolution", "rank", "samples", "points", "points_per_voxel", "network"),
    *("bound", "layer", "sample", "density", "density_p10", "density_p90", "growth", "expected"),
]
# What a run that goes on must have in common with the one before.
FIXED = (
    *("data", "samples", "resolutions", "layer_resolution", "layers"),
    *("density_bound", "epochs", "learning_rate", "seed"),
)
# With fewer points for each occupied voxel, too many voxels that the surface meets hold none: the count says
# how many points there are, and no longer how large the surface is.
ENOUGH_POINTS = 4.0

Row = dict[str, Any]
# Figure, data, resolution: what is measured in one go, and what --resume keeps.
Part = tuple[str, str, int]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Runs the experiment; returns the rows of the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.resolutions = sorted(set(options.resolutions))
    # Activations are digits': one data set is enough to show them.
    needed = FIGURES if options.data == "shapes" else FIGURES[:2]
    options.figures = options.figures or needed
    table = options.out / f"{options.data}.csv"
    path = table.with_suffix(".json")
    pictures = {name: options.out / f"{options.data}-{name}.png" for name in FIGURES}
    now = timing.provenance("experiments.fill_in", arguments)
    try:
        if options.report and not set(needed) <= set(options.figures):
            raise ValueError(
                f"--report replaces the whole report of --data {options.data}, but --figures is only "
                f"{' '.join(options.figures)}. Give {' '.join(needed)}; --resume keeps what is there."
            )
        shapes = Shapes(options)
        fixed = {name: getattr(options, name) for name in FIXED}
        fixed["fingerprint"] = shapes.fingerprint()
        goes_on = options.resume and path.exists()
        record = frame.earlier(path, fixed) if goes_on else now | {"options": fixed, "rows": []}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not goes_on:
        for picture in pictures.values():
            picture.unlink(missing_ok=True)
    # The nets of a picture that is missing are gone.
    drawn = pictures["activations"].exists()
    rows = [row for row in record["rows"] if row["figure"] != "activations" or drawn]
    pictures = {name: picture for name, picture in pictures.items() if name in options.figures}

    def write() -> None:
        frame.write_table(table, COLUMNS, rows)
        frame.write_json(path, record | {"rows": rows})

    with frame.Reporter() as reporter:
        reporter.print(timing.headline(now))
        parts = _parts(options, shapes, pictures, reporter)
        done = {(row["figure"], row["data"], row["resolution"]) for row in rows}
        todo = {part: measure for part, measure in parts.items() if part not in done}
        if goes_on and todo:
            record["resumed"] = [*record.get("resumed", []), now]
        write()
        for number, (part, measure) in enumerate(todo.items()):
            reporter.begin("parts", len(todo), number)
            for found in measure():
                rows.append(dict(zip(("figure", "data", "resolution"), part, strict=True)) | found)
                reporter.print(line(rows[-1]))
            write()
        draw(pictures, rows, shapes, options)
        stem = "fill_in" if options.data == "shapes" else f"fill_in-{options.data}"
        frame.publish(reporter, [table, path], options.report, stem)
        for name, picture in pictures.items():
            frame.publish(reporter, [picture], options.report, f"{stem}-{name}")
    return rows


def _parts(
    options: argparse.Namespace, shapes: Shapes, pictures: dict[str, Path], reporter: frame.Reporter
) -> dict[Part, Callable[[], list[Row]]]:
    """What there is to measure, in order."""
    grid = options.layer_resolution
    parts: dict[Part, Callable[[], list[Row]]] = {}
    if "resolution" in pictures:
        for r in options.resolutions:
            parts["resolution", options.data, r] = functools.partial(occupancy, shapes, r)
    if "layers" in pictures:
        for name in UNIFORM:
            parts["layers", name, grid] = functools.partial(uniform_layers, name, options)
        parts["layers", options.data, grid] = functools.partial(shape_layers, shapes, options)
        parts["layers", "digits", PIXELS] = functools.partial(digit_layers, options)
    if "activations" in pictures:
        parts["activations", "digits", PIXELS] = functools.partial(
            activations, pictures["activations"], options, reporter
        )
    return parts


def limited(row: Row) -> bool:
    """Whether there are too few points to meet nearly all voxels of a surface."""
    return "points_per_voxel" in row and row["points_per_voxel"] < ENOUGH_POINTS


def line(row: Row) -> str:
    """A row for the terminal."""
    words = [f"{row['figure']:11} {row['data']:13} r = {row['resolution']:<3}"]
    if "network" in row:
        words.append(f"digit {row['sample']}  {row['network']:6}")
    if "layer" in row:
        words.append(f"layer {row['layer']}")
    words.append(f"density {row['density']:8.3%}")
    if "density_p10" in row:
        words.append(f"({row['density_p10']:.3%} to {row['density_p90']:.3%})")
    if row.get("bound") is not None:
        words.append(f"bound {row['bound']:.3%}")
    if row.get("expected") is not None:
        words.append(f"expected {row['expected']:.3%}")
    if "points_per_voxel" in row:
        few = ", too few for the surface" if limited(row) else ""
        words.append(f"{row['points_per_voxel']:.2f} points a voxel{few}")
    return "  ".join(words)


def draw(
    pictures: dict[str, Path], rows: Sequence[Row], shapes: Shapes, options: argparse.Namespace
) -> None:
    """Draws the pictures that follow from the rows."""
    if "resolution" in pictures:
        members = [row for row in rows if row["figure"] == "resolution"]
        members.sort(key=lambda row: row["resolution"])
        resolution_picture(
            pictures["resolution"],
            members,
            shapes.examples(),
            limited=[limited(row) for row in members],
            constant=surface_constant(members),
        )
    if "layers" in pictures:
        grid = f"${options.layer_resolution}^3$"
        titles = dict.fromkeys(UNIFORM, f"uniformly random sites, {grid}")
        titles |= {options.data: f"{options.data}, {grid}", "digits": f"digits, ${PIXELS}^2$"}
        panels: dict[str, list[Row]] = {title: [] for title in titles.values()}
        for row in rows:
            if row["figure"] == "layers":
                panels[titles[row["data"]]].append(row)
        layers_picture(pictures["layers"], panels)


def surface_constant(rows: Sequence[Row]) -> float:
    """c of the line c / r through the densities that points suffice for; at least the coarsest one's."""
    coarsest = min(rows, key=lambda row: row["resolution"])
    fit = [row for row in rows if not limited(row)] or [coarsest]
    return math.exp(np.mean([math.log(row["density"] * row["resolution"]) for row in fit]))


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.fill_in", __doc__)
    add = parser.add_argument
    whole = frame.positive_int
    figures = "which to measure; by default all, but for activations where --data is not shapes"
    add("--figures", nargs="+", choices=FIGURES, help=figures)
    add("--data", choices=sets.NAMES, default="shapes", help="whose shapes are measured")
    sets.add_directory(parser)
    samples = "shapes of the test set that are measured, chosen at random, and digits"
    add("--samples", type=whole, default=48, metavar="N", help=samples)
    frame.add_resolutions(parser, (16, 32, 64, 128, 256))
    grid = "of each of the three axes, for the figure of the layers"
    add("--layer-resolution", type=whole, default=64, metavar="R", help=grid)
    add("--layers", type=whole, default=6, metavar="N", help="convolutions in a row")
    bound = "bound of the layers whose activations are shown"
    add("--density-bound", type=frame.density_bound, default=0.095, metavar="RHO", help=bound)
    epochs = "how long both nets are trained, 250 steps each; 0: they stay as they start"
    from_zero = frame.number(int, lambda n: n >= 0, "a whole number of at least 0")
    add("--epochs", type=from_zero, default=2, metavar="N", help=epochs)
    add("--learning-rate", type=frame.positive, default=0.01, metavar="RATE", help="Adagrad's rate")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of choice, sites and weights")
    frame.add_out(parser, "runs/fill_in")
    add("--resume", action="store_true", help="keep the parts that --out has already")
    frame.add_report(parser, "fill_in.{csv,json}, fill_in-FIGURE.png, or fill_in-DATA... too")
    return parser


if __name__ == "__main__":
    frame.run(main)
