"""MNIST under density bounds, the paper's section 4: OctNet3-24^2 for a grid of bounds, and its dense twin.

    python -m experiments.mnist                              # three bounds, on the 10,000 shipped digits
    python -m experiments.mnist --data-dir FOLDER --seeds 3  # on the original IDX files, with error bars
    python -m experiments.mnist --density-bounds 0.035 --nets sparse
    python -m experiments.mnist --resume                     # goes on where a run was stopped
    python -m experiments.mnist --report    # writes experiments/results/mnist.{csv,json,md,png} too

A bound is that of the first block; the second block has twice as much. All nets of a seed start from the
same weights and see the same batches. Pixels below 50 are set to zero, the others scaled to (0, 1].

Accuracies come from training. Steps are timed at the end, all nets in turn, so that their times can be
compared whatever else the machine did during training.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ilajax
from benchmarks import timing
from experiments import frame, grid
from experiments.activations import activation_bytes, dense_densities, sparse_densities
from experiments.data.loader import Arrays
from experiments.data.mnist import CLASSES, Digits, load_mnist
from experiments.frame import Cells, summary_table
from experiments.grid import Trained
from experiments.mnist_picture import grid_picture
from experiments.training import Row, Run, compact, train_step

RESOLUTION = 24  # the paper's name of the network for 28 x 28 pixels
PIXEL_THRESHOLD = 50
BOUNDS = [0.035, 0.055, 0.095]
REPORTED = ("test_accuracy", "test_loss", "train_loss", "live_weights")
# What changes the bits of a run, and therefore must not change when it goes on.
FIXED = ("regularisation", "pruning_threshold", "learning_rate", "batch_size")


class Setting(NamedTuple):
    """A net of the grid: its first block's density bound, None for the dense twin, and its seed."""

    bound: float | None
    seed: int

    @property
    def net(self) -> str:
        return "dense" if self.bound is None else f"bound-{self.bound!r}"

    @property
    def name(self) -> str:
        """What its rows, table and checkpoints are called."""
        return f"{self.net}-seed-{self.seed}"


def main(arguments: list[str] | None = None) -> list[Trained]:
    """Runs the experiment; returns what became of each setting."""
    parser = _parser()
    options = parser.parse_args(arguments)
    record = timing.provenance("experiments.mnist", arguments)
    try:
        settings = _settings(options)
        training, test = (d.threshold(PIXEL_THRESHOLD) for d in load_mnist(options.data_dir))
        if len(training) < options.batch_size:
            raise ValueError(
                f"--batch-size {options.batch_size} is more than the {len(training)} digits to train on."
            )
        fixed = {name: getattr(options, name) for name in FIXED}
        fixed["data_dir"] = f"{training.fingerprint()} {test.fingerprint()}"
        grid.prepare(options, settings, fixed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record["options"] = {name: getattr(options, name) for name in (*FIXED, "epochs")}
    record["digits"] = {"train": len(training), "test": len(test)}

    # Every pixel of every digit finds a slot: the bound acts on the layers, never on the data.
    slots = int(max(training.counts().max(), test.counts().max()))
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))
        reporter.print(
            f"{len(training):,} digits to train, {len(test):,} to test; "
            f"{training.counts().mean() / training.images[0].size:.1%} of the pixels are set, at most "
            f"{slots} in a digit, which is the input's capacity: nothing is cut."
        )
        reporter.print(
            "densities: share of sites with a response above 0 behind each convolution, before the "
            "sparse nets' selection"
        )
        written = [options.out / f"mnist.{suffix}" for suffix in ("csv", "json", "md", "png")]
        trained = grid.train_all(
            settings,
            functools.partial(_run, options=options, fixed=fixed, slots=slots, test=test),
            lambda _: (Arrays(training.images, training.labels), (test.images, test.labels)),
            options,
            reporter,
            table=written[0],
            row=_result,
        )
        record["runs"] = [_result(each) | {"epochs": each.rows} for each in trained]
        reporter.print("timing the nets' steps in turn ...")
        record["nets"] = _measure(trained, training, options)
        cells = _cells(record)
        reporter.print(summary_table(cells))
        frame.write_json(written[1], record)
        _write(written[2], record, cells)
        grid_picture(written[3], record)
        frame.publish(reporter, written, options.report, "mnist")
    return trained


