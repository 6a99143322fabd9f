"""Variants of OctNet3, trained on the same shapes from the same seeds, and compared seed by seed.

What `experiments.regularisation`, `resolution` and `attention` share: they say which variants there are, and
draw what came out.
"""

import argparse
import functools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from benchmarks import timing
from experiments import frame, grid
from experiments.activations import cut_cells, layer_cuts, sparse_convs, sparse_densities
from experiments.data.loader import Batch
from experiments.data.parts import FEATURES, Parts, whole
from experiments.data.sets import Dataset, add_data, add_sizes, chosen_dataset
from experiments.frame import Cells
from experiments.grid import Trained
from experiments.training import Row, Run, as_it_is, compact, smoothed, train_step
from ilajax.models.octnet3 import TABLE_2

TEST_BATCH = 64
# The offset and both slopes of the density-biased L2, as in the paper.
BIAS = 0.1
# Highest rates: of Adam in one cycle, and the paper's of Adagrad.
RATES = {"adam": 1e-3, "adagrad": 1e-3}
FIXED = (
    *("data", "capacity", "train_size", "test_size", "epochs", "batch_size"),
    *("optimizer", "learning_rate"),
)


class Variant(NamedTuple):
    """A net, and what its training adds to the loss."""

    label: str
    resolution: int
    bounds: tuple[float, ...]  # of the sparse blocks; none of them: the dense twin
    select: str = "positive"
    scale: float = 0.0  # of the density-biased L2
    threshold: float = 0.0  # of pruning

    @property
    def regularised(self) -> bool:
        return self.scale > 0 or self.threshold > 0

    @property
    def fixed(self) -> Row:
        """What must not change when its run goes on, as JSON has it."""
        return self._asdict() | {"bounds": list(self.bounds)}


class Setting(NamedTuple):
    """A net to be trained, and its seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """What its rows, table and checkpoints are called."""
        return f"{re.sub('[^a-z0-9.]+', '-', self.variant.label.lower())}-seed-{self.seed}"


def paper_bounds(resolution: int) -> tuple[float, ...]:
    """The bounds of the paper's table 2."""
    return TABLE_2[resolution].density_bounds


def add_options(parser: argparse.ArgumentParser, *, epochs: int, out: str, files: str) -> None:
    """Adds what all of these experiments take, but for the resolution."""
    add = parser.add_argument
    add_data(parser)
    add_sizes(parser)
    which = "Adam in one cycle of rates, or the paper's Adagrad at one rate"
    add("--optimizer", choices=RATES, default="adam", help=which)
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
    rate = f"highest rate, by default {rates}"
    add("--learning-rate", type=frame.positive, metavar="RATE", help=rate)
    budget = "seconds for timing each net"
    add("--budget", type=frame.positive, default=3.0, metavar="S", help=budget)
    varied = "of weights, order, variation and dropout"
    grid.add_training(parser, epochs=epochs, out=out, of_seed=varied)
    frame.add_report(parser, files)


def train_variants(
    module: str,
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    variants: Callable[[argparse.Namespace], Sequence[Variant]],
    finish: Callable[[dict[str, Any], Sequence[Path]], Sequence[Cells]],
) -> dict[str, Any]:
    """Trains all variants, those of the first seed first, and writes what came out.

    Args:
      module: the experiment's, whose last name its files have.
      parser: of `add_options` and more.
      arguments: of the command line.
      variants: says which there are; the first one of a resolution is what its others are compared with.
      finish: writes the page and the picture of a record, [md, png]; returns the table for the terminal.

    Returns the record, as the JSON file has it.
    """
    options = parser.parse_args(arguments)
    record = timing.provenance(module, arguments)
    stem = module.rpartition(".")[2]
    try:
        chosen = variants(options)
        settings = [Setting(variant, seed) for seed in grid.seeds(options) for variant in chosen]
        data = {v.resolution: chosen_dataset(options, v.resolution) for v in chosen}
        fixed = {name: getattr(options, name) for name in FIXED}
        first: Any = data[chosen[0].resolution]
        fixed["data_dir"] = " ".join(part.sets.fingerprint() for part in first[:2])
        for setting in settings:
            grid.prepare(options, [setting], fixed | setting.variant.fixed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record["options"] = {name: getattr(options, name) for name in FIXED}
    record["options"]["learning_rate"] = options.learning_rate or RATES[options.optimizer]
    record["samples"] = {"train": len(first.training), "test": len(first.test)}
    record["classes"] = len(first.class_names)
    tests = {resolution: whole(Parts(each.test)) for resolution, each in data.items()}
    written = [options.out / f"{stem}.{suffix}" for suffix in ("csv", "json", "md", "png")]
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))

        def make(setting: Setting) -> Run:
            return _run(setting, options, fixed, data[setting.variant.resolution])

        def data_of(setting: Setting) -> Any:
            test = tests[setting.variant.resolution]
            training = data[setting.variant.resolution].training
            return Parts(training, setting.seed), (test.inputs, test.labels)

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
        reporter.print("timing the nets' steps in turn ...")
        record["variants"] = _compared(trained, data, options)
        cells = finish(record, written[2:])
        reporter.print(frame.summary_table(cells))
        frame.write_json(written[1], record)
        frame.publish(reporter, written, options.report, stem)
    return record


