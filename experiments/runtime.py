"""Runtime of a convolution against resolution, sparse and dense: the paper's figure 4.

    python -m experiments.runtime                                 # r = 16 to 256, some minutes
    python -m experiments.runtime --data shell                    # a thin surface instead of random sites
    python -m experiments.runtime --data shapes                   # or kicad, modelnet40, with --data-dir
    python -m experiments.runtime --resolutions 16 32 64 --filter-densities 0.1 1
    python -m experiments.runtime --resume                        # goes on after the last whole resolution
    python -m experiments.runtime --report        # writes experiments/results/runtime.{csv,json,png} too

Batch 1, 1 -> 8 channels, rho = rho_up = 1 / r; a shape of a data set has the density that it has, which is
then the bound. Filters have a share rho_f of their weights, once with
random signs, so that the selection has to choose, and once such that there is nothing to cut. The dense
convolutions of XLA and, where it is installed, PyTorch get the same data and compute the same. All of
one resolution is timed in turn, so that ratios hold.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.pyplot import get_cmap

import ilajax
from benchmarks import peers, timing, workloads
from benchmarks.layers import Layer
from experiments import frame
from experiments.data import sets

OUT_CHANNELS = 8
PEERS = {"xla": "XLA dense", "torch": "PyTorch dense"}
DENSE = tuple(PEERS.values())
FIT_FROM = 64  # the exponent's least resolution: below it a call costs more than the work
COLUMNS = [
    *("data", "resolution", "network", "rho_f", "cut", "input_entries", "responses_max"),
    *("median_s", "min_s", "max_s", "calls", *(f"times {name}" for name in DENSE)),
]
# What a run that goes on must have in common with the one before.
FIXED = ("data", "filter_densities", "seed")

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Runs the experiment; returns the rows of the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    path = options.out / f"{options.data}.json"
    try:
        source = training_set(options)
        fixed = {name: getattr(options, name) for name in FIXED}
        if source is not None:
            fixed["fingerprint"] = source.sets.fingerprint()
        rows = frame.earlier(path, fixed)["rows"] if options.resume and path.exists() else []
        done = {row["resolution"] for row in rows}
        # All inputs before the table, which replaces an earlier one.
        missing = sorted(set(options.resolutions) - done)
        todo = {r: features(r, options, source) for r in missing}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record = timing.provenance("experiments.runtime", arguments) | {"options": fixed}
    written = [path.with_suffix(suffix) for suffix in (".csv", ".json", ".png")]
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))
        reporter.begin("resolutions", len(todo), 0)
        for resolution, x in todo.items():
            for row in measure(x, options):
                rows.append(row)
                reporter.print(line(row))
            frame.write_table(written[0], COLUMNS, rows)
            frame.write_json(path, record | {"rows": rows, "exponents": exponents(rows)})
            reporter.step(f"r = {resolution}")
        for entry in exponents(rows):
            reporter.print(
                f"time ~ entries^{entry['exponent']:.2f}, r >= {FIT_FROM}: {legend(entry)}"
            )
        draw(path.with_suffix(".png"), rows, options.data)
        stem = "runtime" if options.data == "uniform" else f"runtime-{options.data}"
        frame.publish(reporter, written, options.report, stem)
    return rows


def measure(x: ilajax.SparseTensor, options: argparse.Namespace) -> list[Row]:
    """The rows of one input, all timed in one go."""
    # The dense convolutions do not care how many weights are 0, so they compute the first layer only.
    layers: dict[tuple[str, float | None, bool | None], Layer] = {}
    calls = {}
    for cut in (True, False):
        for density in options.filter_densities:
            kernel = workloads.kernel(
                1, OUT_CHANNELS, density=density, cut=cut, seed=options.seed + 1
            )
            layer = Layer(x, kernel, jnp.zeros(OUT_CHANNELS), x.capacity)
            against = [] if calls else [PEERS[name] for name in options.against]
            candidates, _ = peers.comparison(layer, against)
            name = ("ilajax", density, cut)
            layers[name], calls[name] = layer, candidates.pop("ilajax")
            calls |= {(other, None, None): call for other, call in candidates.items()}
    timings = timing.side_by_side(calls, budget=options.budget)
    rows = []
    for name in calls:
        seconds = timings.seconds(name)
        row = {
            "data": options.data,
            "resolution": x.spatial_shape[0],
            **dict(zip(("network", "rho_f", "cut"), name, strict=True)),
            "input_entries": int(x.counts.sum()),
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "calls": len(seconds),
        }
        if name in layers:
            row["responses_max"] = int(layers[name].output.responses.max())
            for other in DENSE:
                if (other, None, None) in calls:
                    row[f"times {other}"] = timings.ratio((other, None, None), name)
        rows.append(row)
    return rows


def training_set(options: argparse.Namespace) -> Any:
    """The source that the sample is of; None for sites drawn at random.

    Made shapes have as many points as the finest grid needs, so that the sample is the same in each.
    """
    if options.data not in sets.NAMES:
        sets.check_directory(options.data, **sets.where(options))
        return None
    finest = max(options.resolutions)
    return sets.load_dataset(options.data, **sets.where(options), resolution=finest).training


def features(resolution: int, options: argparse.Namespace, source: Any) -> ilajax.SparseTensor:
    """One sample of one channel, with hardly more slots than entries; of a set a random one."""
    if source is not None:
        grid = dataclasses.replace(source, resolution=resolution, capacity=resolution**3)
        chosen = np.random.default_rng(options.seed).choice(len(source), 1)
        x = grid.batch(chosen, epoch=0).inputs
        slots = int(x.counts.max())
        keys, values = jnp.asarray(x.keys[..., :slots]), jnp.asarray(x.values[..., :slots])
        return ilajax.SparseTensor(keys, values, x.spatial_shape)
    slots, seed = ilajax.capacity(1 / resolution, (resolution,) * 3), options.seed
    if options.data == "uniform":
        return workloads.random_sites(resolution, capacity=slots, seed=seed)
    radius = workloads.fitting_radius(resolution, slots)
    return workloads.shell(resolution, subset=None, radius=radius, capacity=slots, seed=seed)


def exponents(rows: Sequence[Row]) -> list[Row]:
    """For each line of the picture, the power of the stored entries that its time goes with."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["resolution"] >= FIT_FROM:
            lines.setdefault((row["network"], row["rho_f"], row["cut"]), []).append(row)
    found = []
    for name, members in lines.items():
        if len(members) > 1:
            entries = [row["input_entries"] for row in members]
            power = timing.exponent(entries, [row["median_s"] for row in members])
            named = dict(zip(("network", "rho_f", "cut"), name, strict=True))
            found.append(named | {"exponent": power})
    return found