def dense_input(images: jax.Array) -> jax.Array:
    """[B, 28, 28] grey levels, scaled to [0, 1], with a channel axis."""
    return jnp.asarray(images, jnp.float32)[..., None] / 255


@dataclasses.dataclass(frozen=True)
class SparseInput:
    """[B, 28, 28] grey levels as a sparse tensor; equal objects share one compiled step."""

    slots: int

    def __call__(self, images: jax.Array) -> ilajax.SparseTensor:
        return ilajax.from_dense(dense_input(images), self.slots)


def make_net(bound: float | None, *, seed: int) -> ilajax.models.OctNet3:
    """The paper's bounds: rho_21 for the first block, 2 rho_21 for the second; None: the dense twin.

    Filters start orthogonal, so that few channels see as many different things as they can: drawn one by one,
    some are alike, and a strict bound leaves few responses by which they could part.
    """
    return ilajax.models.OctNet3(
        RESOLUTION,
        num_classes=CLASSES,
        density_bounds=None if bound is None else (bound, min(1.0, 2 * bound)),
        rngs=nnx.Rngs(seed),
        dense=bound is None,
        kernel_init=nnx.initializers.orthogonal(),
    )


@functools.cache
def make_transformation(learning_rate: float) -> optax.GradientTransformation:
    """Adagrad; the same rate gives the same object, so that another run reuses the compiled step."""
    # From an empty sum of squares, as Adagrad is defined. Started at 0.1, as Optax does by default, it drowns
    # the small gradients of a strict bound, and the sparse net learns much slower.
    # The chain lets Adagrad take the extra arguments of the training loop, and ignore them.
    return optax.chain(optax.adagrad(learning_rate, initial_accumulator_value=0.0))


def _settings(options: argparse.Namespace) -> list[Setting]:
    """All nets of the first seed first, so that a run that is stopped has covered the grid."""
    nets: list[float | None] = [None] if options.nets != "sparse" else []
    nets += sorted(set(options.density_bounds)) if options.nets != "dense" else []
    return [Setting(bound, seed) for seed in grid.seeds(options) for bound in nets]


def _run(
    setting: Setting, options: argparse.Namespace, fixed: dict[str, Any], slots: int, test: Digits
) -> Run:
    dense = setting.bound is None
    model = make_net(setting.bound, seed=setting.seed)
    transformation = make_transformation(options.learning_rate)
    # The dense twin is the plain baseline.
    if not dense and (options.regularisation or options.pruning_threshold):
        transformation = ilajax.optim.sparse_training(
            model,
            transformation,
            scale=options.regularisation,
            offset=0.1,
            b1=0.1,
            b2=0.1,
            threshold=options.pruning_threshold,
        )
    sample = dense_input(test.images[:250])
    return Run(
        name=setting.name,
        model=model,
        optimizer=nnx.Optimizer(model, transformation, wrt=nnx.Param),
        to_input=dense_input if dense else SparseInput(slots),
        directory=options.out,
        seed=setting.seed,
        densities=functools.partial(dense_densities, sample) if dense else sparse_densities,
        after_epoch=None if dense or not options.pruning_threshold else compact,
        options=fixed,
    )


def _result(trained: Trained) -> Row:
    """A run's line in the grid's table: what its last epoch says."""
    last = trained.rows[-1]
    named = {"density_bound": trained.setting.bound, "seed": trained.setting.seed}
    return named | {name: last[name] for name in REPORTED}


