"""A pruned net tuned to other classes: with its filters full again, or with the pattern that pruning found.

    python -m experiments.transfer                        # solids made on the spot, in 16^3 voxels; minutes
    python -m experiments.transfer --data kicad --data-dir FOLDER --seeds 5 --report
    python -m experiments.transfer --resume               # goes on where a run was stopped

--report writes experiments/results/transfer.{csv,json,md,png} too. Every second class is held out. OctNet3
learns the others, once with pruning and once without; then both nets get a new last layer and are tuned to
the classes that were held out. The paper proposes to put removed weights back at 0 before: "refilled". Beside
it stand the pruned pattern kept, the net that was never pruned, and one that is trained anew.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import ilajax
from benchmarks import timing
from experiments import frame, grid
from experiments.data.loader import Batch, Source
from experiments.data.parts import Parts, whole
from experiments.data.sets import add_data, add_resolution, add_sizes, chosen_dataset
from experiments.demo_picture import INK, style_panel, title_panel
from experiments.frame import Cells
from experiments.grid import Trained
from experiments.training import Row, Run, as_it_is, compact, smoothed
from experiments.variants import TEST_BATCH, Variant, make_net, make_transformation, paper_bounds

# Nets of the first half of the classes -> whether they are pruned.
FIRST = {"pruned": True, "unpruned": False}
# How the other half is learned -> the net that it starts from.
METHODS = {"unpruned": "unpruned", "refilled": "pruned", "kept": "pruned", "anew": None}
COLOURS = {"unpruned": "#7f7f7f", "refilled": "#0072b2", "kept": "#c8442b", "anew": "#e69f00"}
FIXED = (
    *("data", "resolution", "capacity", "train_size", "test_size", "epochs", "batch_size"),
    *("scale", "threshold", "learning_rate", "tuning_rate"),
)


class Setting(NamedTuple):
    """A net of the first classes, or one of the others, and its seed."""

    part: str  # "first" or "other"
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What its rows, table and checkpoints are called."""
        return f"{self.part}-{self.method}-seed-{self.seed}"


