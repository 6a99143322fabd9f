"""What the system is for, in one command: a net for 64^3 voxels that gets smaller as it learns.

    python -m experiments.demo                     # trains, measures, draws; some minutes on two cores
    python -m experiments.demo --plain             # the same net without regulariser and pruning
    python -m experiments.demo --report --seeds 3  # the documentation's figures

OctNet3 learns eight classes of solids, made on the spot. The regulariser pushes its densities towards their
bounds, small weights are pruned after each epoch, and the kernels skip what is gone. Then whole training
steps are timed beside the dense twin's, and each sparse layer with the filters before and after training.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from experiments import demo_measure, frame, peers
from experiments.activations import feature_maps, sparse_densities
from experiments.data.loader import Arrays
from experiments.data.solids import CLASSES, Solids, SparseInput, make_solids
from experiments.demo_picture import demo_picture
from experiments.summary import Cells, summary_table
from experiments.timing import headline, provenance, show, side_by_side
from experiments.training import Row, Run, live_weights, train

# Of the sparse blocks. A surface's density goes with 1 / resolution.
BOUNDS = {16: (0.08, 0.24), 32: (0.04, 0.12, 0.28), 64: (0.02, 0.06, 0.14)}
RECIPE = ("learning_rate", "scale", "offset", "b1", "b2", "threshold")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A net and how it came about.

    Attributes:
      run: the net.
      rows: of its epochs.
      initial: weights of the sparse layers at the start.
      weights: those that were left after each epoch.
    """

    run: Run
    rows: Sequence[Row]
    initial: int
    weights: Sequence[int]

    @property
    def left(self) -> float:
        """Share of the sparse layers' weights that is left."""
        return self.weights[-1] / self.initial


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the demonstration; returns what it measured, as in its JSON file."""
    began = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.train_size < options.batch_size:
        parser.error(f"--batch-size {options.batch_size} is more than --train-size.")
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = provenance("demo", arguments)
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
        trained = _train(options, options.seed, training, test, reporter, plain=options.plain)
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


@functools.partial(nnx.jit, static_argnames=("resolution", "dense"))
def make_net(key: jax.Array, *, resolution: int, dense: bool = False) -> ilajax.models.OctNet3:
    """The net of `OctNet3(..., rngs=nnx.Rngs(key))`, bit by bit, drawn by one program for all seeds."""
    return ilajax.models.OctNet3(
        resolution,
        num_classes=len(CLASSES),
        density_bounds=BOUNDS[resolution],
        rngs=nnx.Rngs(key),
        dense=dense,
    )


@functools.cache
def recipe(
    resolution: int,
    steps: int,
    learning_rate: float,
    scale: float,
    offset: float,
    b1: float,
    b2: float,
    threshold: float,
) -> optax.GradientTransformation:
    """The same arguments give the same object, so that nets of other seeds reuse the compiled step."""
    structure = nnx.eval_shape(
        functools.partial(make_net, jax.random.key(0), resolution=resolution)
    )
    return ilajax.optim.sparse_training(
        structure,
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps)),
        scale=scale,
        offset=offset,
        b1=b1,
        b2=b2,
        threshold=threshold,
    )


def _net(
    options: argparse.Namespace, seed: int, *, plain: bool
) -> tuple[nnx.Module, nnx.Optimizer]:
    values = {name: getattr(options, name) for name in RECIPE}
    if plain:
        values |= {"scale": 0.0, "threshold": 0.0}
    model = make_net(jax.random.key(seed), resolution=options.resolution)
    steps = options.epochs * (options.train_size // options.batch_size)
    transformation = recipe(options.resolution, steps, **values)
    return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)


def _train(
    options: argparse.Namespace,
    seed: int,
    training: Solids,
    test: Solids,
    reporter: frame.Reporter,
    *,
    plain: bool,
) -> Trained:
    model, optimizer = _net(options, seed, plain=plain)
    bounds = {
        f"conv{1 + at}": BOUNDS[options.resolution][at // 3]
        for at in range(3 * model.num_sparse_blocks)
    }
    run = Run(
        name=f"{'plain' if plain else 'sparse'}-{seed}",
        model=model,
        optimizer=optimizer,
        to_input=SparseInput(options.resolution),
        densities=sparse_densities,
        prunes=not plain,
        directory=options.out,
        options={},
        seed=seed,
        bounds=bounds,
        resumable=False,
    )
    initial = demo_measure.sparse_weights(model)
    others = live_weights(model) - initial
    rows = train(
        run,
        Arrays(training.keys, training.labels),
        (test.keys, test.labels),
        epochs=options.epochs,
        batch_size=options.batch_size,
        columns=[
            *("net", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
            *(
                "live_weights",
                *(f"density_{name}" for name in bounds),
                "seconds_per_step",
                "seconds",
            ),
        ],
        reporter=reporter,
        test_batch=2 * options.batch_size,
    )
    return Trained(run, rows, initial, [row["live_weights"] - others for row in rows])


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
        "sparse, initial weights": _net(options, options.seed, plain=options.plain),
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
        steps |= demo_measure.steps(twin, grid, batch[1], dense_input)
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


def dense_input(grid: jax.Array) -> jax.Array:
    """[B, *S, 1], what the dense twin takes, as it is."""
    return grid


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
            ours = _train(options, seed, training, test, reporter, plain=False)
        plain = _train(options, seed, training, test, reporter, plain=True)
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
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--resolution", type=int, choices=sorted(BOUNDS), default=64, help="of the grid")
    add("--epochs", type=frame.positive_int, default=12, metavar="N", help="epochs")
    add("--train-size", type=frame.positive_int, default=480, metavar="N", help="solids to train")
    add("--test-size", type=frame.positive_int, default=320, metavar="N", help="solids to test")
    add("--batch-size", type=frame.positive_int, default=8, metavar="N", help="solids a step")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights, order and dropout")
    add(
        "--learning-rate",
        type=frame.positive,
        default=5e-4,
        metavar="RATE",
        help="Adam's first rate, which falls to 0 by a cosine",
    )
    add(
        "--scale",
        type=frame.not_negative,
        default=0.003,
        metavar="LAMBDA",
        help="of the regulariser",
    )
    add("--offset", type=frame.not_negative, default=0.1, metavar="O", help="bias above the bound")
    add("--b1", type=frame.not_negative, default=0.1, metavar="B", help="bias per density above it")
    add("--b2", type=frame.not_negative, default=0.1, metavar="B", help="bias per density below it")
    add(
        "--threshold",
        type=frame.not_negative,
        default=0.05,
        metavar="W",
        help="filter weights that are below it at two epochs' ends in a row go",
    )
    add("--plain", action="store_true", help="no regulariser and no pruning, for comparison")
    add("--no-dense", action="store_true", help="do not time the dense twin")
    add(
        "--budget",
        type=frame.positive,
        default=5.0,
        metavar="S",
        help="seconds for timing each kind of step; at least two calls are timed",
    )
    add(
        "--seeds",
        type=frame.positive_int,
        metavar="N",
        help="train this many seeds with the recipe and plain, and compare them",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for what is written",
    )
    frame.add_report(parser, "demo.md, demo.json and demo.png")
    return parser


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
