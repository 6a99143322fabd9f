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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ilajax
from benchmarks import peers
from benchmarks.timing import headline, provenance, show, side_by_side
from experiments import demo_measure, frame
from experiments.activations import feature_maps
from experiments.data.solids import CLASSES, Solids, make_solids
from experiments.demo_net import BOUNDS, Trained, make_net, net_and_optimizer, train_net
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
        trained = train_net(options, options.seed, training, test, reporter, plain=options.plain)
        record["options"] = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
        record["epochs"] = list(trained.rows)
        record["weights"] = {"initial": trained.initial, "left": list(trained.weights)}

        maps = _maps(options, trained, test)
        picture = options.out / "demo.png"
        _draw(picture, options, trained, test, maps)
        reporter.print("timing the sparse layers, and whole steps beside the dense twin's ...")
        layers = _time_layers(options, trained, maps, record)
        steps = _time_steps(options, trained, test, record)
        record["seconds"] = time.perf_counter() - began
        tables = [_summary(trained, record), steps, layers]
        if options.seeds:
            tables.append(_seeds(options, trained, training, test, reporter, record))
        for cells in tables:
            reporter.print(summary_table(cells))
        reporter.print(
            f"{frame.minutes(record['seconds'])} minutes in all"
            + (", without --seeds" if options.seeds else "")
        )

        written = [options.out / "demo.md", options.out / "demo.json", picture]
        _write(written[0], record, tables)
        frame.write_json(written[1], record)
        if options.report:
            written += frame.report(options.report, "demo", written)
        reporter.print("wrote " + ", ".join(map(str, written)))
    return record


def _maps(options: argparse.Namespace, trained: Trained, test: Solids) -> dict[str, Any]:
    """The feature maps of a batch of test solids."""
    trained.run.model.eval()
    maps = feature_maps(
        trained.run.model, trained.run.to_input(jnp.asarray(test.keys[: options.batch_size]))
    )
    trained.run.model.train()
    return maps


def _draw(
    path: Path, options: argparse.Namespace, trained: Trained, test: Solids, maps: dict[str, Any]
) -> None:
    shown = test.keys[: len(CLASSES)]
    grids = np.asarray(ilajax.to_dense(trained.run.to_input(jnp.asarray(shown))))[..., 0] > 0
    solids = {
        CLASSES[label]: grid for label, grid in zip(test.labels[: len(CLASSES)], grids, strict=True)
    }
    sample = min(options.batch_size, len(test)) - 1
    kept = {"input": np.asarray(ilajax.to_dense(maps["input"]))[sample, ..., 0]}
    for block in range(1, trained.run.model.num_sparse_blocks + 1):
        strength = np.asarray(ilajax.to_dense(maps[f"conv{3 * block}"]))[sample]
        # All channels together cover the solid's surroundings; one shows what a filter looks for.
        channel = strength[..., strength.sum(axis=(0, 1, 2)).argmax()]
        kept[f"block {block}: {np.count_nonzero(channel):,} of {len(channel)}³ sites"] = channel
    demo_picture(
        path,
        solids,
        kept,
        trained.rows,
        weights=[1.0, *(count / trained.initial for count in trained.weights)],
        step_seconds=[row["seconds_per_step"] for row in trained.rows],
    )


def _time_layers(
    options: argparse.Namespace, trained: Trained, maps: dict[str, Any], record: dict[str, Any]
) -> list[Cells]:
    initial = make_net(jax.random.key(options.seed), resolution=options.resolution)
    times = demo_measure.layer_times(initial, trained.run.model, maps, budget=options.budget / 8)
    record["layers"] = [layer._asdict() for layer in times]
    body: list[Cells] = [
        (
            layer.name,
            f"{layer.weights_before:,}",
            f"{layer.weights_after:,}",
            show(layer.before),
            show(layer.after),
            f"x {layer.before / layer.after:.2f}",
        )
        for layer in times
    ]
    before, after = (sum(getattr(layer, which) for layer in times) for which in ("before", "after"))
    counts = (sum(getattr(t, f"weights_{which}") for t in times) for which in ("before", "after"))
    total = (
        "all",
        *(f"{c:,}" for c in counts),
        show(before),
        show(after),
        f"x {before / after:.2f}",
    )
    head = (
        "sparse layer, forward and backward",
        "weights",
        "left",
        "initial filters",
        "trained filters",
        "faster",
    )
    return [head, *body, total]