@dataclasses.dataclass(frozen=True)
class SomeClasses:
    """The samples of some classes of a source, which are counted from 0."""

    samples: Source
    labels: np.ndarray  # of all samples
    classes: tuple[int, ...]

    @functools.cached_property
    def chosen(self) -> np.ndarray:
        return np.flatnonzero(np.isin(self.labels, self.classes))

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        batch = self.samples.batch(self.chosen[chosen], epoch)
        return batch._replace(labels=np.searchsorted(self.classes, batch.labels))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns its record, as the JSON file has it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    record = timing.provenance("experiments.transfer", arguments)
    try:
        settings = [
            Setting(part, method, seed)
            for seed in grid.seeds(options)
            for part, methods in (("first", FIRST), ("other", METHODS))
            for method in methods
        ]
        data = chosen_dataset(options, options.resolution)
        fixed = {name: getattr(options, name) for name in FIXED}
        sources: tuple[Any, ...] = (data.training, data.test)
        fixed["data_dir"] = " ".join(source.sets.fingerprint() for source in sources)
        classes = range(len(data.class_names))
        halves = {"first": tuple(classes[::2]), "other": tuple(classes[1::2])}
        tests: dict[str, Batch] = {}
        lengths = {}
        for part, half in halves.items():
            tests[part] = whole(SomeClasses(Parts(data.test), sources[1].sets.label, half))
            lengths[part] = int(np.isin(sources[0].sets.label, half).sum())
            if lengths[part] < options.batch_size:
                raise ValueError(
                    f"--batch-size {options.batch_size} is more than the {lengths[part]} samples of half "
                    f"the classes."
                )
        grid.prepare(options, settings, fixed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record["options"] = {name: getattr(options, name) for name in FIXED}
    record["halves"] = {
        part: {
            "classes": [data.class_names[n] for n in half],
            "train": lengths[part],
            "test": len(tests[part].labels),
        }
        for part, half in halves.items()
    }
    written = [options.out / f"transfer.{suffix}" for suffix in ("csv", "json", "md", "png")]
    runs: dict[Setting, Run] = {}  # of the first classes: the others start from their nets
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))

        def make(setting: Setting) -> Run:
            steps = options.epochs * (lengths[setting.part] // options.batch_size)
            runs[setting] = _run(setting, options, fixed, halves, steps, runs)
            return runs[setting]

        def data_of(setting: Setting) -> Any:
            training = Parts(data.training, setting.seed)
            half, test = halves[setting.part], tests[setting.part]
            some = SomeClasses(training, sources[0].sets.label, half)
            return some, (test.inputs, test.labels)

        trained = grid.train_all(
            settings,
            make,
            data_of,
            options,
            reporter,
            table=written[0],
            row=_result,
            test_batch=TEST_BATCH,
        )
        record["first"] = {method: _of(trained, "first", method) for method in FIRST}
        record["methods"] = _compared(trained)
        cells = _cells(record)
        reporter.print(frame.summary_table(cells))
        frame.write_json(written[1], record)
        _write(written[2], record, cells)
        _draw(written[3], record)
        frame.publish(reporter, written, options.report, "transfer")
    return record


def tuned(model: ilajax.models.OctNet3, method: str, classes: int, seed: int) -> nnx.Module:
    """A copy of a trained net with a new last layer, its filters as the method has them."""
    structure, state = nnx.split(model)
    copy = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    copy.logits = nnx.Linear(copy.logits.in_features, classes, rngs=nnx.Rngs(seed))
    if method == "refilled":
        ilajax.nn.refill(copy)
    return copy


def _run(
    setting: Setting,
    options: argparse.Namespace,
    fixed: Row,
    halves: Mapping[str, Sequence[int]],
    steps: int,
    runs: Mapping[Setting, Run],
) -> Run:
    part, method, seed = setting
    classes, resolution = len(halves[part]), options.resolution
    bounds = paper_bounds(resolution)
    plain = Variant("plain", resolution, bounds)
    pruned = plain._replace(scale=options.scale, threshold=options.threshold)
    variant = pruned if part == "first" and FIRST[method] else plain
    rate = options.learning_rate
    before = METHODS[method] if part == "other" else None
    if before is None:
        model = make_net(variant, classes, seed=seed)
    else:
        model = tuned(runs[Setting("first", before, seed)].model, method, classes, seed)
        rate = options.tuning_rate
    how = make_transformation(variant, classes, "adam", rate, steps)
    return Run(
        name=setting.name,
        model=model,
        optimizer=nnx.Optimizer(model, how, wrt=nnx.Param),
        to_input=as_it_is,
        directory=options.out,
        seed=seed,
        after_epoch=compact if variant.threshold else None,
        options=fixed,
        score=smoothed,
    )


def _result(trained: Trained) -> Row:
    """A net's line in the table: what its last epoch says."""
    names = ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "live_weights")
    return trained.setting._asdict() | {name: trained.rows[-1][name] for name in names}


def _of(trained: Sequence[Trained], part: str, method: str) -> dict[str, Any]:
    """The seeds of a method: their epochs, accuracies and weights."""
    chosen = [t for t in trained if t.setting.part == part and t.setting.method == method]
    accuracies = [each.rows[-1]["test_accuracy"] for each in chosen]
    return {
        "seeds": [each.setting.seed for each in chosen],
        "epochs": [each.rows for each in chosen],
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "weights": statistics.mean(each.rows[-1]["live_weights"] for each in chosen),
    }


def _compared(trained: Sequence[Trained]) -> dict[str, dict[str, Any]]:
    """Each method, and how it differs from the net that was never pruned, seed by seed."""
    found = {method: _of(trained, "other", method) for method in METHODS}
    reference = found["unpruned"]["accuracies"]
    for each in found.values():
        pairs = zip(each["accuracies"], reference, strict=True)
        differences = [accuracy - unpruned for accuracy, unpruned in pairs]
        each["difference"] = statistics.mean(differences)
        each["interval"] = None if each is found["unpruned"] else grid.interval(differences)
    return found