def _measure(
    trained: Sequence[Trained], training: Digits, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each net its accuracies by seed, the memory of its activations, and the time of its step."""
    first = {each.setting.net: each for each in reversed(trained)}  # of its seeds, the first
    runs = {net: first[net].run for net in reversed(first)}
    batch = training.images[: options.batch_size], training.labels[: options.batch_size]
    calls = {net: _step(run, *batch) for net, run in runs.items()}
    timings = timing.side_by_side(calls, budget=options.budget)
    steps = len(training) // options.batch_size
    found = []
    for net, run in runs.items():
        accuracies = [e.rows[-1]["test_accuracy"] for e in trained if e.setting.net == net]
        stored = jax.eval_shape(run.to_input, jax.ShapeDtypeStruct(batch[0].shape, jnp.uint8))
        found.append(
            {
                "net": net,
                "density_bound": first[net].setting.bound,
                "test_accuracies": accuracies,
                "mean": statistics.mean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "activation_bytes": activation_bytes(run.model, stored),
                "step": timings.record(net),
                "epoch_s": timings.median(net) * steps,
                "times_dense": timings.ratio(net, "dense") if "dense" in runs else None,
            }
        )
    return found


def _step(run: Run, images: Any, labels: Any) -> Callable[[], Any]:
    """A training step of a copy of the trained net, as the training loop calls it."""
    structure, state = nnx.split((run.model, run.optimizer))
    # The step takes the arrays it is given for its own.
    model, optimizer = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    model.train()
    step = nnx.cached_partial(train_step, model, optimizer)
    return lambda: step(images, labels, jnp.asarray(False), to_input=run.to_input)


def _cells(record: dict[str, Any]) -> list[Cells]:
    """A head, then a line for each net."""
    cells: list[Cells] = [
        ("bounds", "test accuracy", "of each seed", "activations", "step", "epoch", "against dense")
    ]
    for net in record["nets"]:
        bound, deviation, times = net["density_bound"], net["deviation"], net["times_dense"]
        cells.append(
            (
                "dense" if bound is None else f"{bound:g} / {min(1.0, 2 * bound):g}",
                f"{net['mean']:.2%}" + ("" if deviation is None else f" ± {deviation:.2%}"),
                ", ".join(f"{accuracy:.2%}" for accuracy in net["test_accuracies"]),
                f"{net['activation_bytes'] / 1e6:.2f} MB",
                timing.show(net["step"]["median_s"]),
                timing.show(net["epoch_s"]),
                "" if times is None else f"x {times:.2f}",
            )
        )
    return cells


def _write(path: Path, record: dict[str, Any], cells: Sequence[Cells]) -> None:
    """The grid, and the test accuracy after each epoch."""
    digits, options = record["digits"], record["options"]
    epochs: list[Cells] = [("run", *map(str, range(1, options["epochs"] + 1)))]
    for run in record["runs"]:
        name = Setting(run["density_bound"], run["seed"]).name
        epochs.append((name, *(f"{row['test_accuracy']:.2%}" for row in run["epochs"])))
    frame.write_page(
        path,
        "# MNIST",
        f"`{record['command']}`: {digits['train']:,} digits to train, {digits['test']:,} to test, "
        f"{options['epochs']} epochs, batch {options['batch_size']}.",
        f"{timing.headline(record)}.",
        "Accuracy after the last epoch: the mean over the seeds, ± the standard deviation between them. "
        "Activations: all feature maps of a batch. Epoch: all its training steps, without tests.",
        cells,
        "![](mnist.png)",
        "Test accuracy after each epoch:",
        epochs,
    )


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.mnist", __doc__)
    add, amount = parser.add_argument, frame.not_negative
    add("--nets", choices=("sparse", "dense", "both"), default="both", help="which nets to train")
    bounds = "bounds of the first block, in (0, 1]; the second block has twice as much, at most 1"
    share = frame.density_bound
    add("--density-bounds", type=share, nargs="+", default=BOUNDS, metavar="RHO", help=bounds)
    scale = "of the density-biased L2 of the sparse nets, with b1 = b2 = offset = 0.1; 0: none"
    add("--regularisation", type=amount, default=0.0, metavar="LAMBDA", help=scale)
    threshold = "filter weights of the sparse nets that stay below it for two epochs go; 0: none"
    add("--pruning-threshold", type=amount, default=0.0, metavar="W", help=threshold)
    add("--learning-rate", type=frame.positive, default=0.01, metavar="RATE", help="Adagrad's rate")
    digits = "folder with MNIST's four IDX files, plain or .gz; by default the shipped digits"
    add("--data-dir", type=Path, metavar="DIR", help=digits)
    budget = "seconds for timing each net"
    add("--budget", type=frame.positive, default=2.0, metavar="S", help=budget)
    grid.add_training(parser, epochs=10, out="runs/mnist", of_seed="of weights, order and dropout")
    frame.add_report(parser, "mnist.{csv,json,md,png}")
    return parser


if __name__ == "__main__":
    frame.run(main)