def legend(row: Row) -> str:
    """What a row's line is called."""
    if row["rho_f"] is None:
        return row["network"]
    return f"{row['network']}, rho_f = {row['rho_f']:g}, {'cut' if row['cut'] else 'nothing cut'}"


def line(row: Row) -> str:
    """A row for the terminal."""
    times = ", ".join(f"{row[f'times {o}']:.3g}x {o}" for o in DENSE if f"times {o}" in row)
    spread = f"{timing.show(row['min_s'])} to {timing.show(row['max_s'])}"
    return (
        f"r = {row['resolution']:<4} {legend(row):34} {timing.show(row['median_s']):>9}"
        f"  ({spread}, {row['calls']} calls)  {times}"
    ).rstrip()


def draw(path: Path, rows: Sequence[Row], data: str) -> None:
    """Time against resolution, both logarithmic: a line for each rho_f, the dense ones dashed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(
        rf"{data}: 1 $\to$ {OUT_CHANNELS} channels, $\rho = \rho_{{up}} \approx 1/r$", fontsize=11
    )
    densities = sorted({row["rho_f"] for row in rows if row["rho_f"] is not None})
    colours = get_cmap("viridis_r")
    resolutions = sorted({row["resolution"] for row in rows})
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cut in zip(axes, (True, False), strict=True):
        for at, density in enumerate(densities):
            members = [row for row in rows if (row["rho_f"], row["cut"]) == (density, cut)]
            colour = colours(0.1 + 0.9 * at / max(1, len(densities) - 1))
            _plot(axis, members, rf"sparse, $\rho_f$ = {density:g}", color=colour, marker="o")
        for name, colour in zip(DENSE, ("0.2", "0.6"), strict=True):
            members = [row for row in rows if row["network"] == name]
            _plot(axis, members, name, color=colour, linestyle="--", marker="s")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(resolutions, [f"${r}^3$" for r in resolutions])
        axis.set_title("with selection" if cut else "nothing to cut", fontsize=10)
        axis.set_xlabel("resolution")
        axis.grid(which="major", color="0.9")
    axes[0].set_ylabel("time [s]")
    axes[1].legend(fontsize=8, frameon=False)
    frame.save_figure(figure, path)


def _plot(axis: Any, rows: Sequence[Row], label: str, **style: Any) -> None:
    if rows:
        ordered = sorted(rows, key=lambda row: row["resolution"])
        x = [row["resolution"] for row in ordered]
        axis.plot(x, [row["median_s"] for row in ordered], label=label, markersize=4, **style)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.runtime", __doc__)
    add = parser.add_argument
    frame.add_resolutions(parser, (16, 32, 64, 128, 256))
    share, densities = frame.density_bound, [0.1, 0.2, 0.5, 1.0]
    live = "shares of live weights, in (0, 1]"
    add("--filter-densities", type=share, nargs="+", default=densities, metavar="RHO_F", help=live)
    data = "random sites, a sphere's shell, or a shape of a data set"
    add("--data", choices=("uniform", "shell", *sets.NAMES), default="uniform", help=data)
    sets.add_directory(parser)
    dense = "dense convolutions to compare with, where they are installed"
    add("--against", nargs="*", choices=tuple(PEERS), default=list(PEERS), help=dense)
    budget = "seconds for each candidate"
    add("--budget", type=frame.positive, default=2.0, metavar="S", help=budget)
    add("--seed", type=frame.seed, default=0, metavar="N", help="of data and filters")
    frame.add_out(parser, "runs/runtime")
    resume = "keep the resolutions that --out has already; of shapes, the finest must be the same"
    add("--resume", action="store_true", help=resume)
    frame.add_report(parser, "runtime.{csv,json,png}, or runtime-DATA for other data, too")
    return parser


if __name__ == "__main__":
    frame.run(main)
