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
import json
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
    options.figures = options.figures or _all_figures(options.data)
    path = options.out / f"{options.data}.json"
    now = timing.provenance("experiments.fill_in", arguments)
    try:
        _check_report(options)
        sets.check_directory(options.data, **sets.where(options))
        shapes = Shapes(options)
        fixed = {name: getattr(options, name) for name in FIXED}
        fixed["fingerprint"] = shapes.fingerprint()
        goes_on = options.resume and path.exists()
        record, rows = _kept(path, fixed) if goes_on else (now | {"options": fixed}, [])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not goes_on:
        _start_anew(path, record)
    pictures = {name: _picture(path, name) for name in options.figures}
    table = frame.Table(path.with_suffix(".csv"), COLUMNS, rows)
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(now))
        parts = _parts(options, shapes, pictures, reporter)
        done = {(row["figure"], row["data"], row["resolution"]) for row in rows}
        todo = {part: measure for part, measure in parts.items() if part not in done}
        if goes_on and todo:
            record["resumed"] = [*record.get("resumed", []), now]
        for number, (part, measure) in enumerate(todo.items()):
            reporter.begin("parts", len(todo), number)
            for found in measure():
                row = dict(zip(("figure", "data", "resolution"), part, strict=True)) | found
                rows.append(row)
                table.append(row)
                reporter.print(line(row))
            frame.write_json(path, record | {"rows": rows})
        draw(pictures, rows, shapes, options)
        files = {path.with_suffix(".csv"): "", path: ""}
        files |= {picture: f"-{name}" for name, picture in pictures.items()}
        written = [*files, *_report(files, options)]
        reporter.print("wrote " + ", ".join(map(str, written)))
    return rows


def _report(files: dict[Path, str], options: argparse.Namespace) -> list[Path]:
    """Copies files, each under a stem with an ending of its own, where --report says."""
    stem = "fill_in" if options.data == "shapes" else f"fill_in-{options.data}"
    copies = []
    for file, ending in files.items() if options.report else ():
        copies += frame.report(options.report, stem + ending, [file])
    return copies


def _all_figures(data: str) -> list[str]:
    """Activations are digits': one data set is enough to show them."""
    return [name for name in FIGURES if data == "shapes" or name != "activations"]


def _check_report(options: argparse.Namespace) -> None:
    """Raises ValueError where a report would lose figures that it had."""
    needed = _all_figures(options.data)
    if options.report and not set(needed) <= set(options.figures):
        raise ValueError(
            f"--report replaces the whole report of --data {options.data}, but --figures is only "
            f"{' '.join(options.figures)}. Give {' '.join(needed)}; --resume keeps what is there."
        )


def _picture(path: Path, figure: str) -> Path:
    """A figure's picture, beside the record."""
    return path.with_name(f"{path.stem}-{figure}.png")


def _start_anew(path: Path, record: Row) -> None:
    """Removes what an earlier run measured: this one may be stopped, and go on from its record."""
    frame.write_json(path, record | {"rows": []})
    for figure in FIGURES:
        _picture(path, figure).unlink(missing_ok=True)


def _kept(path: Path, fixed: Row) -> tuple[Row, list[Row]]:
    """The record of an earlier run, without its rows; and those that need not be measured again."""
    # The nets of a picture that is missing are gone.
    drawn = _picture(path, "activations").exists()
    try:
        record = json.loads(path.read_text())
        options, rows = record["options"], record.pop("rows")
        kept = [row for row in rows if row["figure"] != "activations" or drawn]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume: {path} is damaged ({type(error).__name__}: {error}). Start anew without --resume."
        ) from None
    if options != fixed:
        raise ValueError(f"--resume: {path} was made with {options}, not with {fixed}")
    return record, kept


def _parts(
    options: argparse.Namespace,
    shapes: "Shapes",
    pictures: dict[str, Path],
    reporter: frame.Reporter,
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
        members = sorted(
            (row for row in rows if row["figure"] == "resolution"),
            key=lambda row: row["resolution"],
        )
        short = [limited(row) for row in members]
        resolution_picture(
            pictures["resolution"],
            members,
            shapes.examples(),
            limited=short,
            constant=surface_constant(members),
        )
    if "layers" in pictures:
        grid = f"${options.layer_resolution}^3$"
        titles = dict.fromkeys(UNIFORM, f"uniformly random sites, {grid}")
        titles |= {
            options.data: f"{options.data}, {grid}",
            "digits": f"digits, ${PIXELS}^2$",
        }
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
