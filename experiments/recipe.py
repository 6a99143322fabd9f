"""How to choose the numbers of `ilajax.optim.sparse_training`: one is varied at a time, on the demo's solids.

    python -m experiments.recipe                    # all sweeps; about seven minutes on one core
    python -m experiments.recipe --sweep threshold  # one of them
    python -m experiments.recipe --report           # the figures of docs/recipe.md

OctNet3 learns solids in 32^3 voxels. All nets of an optimizer share one compiled step, as the numbers are
arrays in the optimizer's state (`optax.inject_hyperparams`).
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import ilajax
from benchmarks.timing import headline, provenance
from experiments import frame
from experiments.activations import sparse_convs, sparse_densities
from experiments.data.solids import CLASSES, make_solids
from experiments.demo_net import BOUNDS, Data, density_bounds, make_net, structure, train_on_solids
from experiments.demo_picture import INK, style_panel, title_panel
from experiments.frame import Cells, summary_table
from experiments.training import Row, compact

Numbers = dict[str, float]

OPTIMIZERS = {
    "Adam 4e-4": optax.adam(4e-4),
    # With 0.01 the net stayed at chance in a trial, without the regulariser too.
    "Adagrad 0.001": optax.adagrad(0.001, initial_accumulator_value=0.0),
}
ADAM, ADAGRAD = OPTIMIZERS
# What the sweeps start from.
BASE: Numbers = {
    "scale": 0.003,
    "offset": 0.1,
    "b1": 0.1,
    "b2": 0.1,
    "momentum": 0.0,
    "threshold": 0.07,
}


class Sweep(NamedTuple):
    """One number of `BASE`, or the seed, varied."""

    title: str
    name: str
    values: tuple[float, ...]
    optimizer: str = ADAM
    scale: float = BASE["scale"]
    drawn: bool = True


SWEEPS = {
    "threshold": Sweep("threshold", "threshold", (0.0, 0.03, 0.07, 0.1, 0.15)),
    "scale": Sweep(f"scale, {ADAM}", "scale", (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "scale-adagrad": Sweep(f"scale, {ADAGRAD}", "scale", (0.0, 0.003, 0.03, 0.1), ADAGRAD),
    "offset": Sweep("offset, scale 0.03", "offset", (0.0, 0.1, 0.3), scale=0.03),
    "seed": Sweep("seed", "seed", (0, 1, 2), drawn=False),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains a net for each value of each sweep; returns what was measured, as in the JSON file."""
    began = time.perf_counter()
    options = _parser().parse_args(arguments)
    record: dict[str, Any] = provenance("experiments.recipe", arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    record["options"] = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
    record["bounds"] = BOUNDS[options.resolution]
    record["base"] = BASE
    training = make_solids(options.train_size, options.resolution, seed=0)
    data = training, make_solids(options.test_size, options.resolution, seed=1)
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    record["sweeps"] = {}
    with frame.Reporter() as reporter:
        reporter.print(headline(record))
        for name in options.sweep or SWEEPS:
            sweep = SWEEPS[name]
            results = []
            for value in sweep.values:
                chosen = {"seed": options.seed, **BASE, "scale": sweep.scale, sweep.name: value}
                seed, numbers = int(chosen["seed"]), {number: chosen[number] for number in BASE}
                # Sweeps meet in BASE, which is trained once.
                key = (sweep.optimizer, seed, *numbers.values())
                if key not in done:
                    label = f"{name} {value:g}"
                    how = (sweep.optimizer, numbers, seed)
                    done[key] = _train(options, label, *how, data, reporter)
                results.append({"value": value, **done[key]})
            record["sweeps"][name] = results
        record["seconds"] = time.perf_counter() - began

        written = [options.out / f"recipe.{suffix}" for suffix in ("md", "json", "png")]
        reporter.print(summary_table(summary_cells(record)))
        _write(written[0], record)
        frame.write_json(written[1], record)
        _draw(written[2], record)
        reporter.print(f"{frame.minutes(record['seconds'])} minutes")
        frame.publish(reporter, written, options.report, "recipe")
    return record


@functools.cache
def _recipe(resolution: int, optimizer: str) -> optax.GradientTransformationExtraArgs:
    """The recipe with its numbers in its state; the same object for all nets, so that none compiles anew."""
    made = functools.partial(
        ilajax.optim.sparse_training, structure(resolution), OPTIMIZERS[optimizer]
    )
    return optax.inject_hyperparams(made, static_args="wrt")(**BASE)


def _train(
    options: argparse.Namespace,
    name: str,
    optimizer_name: str,
    numbers: Numbers,
    seed: int,
    data: Data,
    reporter: frame.Reporter,
) -> dict[str, Any]:
    """Trains a net; returns its epochs, and the weights of each sparse layer at the start and after each."""
    model = make_net(jax.random.key(seed), resolution=options.resolution)
    recipe = _recipe(options.resolution, optimizer_name)
    optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
    for number, value in numbers.items():
        optimizer.opt_state.hyperparams[number].set_value(jnp.asarray(value, jnp.float32))
    bounds = density_bounds(model)
    weights = [_weights(model)]

    def densities(model: nnx.Module) -> dict[str, float]:
        weights.append(_weights(model))
        return sparse_densities(model)

    rows = train_on_solids(
        options,
        data,
        reporter,
        name=name.replace(" ", "-"),
        model=model,
        optimizer=optimizer,
        seed=seed,
        densities=densities,
        after_epoch=compact,
    )
    return {
        "optimizer": optimizer_name,
        "numbers": numbers,
        "seed": seed,
        "fan_in": [math.prod(conv.kernel_shape[:-1]) for conv in sparse_convs(model)],
        "gradient": _gradient(model, optimizer),
        "weights": weights,
        "rows": [row | _excess(row, bounds) for row in rows],
    }


def _weights(model: nnx.Module) -> list[int]:
    """Weights of each sparse layer that are not 0: pruned ones are, before `compact` takes them out."""
    return [int(jnp.count_nonzero(conv.kernel[...])) for conv in sparse_convs(model)]


def _gradient(model: nnx.Module, optimizer: nnx.Optimizer) -> list[float]:
    """Root mean square of each live filter's gradients over the run, regulariser included.

    Read off the optimizer's squares: Adam's are a mean over about the last thousand steps, Adagrad's a sum.
    """
    find = functools.partial(optax.tree.get, optimizer.opt_state)
    nu, steps = find("nu"), int(optimizer.step[...])
    mean = find("sum_of_squares") if nu is None else nu
    share = steps if nu is None else 1 - 0.999**steps
    squares = dict(nnx.to_flat_state(mean))
    found = []
    for path, conv in sorted(ilajax.nn.iter_convs(model)):
        live = jnp.abs(conv.kernel[...]) > 0
        total = jnp.sum(jnp.where(live, squares[*path, "kernel"][...], 0)) / share
        found.append(float(jnp.sqrt(total / jnp.maximum(1, live.sum()))))
    return found


def _excess(row: Row, bounds: Mapping[str, float]) -> Row:
    """How far the densities of an epoch's last step stand above their bounds: difference, and quotient."""
    pairs = [(row[f"density_{name}"], bound) for name, bound in bounds.items()]
    excess = sum(density - bound for density, bound in pairs) / len(pairs)
    return {"excess": excess, "fill": sum(density / bound for density, bound in pairs) / len(pairs)}


def _left(result: Mapping[str, Any]) -> list[float]:
    """Share of the sparse layers' weights that is left, at the start and after each epoch."""
    counts = [sum(layers) for layers in result["weights"]]
    return [count / counts[0] for count in counts]


def summary_cells(record: Mapping[str, Any]) -> list[Cells]:
    cells: list[Cells] = [
        (
            *("varied", "value", "test accuracy", "sparse weights left", "mean excess density"),
            *("mean density / bound", "most pruned", "RMS gradient of filters"),
        )
    ]
    for named, result in _named(record):
        last, left = result["rows"][-1], _left(result)
        gone = [before - after for before, after in itertools.pairwise(left)]
        most = f"epoch {1 + gone.index(max(gone))} ({max(gone):.0%})" if max(gone) else "nothing"
        gradient = math.sqrt(sum(g * g for g in result["gradient"]) / len(result["gradient"]))
        densities = (f"{last['excess']:+.3f}", f"{last['fill']:.2f}")
        shares = (f"{last['test_accuracy']:.1%}", f"{left[-1]:.1%}")
        cells.append((*named, *shares, *densities, most, f"{gradient:.4f}"))
    return cells


def _epochs(record: Mapping[str, Any]) -> list[Cells]:
    """Test accuracy and weights left after each epoch."""
    count = record["options"]["epochs"]
    cells: list[Cells] = [("varied", "value", *(f"epoch {n}" for n in range(1, count + 1)))]
    for named, result in _named(record):
        epochs = zip(result["rows"], _left(result)[1:], strict=True)
        shown = (f"{row['test_accuracy']:.1%}, {left:.0%}" for row, left in epochs)
        cells.append((*named, *shown))
    return cells


def _named(record: Mapping[str, Any]) -> Iterator[tuple[Cells, dict[str, Any]]]:
    """Each result with what was varied, and the value."""
    for name, results in record["sweeps"].items():
        for result in results:
            yield (SWEEPS[name].title, f"{result['value']:g}"), result


def _layers(results: Sequence[Mapping[str, Any]]) -> list[Cells]:
    """What the first pruning takes of filters with the same fan-in, by the rule of thumb and measured."""
    pruning = [result for result in results if result["value"] and len(result["weights"]) > 2]
    if not pruning:
        return []
    cells: list[Cells] = [("fan-in", "sigma", *(f"below {r['value']:g}" for r in pruning))]
    for fan_in in sorted(set(pruning[0]["fan_in"])):
        sigma, shown = math.sqrt(2 / fan_in), []
        for result in pruning:
            start, _, after = (
                sum(c for c, f in zip(counts, result["fan_in"], strict=True) if f == fan_in)
                for counts in result["weights"][:3]
            )
            rule = math.erf(result["value"] / (sigma * math.sqrt(2)))
            shown.append(f"{rule:.0%}, {1 - after / start:.0%}")
        cells.append((str(fan_in), f"{sigma:.3f}", *shown))
    return cells


def _write(path: Path, record: Mapping[str, Any]) -> None:
    options = record["options"]
    bounds, base = ", ".join(map(str, record["bounds"])), record["base"]
    blocks: list[str | list[Cells]] = [
        "# The numbers of the recipe",
        f"`{record['command']}`",
        f"{headline(record)}; {frame.minutes(record['seconds'])} minutes.",
        f"OctNet3 on solids in {options['resolution']}^3 voxels, bounds {bounds}. "
        f"{options['train_size']:,} solids to train, {options['batch_size']} a step; "
        f"{options['test_size']:,} to test; {options['epochs']} epochs; {ADAM}. Where nothing else is said: "
        f"{', '.join(f'{name} {value:g}' for name, value in base.items())}, seed {options['seed']}. "
        "Densities are those of the last step, as means over the sparse layers.",
        "![](recipe.png)",
        summary_cells(record),
        "Test accuracy, and sparse weights left, after each epoch:",
        _epochs(record),
    ]
    if layers := _layers(record["sweeps"].get("threshold", ())):
        rule = (
            "What the first pruning takes: by the rule erf(threshold / (sigma sqrt 2)), and measured at the "
            "second epoch's end:"
        )
        blocks += [rule, layers]
    frame.write_page(path, *blocks)


def _draw(path: Path, record: Mapping[str, Any]) -> None:
    """A row of curves for each drawn sweep: test accuracy, weights left, density over bound."""
    shown = [name for name in record["sweeps"] if SWEEPS[name].drawn]
    if not shown:
        return
    figure = Figure(figsize=(9, 0.5 + 1.9 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 3, squeeze=False, sharex=True)
    rows = [row for name in shown for result in record["sweeps"][name] for row in result["rows"]]
    fullest = max(1.0, *(row["fill"] for row in rows))
    titles = ("test accuracy", "sparse weights left", "mean density / bound")
    for axis, title in zip(grid[0], titles, strict=True):
        title_panel(axis, title)
    for axis in grid[-1]:
        axis.set_xlabel("epoch", fontsize=9, color=INK)
    for name, axes in zip(shown, grid, strict=True):
        results = record["sweeps"][name]
        for at, result in enumerate(results):
            style: dict[str, Any] = {
                "color": colormaps["viridis_r"](0.12 + 0.88 * at / max(1, len(results) - 1))
            }
            style |= {"label": f"{result['value']:g}", "lw": 1.8, "marker": "o", "ms": 3.5}
            epochs = range(1, len(result["rows"]) + 1)
            axes[0].plot(epochs, [row["test_accuracy"] for row in result["rows"]], **style)
            axes[1].plot([0, *epochs], _left(result), **style)
            axes[2].plot(epochs, [row["fill"] for row in result["rows"]], **style)
        axes[0].set_ylabel(SWEEPS[name].title, fontsize=10, color=INK, weight="bold")
        axes[0].axhline(1 / len(CLASSES), color="0.6", lw=1, ls=":")
        axes[2].axhline(1, color="0.6", lw=1, ls=":")
        axes[2].set_ylim(0, 1.05 * fullest)
        for axis in axes[:2]:
            axis.set_ylim(0, 1.04)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[2].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for axis in axes:
            style_panel(axis)
    frame.save_figure(figure, path, dpi=200)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.recipe", __doc__)
    add = parser.add_argument
    add("--sweep", action="append", choices=list(SWEEPS), help="what to vary; may be repeated")
    add("--resolution", type=int, choices=sorted(BOUNDS), default=32, help="of the grid")
    add("--epochs", type=frame.positive_int, default=6, metavar="N", help="epochs")
    add("--train-size", type=frame.positive_int, default=200, metavar="N", help="solids to train")
    add("--test-size", type=frame.positive_int, default=160, metavar="N", help="solids to test")
    add("--batch-size", type=frame.positive_int, default=8, metavar="N", help="solids a step")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights, order and dropout")
    frame.add_out(parser, "runs/recipe")
    frame.add_report(parser, "recipe.md, recipe.json and recipe.png")
    return parser


if __name__ == "__main__":
    frame.run(main, resumes=False)
