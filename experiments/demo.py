"""What the system is for, in one command: a net for 64^3 voxels that gets smaller as it learns.

    python -m experiments.demo                     # trains, measures, draws; some minutes on two cores
    python -m experiments.demo --plain             # the same net without regulariser and pruning
    python -m experiments.demo --report --seeds 3  # the documentation's figures

OctNet3 learns eight classes of solids, made on the spot. The regulariser pushes its densities towards their
bounds, small weights are pruned after each epoch, and the kernels skip what is gone. Then whole training
steps are timed beside the dense twin's, and each sparse layer with the filters before and after training.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from benchmarks import peers, pytorch
from benchmarks.timing import headline, provenance, show, side_by_side
from experiments import demo_measure, frame
from experiments.activations import feature_maps
from experiments.data.solids import CLASSES, Solids, SparseInput, make_solids
from experiments.demo_net import BOUNDS, Data, Trained, make_net, net_and_optimizer, train_net
from experiments.demo_picture import demo_picture
from experiments.frame import Cells, summary_table
from experiments.training import as_it_is


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the demonstration; returns what it measured, as in its JSON file."""
    began = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.train_size < options.batch_size:
        parser.error(f"--batch-size {options.batch_size} is more than --train-size.")
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = provenance("experiments.demo", arguments)
    with frame.Reporter() as reporter:
        reporter.print(headline(record))
        training = make_solids(options.train_size, options.resolution, seed=0)
        test = make_solids(options.test_size, options.resolution, seed=1)
        sites = options.resolution**3
        reporter.print(
            f"{len(training):,} solids to train, {len(test):,} to test, in {options.resolution}^3 voxels, "
            f"of which {training.counts().mean() / sites:.1%} are set."
        )
        reporter.print(
            "densities: share of sites with a response above 0 behind each sparse layer, before the "
            "selection, and its bound"
        )
        trained = train_net(options, options.seed, (training, test), reporter, plain=options.plain)
        record["options"] = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
        record["epochs"] = list(trained.rows)
        record["weights"] = {"initial": trained.initial, "left": list(trained.weights)}

        batch = jnp.asarray(test.keys[: options.batch_size])
        maps = feature_maps(trained.model, SparseInput(test.resolution)(batch))
        written = [options.out / f"demo.{suffix}" for suffix in ("md", "json", "png")]
        _draw(written[2], trained, test, maps)
        reporter.print("timing the sparse layers, and whole steps beside the dense twin's ...")
        layers = _time_layers(options, trained, maps, record)
        steps = _time_steps(options, trained, test, record)
        record["seconds"] = time.perf_counter() - began
        tables = [_summary(trained, record), steps, layers]
        if options.seeds:
            tables.append(_seeds(options, trained, (training, test), reporter, record))
        for cells in tables:
            reporter.print(summary_table(cells))
        without = ", without --seeds" if options.seeds else ""
        reporter.print(f"{frame.minutes(record['seconds'])} minutes in all{without}")

        page = ("# Solids", f"`{record['command']}`", f"{headline(record)}.", "![](demo.png)")
        frame.write_page(written[0], *page, *tables, _epochs(trained))
        frame.write_json(written[1], record)
        frame.publish(reporter, written, options.report, "demo")
    return record


def _draw(path: Path, trained: Trained, test: Solids, maps: dict[str, Any]) -> None:
    shown = SparseInput(test.resolution)(jnp.asarray(test.keys[: len(CLASSES)]))
    grids = np.asarray(ilajax.to_dense(shown))[..., 0] > 0
    solids = {CLASSES[label]: grid for label, grid in zip(test.labels, grids, strict=False)}
    kept = {"input": np.asarray(ilajax.to_dense(maps["input"]))[-1, ..., 0]}
    for block in range(1, trained.model.num_sparse_blocks + 1):
        strength = np.asarray(ilajax.to_dense(maps[f"conv{3 * block}"]))[-1]
        # All channels together cover the solid's surroundings; one shows what a filter looks for.
        channel = strength[..., strength.sum(axis=(0, 1, 2)).argmax()]
        kept[f"block {block}: {np.count_nonzero(channel):,} of {len(channel)}³ sites"] = channel
    weights = [1.0, *(count / trained.initial for count in trained.weights)]
    demo_picture(path, solids, kept, trained.rows, weights)