def _cells(record: Mapping[str, Any]) -> list[Cells]:
    cells: list[Cells] = [
        ("tuned from", "test accuracy", "of each seed", "difference to unpruned", "weights")
    ]
    for method, each in record["methods"].items():
        difference = ""
        if each["interval"]:
            low, high = (100 * end for end in each["interval"])
            difference = f"{100 * each['difference']:+.1f} ({low:+.1f} to {high:+.1f}) points"
        shown = ", ".join(f"{accuracy:.1%}" for accuracy in each["accuracies"])
        cells.append((method, f"{each['mean']:.1%}", shown, difference, f"{each['weights']:,.0f}"))
    return cells


def _write(path: Path, record: Mapping[str, Any], cells: Sequence[Cells]) -> None:
    options, first, halves = record["options"], record["first"], record["halves"]
    epochs: list[Cells] = [("tuned from", *map(str, range(1, options["epochs"] + 1)))]
    for method, each in record["methods"].items():
        means = np.mean([[r["test_accuracy"] for r in rows] for rows in each["epochs"]], axis=0)
        epochs.append((method, *(f"{value:.1%}" for value in means)))
    frame.write_page(
        path,
        "# Transfer",
        f"`{record['command']}`: OctNet3-{options['resolution']}^3 on {options['data']}, "
        f"{options['epochs']} epochs, batch {options['batch_size']}, Adam in one cycle of rates up to "
        f"{options['learning_rate']:g}, tuned with up to {options['tuning_rate']:g}.",
        f"{timing.headline(record)}.",
        f"First {len(halves['first']['classes'])} classes, {halves['first']['train']:,} samples: "
        f"{first['pruned']['mean']:.1%} of the test samples with pruning (scale {options['scale']:g}, "
        f"threshold {options['threshold']:g}, {first['pruned']['weights']:,.0f} filter weights left), "
        f"{first['unpruned']['mean']:.1%} without ({first['unpruned']['weights']:,.0f}). Then "
        f"{len(halves['other']['classes'])} others, {halves['other']['train']:,} samples to train and "
        f"{halves['other']['test']:,} to test. Accuracies are those after the last epoch, means over the "
        "seeds. Differences are paired by seed, with the 95 % interval of their mean.",
        cells,
        "![](transfer.png)",
        "Test accuracy after each epoch:",
        epochs,
    )


def _draw(path: Path, record: Mapping[str, Any]) -> None:
    """Accuracy on the other classes by epoch: a pale line for each seed, a strong one for their mean."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    title_panel(axis, "test accuracy on classes that were held out")
    for method, each in record["methods"].items():
        seeds = [[row["test_accuracy"] for row in rows] for rows in each["epochs"]]
        epochs = range(1, len(seeds[0]) + 1)
        for seed in seeds:
            axis.plot(epochs, seed, color=COLOURS[method], lw=0.8, alpha=0.35)
        axis.plot(epochs, np.mean(seeds, axis=0), color=COLOURS[method], lw=2, label=method)
    axis.set_xlabel("epoch", fontsize=9, color=INK)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    style_panel(axis)
    frame.save_figure(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.transfer", __doc__)
    add = parser.add_argument
    add_data(parser)
    add_sizes(parser)
    add_resolution(parser, 16)
    scale = "of the density-biased L2 of the net that is pruned"
    add("--scale", type=frame.not_negative, default=0.003, metavar="S", help=scale)
    threshold = "its filter weights that stay below it for two epochs go"
    add("--threshold", type=frame.positive, default=0.07, metavar="W", help=threshold)
    rate = "Adam's highest rate for nets that start anew"
    add("--learning-rate", type=frame.positive, default=1e-3, metavar="RATE", help=rate)
    rate = "and for those that are tuned"
    add("--tuning-rate", type=frame.positive, default=1e-3, metavar="RATE", help=rate)
    varied = "of weights, order, variation and dropout"
    grid.add_training(parser, epochs=20, out="runs/transfer", of_seed=varied)
    frame.add_report(parser, "transfer.{csv,json,md,png}")
    return parser


if __name__ == "__main__":
    frame.run(main)