def make_net(variant: Variant, classes: int, *, seed: int) -> ilajax.models.OctNet3:
    """The net of a variant: all of one resolution and seed start from the same weights."""
    return ilajax.models.OctNet3(
        variant.resolution,
        num_classes=classes,
        density_bounds=variant.bounds or None,
        dense=not variant.bounds,
        in_features=FEATURES,
        select=variant.select,
        rngs=nnx.Rngs(seed),
    )


@functools.cache
def make_transformation(
    variant: Variant, classes: int, optimizer: str, rate: float, steps: int
) -> optax.GradientTransformation:
    """The same arguments give the same object, so that other seeds reuse the compiled step."""
    if optimizer == "adam":
        base = optax.adam(optax.cosine_onecycle_schedule(steps, rate, pct_start=0.2))
    else:
        base = optax.adagrad(rate, initial_accumulator_value=0.0)
    if not variant.regularised:
        # The chain lets the optimizer take the extra arguments of the training loop, and ignore them.
        return optax.chain(base)
    structure = nnx.eval_shape(functools.partial(make_net, variant, classes, seed=0))
    numbers = {"scale": variant.scale, "threshold": variant.threshold}
    return ilajax.optim.sparse_training(structure, base, offset=BIAS, b1=BIAS, b2=BIAS, **numbers)


def _run(setting: Setting, options: argparse.Namespace, fixed: Row, data: Dataset) -> Run:
    variant, seed = setting
    model = make_net(variant, len(data.class_names), seed=seed)
    steps = options.epochs * (len(data.training) // options.batch_size)
    rate = options.learning_rate or RATES[options.optimizer]
    how = make_transformation(variant, len(data.class_names), options.optimizer, rate, steps)
    return Run(
        name=setting.name,
        model=model,
        optimizer=nnx.Optimizer(model, how, wrt=nnx.Param),
        to_input=as_it_is,
        directory=options.out,
        seed=seed,
        densities=sparse_densities,
        watch=over_bound if variant.bounds else None,
        after_epoch=compact if variant.threshold else None,
        options=fixed | variant.fixed,
        score=smoothed,
    )


def over_bound(model: nnx.Module) -> dict[str, float]:
    """The share of the sparse layers' channels whose density stood above the bound in the last step."""
    convs = sparse_convs(model)
    over = [np.asarray(conv.density[...]) > conv.density_bound for conv in convs]
    return {"over_bound": float(np.concatenate(over).mean())}


def _result(trained: Trained) -> Row:
    """A net's line in the table: what its last epoch says."""
    names = ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "live_weights")
    variant, seed = trained.setting
    return {"net": variant.label, "seed": seed} | {name: trained.rows[-1][name] for name in names}