def _time_layers(
    options: argparse.Namespace, trained: Trained, maps: dict[str, Any], record: dict[str, Any]
) -> list[Cells]:
    initial = make_net(jax.random.key(options.seed), resolution=options.resolution)
    times = demo_measure.layer_times(initial, trained.model, maps, budget=options.budget / 8)
    record["layers"] = [layer._asdict() for layer in times]
    total = demo_measure.LayerTimes("all", *map(sum, list(zip(*times, strict=True))[1:]))
    head = "sparse layer, forward and backward"
    cells: list[Cells] = [(head, "weights", "left", "initial filters", "trained filters", "faster")]
    for layer in (*times, total):
        counts = (f"{count:,}" for count in (layer.weights_before, layer.weights_after))
        seconds = (show(layer.before), show(layer.after))
        cells.append((layer.name, *counts, *seconds, f"x {layer.before / layer.after:.2f}"))
    return cells


def _time_steps(
    options: argparse.Namespace, trained: Trained, test: Solids, record: dict[str, Any]
) -> list[Cells]:
    """Whole training steps on one batch: with the initial weights, the trained ones, and dense."""
    resolution = options.resolution
    batch = (test.keys[: options.batch_size], test.labels[: options.batch_size])
    to_input = SparseInput(test.resolution)
    nets = {
        "sparse, initial weights": net_and_optimizer(options, options.seed, plain=options.plain),
        "sparse, trained": (trained.model, trained.optimizer),
    }
    steps = demo_measure.steps(nets, *batch, to_input)
    if not options.no_dense:
        dense = make_net(jax.random.key(options.seed), resolution=resolution, dense=True)
        grid = np.asarray(ilajax.to_dense(to_input(jnp.asarray(batch[0]))))
        if peers.installed("PyTorch dense"):
            name = "dense, PyTorch"
            call = pytorch.training_step(dense, grid, batch[1], "Adam", options.learning_rate)
            steps[name] = demo_measure.Step(call, None, None)
        for _, module in nnx.iter_graph(dense):
            if isinstance(module, nnx.Conv):  # on a CPU the twin's own is ilajax's kernel
                module.conv_general_dilated = jax.lax.conv_general_dilated
        # The dense twin's optimizer ignores densities and epochs.
        adam = optax.with_extra_args_support(optax.adam(options.learning_rate))
        optimizer = nnx.Optimizer(dense, adam, wrt=nnx.Param)
        twin = {"dense, XLA": (dense, optimizer)}
        steps |= demo_measure.steps(twin, grid, batch[1], as_it_is)
    timings = side_by_side({name: step.call for name, step in steps.items()}, budget=options.budget)
    cells: list[Cells] = [
        ("training step", "time", "against trained", "temporary memory", "weights and optimizer")
    ]
    record["steps"] = {}
    for name, step in steps.items():
        ratio = timings.ratio(name, "sparse, trained")
        sizes = {"temporary_bytes": step.temporary, "result_bytes": step.results}
        shown = ("" if size is None else f"{size / 1e6:,.0f} MB" for size in sizes.values())
        cells.append((name, show(timings.median(name)), f"x {ratio:.2f}", *shown))
        record["steps"][name] = timings.record(name) | {"ratio": ratio} | sizes
    return cells


def _summary(trained: Trained, record: dict[str, Any]) -> list[Cells]:
    first, last = trained.rows[0], trained.rows[-1]
    weights = (f"{trained.initial:,}", f"{trained.weights[-1]:,}", f"{trained.left:.1%} left")
    seconds = [row["seconds_per_step"] for row in (first, last)]
    accuracies = (f"{row['test_accuracy']:.1%}" for row in (first, last))
    return [
        ("", "first epoch", f"epoch {last['epoch']}", ""),
        ("weights of the sparse layers", *weights),
        ("median training step", *map(show, seconds), f"x {seconds[0] / seconds[1]:.2f} faster"),
        ("test accuracy", *accuracies, ""),
        ("the whole demonstration", "", frame.minutes(record["seconds"]), "minutes"),
    ]