def _time_steps(
    options: argparse.Namespace, trained: Trained, test: Solids, record: dict[str, Any]
) -> list[Cells]:
    """Whole training steps on one batch: with the initial weights, the trained ones, and dense."""
    resolution = options.resolution
    batch = (test.keys[: options.batch_size], test.labels[: options.batch_size])
    to_input = trained.run.to_input
    nets = {
        "sparse, initial weights": net_and_optimizer(options, options.seed, plain=options.plain),
        "sparse, trained": (trained.run.model, trained.run.optimizer),
    }
    steps = demo_measure.steps(nets, *batch, to_input)
    if not options.no_dense:
        dense = make_net(jax.random.key(options.seed), resolution=resolution, dense=True)
        grid = np.asarray(ilajax.to_dense(to_input(jnp.asarray(batch[0]))))
        if peers.installed("PyTorch dense"):
            name = "dense, PyTorch"
            steps[name] = demo_measure.torch_step(dense, grid, batch[1], options.learning_rate)
        optimizer = demo_measure.dense_optimizer(dense, optax.adam(options.learning_rate))
        twin = {"dense, XLA": (dense, optimizer)}
        steps |= demo_measure.steps(twin, grid, batch[1], as_it_is)
    timings = side_by_side({name: step.call for name, step in steps.items()}, budget=options.budget)
    ours = "sparse, trained"
    cells: list[Cells] = [
        ("training step", "time", "against trained", "temporary memory", "weights and optimizer")
    ]
    record["steps"] = {}
    for name, step in steps.items():
        ratio = timings.ratio(name, ours) if name != ours else 1.0
        sizes = (
            "" if size is None else f"{size / 1e6:,.0f} MB"
            for size in (step.temporary, step.results)
        )
        cells.append((name, show(timings.median(name)), f"x {ratio:.2f}", *sizes))
        record["steps"][name] = timings.record(name) | {
            "ratio": ratio,
            "temporary_bytes": step.temporary,
            "result_bytes": step.results,
        }
    return cells


def _summary(trained: Trained, record: dict[str, Any]) -> list[Cells]:
    first, last = trained.rows[0], trained.rows[-1]
    faster = first["seconds_per_step"] / last["seconds_per_step"]
    return [
        ("", "first epoch", f"epoch {last['epoch']}", ""),
        (
            "weights of the sparse layers",
            f"{trained.initial:,}",
            f"{trained.weights[-1]:,}",
            f"{trained.left:.1%} left",
        ),
        (
            "median training step",
            *(show(row["seconds_per_step"]) for row in (first, last)),
            f"x {faster:.2f} faster",
        ),
        ("test accuracy", *(f"{row['test_accuracy']:.1%}" for row in (first, last)), ""),
        ("the whole demonstration", "", frame.minutes(record["seconds"]), "minutes"),
    ]


def _seeds(
    options: argparse.Namespace,
    trained: Trained,
    training: Solids,
    test: Solids,
    reporter: frame.Reporter,
    record: dict[str, Any],
) -> list[Cells]:
    """The recipe beside the plain net, for several seeds of weights, order and dropout."""
    cells: list[Cells] = [("seed", "test accuracy", "plain", "difference", "sparse weights left")]
    record["seeds"] = []
    for seed in range(options.seed, options.seed + options.seeds):
        ours = trained
        if seed != options.seed or options.plain:
            ours = train_net(options, seed, training, test, reporter, plain=False)
        plain = train_net(options, seed, training, test, reporter, plain=True)
        found = {
            "seed": seed,
            "test_accuracy": ours.rows[-1]["test_accuracy"],
            "plain_test_accuracy": plain.rows[-1]["test_accuracy"],
            "weights_left": ours.left,
        }
        record["seeds"].append(found)
        cells.append(_seed_line(str(seed), found))
    names = ("test_accuracy", "plain_test_accuracy", "weights_left")
    mean = {name: statistics.mean(found[name] for found in record["seeds"]) for name in names}
    return [*cells, _seed_line("mean", mean)]


def _seed_line(name: str, found: dict[str, Any]) -> Cells:
    ours, plain = found["test_accuracy"], found["plain_test_accuracy"]
    points = f"{(ours - plain) * 100:+.1f} points"
    return (name, f"{ours:.1%}", f"{plain:.1%}", points, f"{found['weights_left']:.1%}")


def _write(path: Path, record: dict[str, Any], tables: Sequence[Sequence[Cells]]) -> None:
    """All tables, and a line for each epoch."""
    epochs: list[Cells] = [("epoch", "loss", "train", "test", "weights left", "step")]
    for row, weights in zip(record["epochs"], record["weights"]["left"], strict=True):
        shares = (f"{row[f'{part}_accuracy']:.1%}" for part in ("train", "test"))
        numbers = (f"{weights:,}", show(row["seconds_per_step"]))
        epochs.append((str(row["epoch"]), f"{row['train_loss']:.3f}", *shares, *numbers))
    lines = [
        "# Solids",
        "",
        f"`{record['command']}`",
        "",
        f"{headline(record)}.",
        "",
        "![](demo.png)",
    ]
    for cells in (*tables, epochs):
        lines += ["", *frame.markdown_table(cells)]
    frame.write_text(path, "\n".join(lines) + "\n")


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
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