def _compared(
    trained: Sequence[Trained], data: Mapping[int, Dataset], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each variant its seeds' epochs, how it differs from the first one, its times, and what is cut.

    The nets train on while they are timed: nothing else may look at them afterwards.
    """
    by_variant: dict[Variant, dict[int, Trained]] = {}
    for each in trained:
        by_variant.setdefault(each.setting.variant, {})[each.setting.seed] = each
    nets = {variant: next(iter(seeds.values())).run for variant, seeds in by_variant.items()}
    batches = {
        resolution: Parts(each.training, options.seed).batch(np.arange(options.batch_size), epoch=1)
        for resolution, each in data.items()
    }
    layers, steps = {}, {}
    for variant, run in nets.items():
        batch = batches[variant.resolution]
        layers[variant] = layer_cuts(run.model, batch.inputs) if variant.bounds else []
        if variant.bounds:
            steps[variant, "sparse layers"] = sparse_layers(run.model, batch.inputs)
        steps[variant, "step"] = _step(run, batch)
    timings = timing.side_by_side(steps, budget=options.budget)
    accuracies = {
        variant: {seed: each.rows[-1]["test_accuracy"] for seed, each in seeds.items()}
        for variant, seeds in by_variant.items()
    }
    first: dict[int, dict[int, float]] = {}  # of each resolution, that of the first variant
    found = []
    for variant, seeds in by_variant.items():
        reference = first.setdefault(variant.resolution, accuracies[variant])
        differences = [accuracies[variant][seed] - reference[seed] for seed in seeds]
        found.append(
            variant._asdict()
            | {
                "seeds": list(seeds),
                "epochs": [each.rows for each in seeds.values()],
                "accuracies": list(accuracies[variant].values()),
                "mean": statistics.mean(accuracies[variant].values()),
                "difference": statistics.mean(differences),
                "interval": (
                    None if reference is accuracies[variant] else grid.interval(differences)
                ),
                "layers": layers[variant],
            }
            | {
                part: timings.record((variant, part))
                for part in ("step", "sparse layers")
                if (variant, part) in steps
            }
        )
    return found


def sparse_layers(model: ilajax.models.OctNet3, x: Any) -> timing.Candidate:
    """The sparse layers of a training step, forward and backward, up to the dense array behind them."""
    blocks = nnx.List(model.blocks[: model.num_sparse_blocks])

    @nnx.jit
    def gradients(blocks: nnx.List, x: Any) -> Any:
        def loss(blocks: nnx.List) -> jax.Array:
            y = blocks[0](x)
            for block in list(blocks)[1:]:
                y = block(ilajax.max_pool(y, 2))
            return jnp.sum(ilajax.to_dense(y) ** 2)

        return nnx.grad(loss)(blocks)

    return functools.partial(nnx.cached_partial(gradients, blocks), x)


def _step(run: Run, batch: Batch) -> timing.Candidate:
    """A training step of the trained net, as the training loop calls it."""
    step = nnx.cached_partial(train_step, run.model, run.optimizer)
    how = {"to_input": run.to_input, "score": run.score}
    return lambda: step(batch.inputs, batch.labels, jnp.asarray(False), **how)


# --- Tables and pictures ----------------------------------------------------------------------------------


def summary_cells(record: Mapping[str, Any]) -> list[Cells]:
    """A head, then a line for each variant."""
    cells: list[Cells] = [
        (
            *("net", "test accuracy", "of each seed", "difference"),
            *("weights left", "step", "of it sparse layers"),
        )
    ]
    for each in record["variants"]:
        difference = ""
        if each["interval"]:
            low, high = (100 * end for end in each["interval"])
            difference = f"{100 * each['difference']:+.1f} ({low:+.1f} to {high:+.1f}) points"
        weights = [rows[-1]["live_weights"] for rows in each["epochs"]]
        sparse = each.get("sparse layers")
        cells.append(
            (
                each["label"],
                f"{each['mean']:.1%}",
                ", ".join(f"{accuracy:.1%}" for accuracy in each["accuracies"]),
                difference,
                f"{statistics.mean(weights):,.0f}",
                timing.show(each["step"]["median_s"]),
                timing.show(sparse["median_s"]) if sparse else "",
            )
        )
    return cells


def layer_cells(record: Mapping[str, Any]) -> list[Cells]:
    """What the bounds cut, layer by layer."""
    return cut_cells((each["label"], each["layers"]) for each in record["variants"])


def about(record: Mapping[str, Any]) -> str:
    """The paragraph that says what was trained how."""
    options, samples = record["options"], record["samples"]
    how = "Adam in one cycle of rates up to" if options["optimizer"] == "adam" else "Adagrad, rate"
    return (
        f"`{record['command']}`: {samples['train']:,} samples of {options['data']} to train, "
        f"{samples['test']:,} to test, {record['classes']} classes, {options['epochs']} epochs, batch "
        f"{options['batch_size']}, {how} {options['learning_rate']:g}. Accuracies are those after the last "
        "epoch, means over the seeds. Differences, to the first net of a resolution, are paired by seed, "
        "with the 95 % interval of their mean."
    )


def mean_over_seeds(variant: Mapping[str, Any], column: str) -> np.ndarray:
    """A column of the epochs' rows, as a mean over the seeds."""
    return np.mean([[row[column] for row in rows] for rows in variant["epochs"]], axis=0)


def deviation(variant: Mapping[str, Any]) -> float:
    """The standard deviation of the accuracies between seeds; 0 of one."""
    accuracies = variant["accuracies"]
    return statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