def _seeds(
    options: argparse.Namespace,
    trained: Trained,
    data: Data,
    reporter: frame.Reporter,
    record: dict[str, Any],
) -> list[Cells]:
    """The recipe beside the plain net, for several seeds of weights, order and dropout."""
    found = []
    for seed in range(options.seed, options.seed + options.seeds):
        ours = trained
        if seed != options.seed or options.plain:
            ours = train_net(options, seed, data, reporter, plain=False)
        plain = train_net(options, seed, data, reporter, plain=True)
        found.append(
            {
                "seed": seed,
                "test_accuracy": ours.rows[-1]["test_accuracy"],
                "plain_test_accuracy": plain.rows[-1]["test_accuracy"],
                "weights_left": ours.left,
            }
        )
    record["seeds"] = found
    mean = {name: statistics.mean(each[name] for each in found) for name in found[0]}
    cells: list[Cells] = [("seed", "test accuracy", "plain", "difference", "sparse weights left")]
    for each in (*found, mean | {"seed": "mean"}):
        ours, plain = each["test_accuracy"], each["plain_test_accuracy"]
        points = f"{(ours - plain) * 100:+.1f} points"
        shares = (f"{ours:.1%}", f"{plain:.1%}", points, f"{each['weights_left']:.1%}")
        cells.append((str(each["seed"]), *shares))
    return cells


def _epochs(trained: Trained) -> list[Cells]:
    cells: list[Cells] = [("epoch", "loss", "train", "test", "weights left", "step")]
    for row, weights in zip(trained.rows, trained.weights, strict=True):
        shares = (f"{row[f'{part}_accuracy']:.1%}" for part in ("train", "test"))
        numbers = (f"{weights:,}", show(row["seconds_per_step"]))
        cells.append((str(row["epoch"]), f"{row['train_loss']:.3f}", *shares, *numbers))
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.demo", __doc__)
    add, whole, amount = parser.add_argument, frame.positive_int, frame.not_negative
    add("--resolution", type=int, choices=sorted(BOUNDS), default=64, help="of the grid")
    add("--epochs", type=whole, default=12, metavar="N", help="epochs")
    add("--train-size", type=whole, default=480, metavar="N", help="solids to train")
    add("--test-size", type=whole, default=320, metavar="N", help="solids to test")
    add("--batch-size", type=whole, default=8, metavar="N", help="solids a step")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights, order and dropout")
    rate = "Adam's first rate, which falls to 0 by a cosine"
    add("--learning-rate", type=frame.positive, default=5e-4, metavar="RATE", help=rate)
    add("--scale", type=amount, default=0.003, metavar="LAMBDA", help="of the regulariser")
    add("--offset", type=amount, default=0.1, metavar="O", help="bias above the bound")
    add("--b1", type=amount, default=0.1, metavar="B", help="bias per density above it")
    add("--b2", type=amount, default=0.1, metavar="B", help="bias per density below it")
    threshold = "filter weights that are below it at two epochs' ends in a row go"
    add("--threshold", type=amount, default=0.05, metavar="W", help=threshold)
    add("--plain", action="store_true", help="no regulariser and no pruning, for comparison")
    add("--no-dense", action="store_true", help="do not time the dense twin")
    budget = "seconds for timing each kind of step; at least two calls are timed"
    add("--budget", type=frame.positive, default=5.0, metavar="S", help=budget)
    seeds = "train this many seeds with the recipe and plain, and compare them"
    add("--seeds", type=whole, metavar="N", help=seeds)
    frame.add_out(parser, "runs/demo")
    frame.add_report(parser, "demo.md, demo.json and demo.png")
    return parser


if __name__ == "__main__":
    frame.run(main, resumes=False)
