"""MNIST under a density bound: OctNet3-24^2 and its dense twin, as in the paper's section 4.

    python -m experiments.mnist                      # both nets on the 10,000 shipped digits
    python -m experiments.mnist --data-dir FOLDER    # on the original IDX files
    python -m experiments.mnist --density-bound 0.035 --nets sparse
    python -m experiments.mnist --resume             # goes on where a run was stopped

Both nets start from the same weights and see the same batches. Pixels below 50 are set to zero, the
others scaled to (0, 1].
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ilajax
from experiments import frame
from experiments.activations import (
    activation_bytes,
    dense_densities,
    feature_maps,
    paired_channels,
    sparse_densities,
)
from experiments.checkpoints import check_options, remove_checkpoints
from experiments.data.loader import Arrays
from experiments.data.mnist import CLASSES, Digits, load_mnist
from experiments.picture import activations_picture
from experiments.summary import Outcome, summary_cells, summary_table, write_report
from experiments.timing import machine
from experiments.training import Run, checkpoint_directory, live_weights, train

RESOLUTION = 24  # the paper's name of the network for 28 x 28 pixels
PIXEL_THRESHOLD = 50
COLUMNS = [
    *("net", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "live_weights"),
    *(f"density_conv{number}" for number in range(1, 7)),
    *("seconds_per_step", "seconds"),
]
# What changes the bits of a run, and therefore must not change when it goes on.
FIXED = (
    "density_bound",
    "regularisation",
    "pruning_threshold",
    "learning_rate",
    "batch_size",
    "seed",
)


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Runs the experiment; returns what became of each net."""
    parser = _parser()
    options = parser.parse_args(arguments)
    nets = ("dense", "sparse") if options.nets == "both" else (options.nets,)
    try:
        training, test = (d.threshold(PIXEL_THRESHOLD) for d in load_mnist(options.data_dir))
        if len(training) < options.batch_size:
            raise ValueError(
                f"--batch-size {options.batch_size} is more than the {len(training)} digits to train on."
            )
        fixed = {name: getattr(options, name) for name in FIXED}
        fixed["data_dir"] = training.fingerprint()
        for net in nets:
            checkpoints = checkpoint_directory(options.out, net)
            if options.resume:
                check_options(checkpoints, fixed)
            else:
                remove_checkpoints(checkpoints)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    # Every pixel of every digit finds a slot: the bound acts on the layers, never on the data.
    slots = int(max(training.counts().max(), test.counts().max()))
    with frame.Reporter() as reporter:
        reporter.print(
            f"{len(training):,} digits to train, {len(test):,} to test; "
            f"{training.counts().mean() / training.images[0].size:.1%} of the pixels are set, at most "
            f"{slots} in a digit, which is the input's capacity: nothing is cut."
        )
        reporter.print(
            "densities: share of sites with a response above 0 behind each convolution, before the "
            "sparse net's selection"
        )
        outcomes = []
        for net in nets:
            run = _run(net, options, fixed, slots, test)
            filter_weights = live_weights(run.model)
            rows = train(
                run,
                Arrays(training.images, training.labels),
                (test.images, test.labels),
                epochs=options.epochs,
                batch_size=options.batch_size,
                columns=COLUMNS,
                reporter=reporter,
                checkpoint_every=options.checkpoint_every,
            )
            stored = _activation_bytes(run, options)
            outcomes.append(Outcome(run, rows, filter_weights, stored))
        reporter.print(summary_table(summary_cells(outcomes)))
        written = [options.out / f"{net}.csv" for net in nets]
        if len(outcomes) == 2:
            written.append(options.out / "activations.png")
            _draw(written[-1], *(o.run for o in outcomes), test, options.density_bound)
        if options.report:
            written.append(options.report)
            _report(options, training, test, outcomes)
        reporter.print("wrote " + ", ".join(map(str, written)))
    return outcomes


def dense_input(images: jax.Array) -> jax.Array:
    """[B, 28, 28] grey levels, scaled to [0, 1], with a channel axis."""
    return jnp.asarray(images, jnp.float32)[..., None] / 255


@dataclasses.dataclass(frozen=True)
class SparseInput:
    """[B, 28, 28] grey levels as a sparse tensor; equal objects share one compiled step."""

    slots: int

    def __call__(self, images: jax.Array) -> ilajax.SparseTensor:
        return ilajax.from_dense(dense_input(images), self.slots)


def make_net(bound: float, *, dense: bool, seed: int) -> ilajax.models.OctNet3:
    """The paper's bounds: rho_21 for the first block, rho_22 = 2 rho_21 for the second."""
    return ilajax.models.OctNet3(
        RESOLUTION,
        num_classes=CLASSES,
        density_bounds=(bound, min(1.0, 2 * bound)),
        rngs=nnx.Rngs(seed),
        dense=dense,
    )


@functools.cache
def make_transformation(learning_rate: float) -> optax.GradientTransformation:
    """Adagrad; the same rate gives the same object, so that another run reuses the compiled step."""
    # From an empty sum of squares, as Adagrad is defined. Started at 0.1, as Optax does by default, it drowns
    # the small gradients of a strict bound, and the sparse net learns much slower.
    # The chain lets Adagrad take the extra arguments of the training loop, and ignore them.
    return optax.chain(optax.adagrad(learning_rate, initial_accumulator_value=0.0))


def _run(
    net: str, options: argparse.Namespace, fixed: dict[str, Any], slots: int, test: Digits
) -> Run:
    dense = net == "dense"
    model = make_net(options.density_bound, dense=dense, seed=options.seed)
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
        name=net,
        model=model,
        optimizer=nnx.Optimizer(model, transformation, wrt=nnx.Param),
        to_input=dense_input if dense else SparseInput(slots),
        densities=functools.partial(dense_densities, sample) if dense else sparse_densities,
        prunes=not dense and options.pruning_threshold > 0,
        directory=options.out,
        options=fixed,
        seed=options.seed,
    )


def _activation_bytes(run: Run, options: argparse.Namespace) -> int:
    """Keys and values of every feature map of a batch, or the dense maps."""
    images = jax.ShapeDtypeStruct((options.batch_size, 28, 28), jnp.uint8)
    return activation_bytes(run.model, jax.eval_shape(run.to_input, images))


def _draw(path: Path, dense: Run, sparse: Run, test: Digits, bound: float) -> None:
    digits = test.images[:3]
    for run in (dense, sparse):
        run.model.eval()
    images = paired_channels(
        feature_maps(dense.model, dense.to_input(digits)),
        feature_maps(sparse.model, sparse.to_input(digits)),
        ["conv1", "conv2", "conv3"],
    )
    activations_picture(path, digits, *images, bound=bound)


def _report(
    options: argparse.Namespace, training: Digits, test: Digits, outcomes: list[Outcome]
) -> None:
    second = min(1.0, 2 * options.density_bound)
    heading = f"Bounds {options.density_bound:g} / {second:g}, seed {options.seed}, {len(training):,} digits"
    command = ["python -m experiments.mnist", *(["--data-dir MNIST"] if options.data_dir else [])]
    defaults = _parser()
    for name in (*FIXED, "epochs", "nets"):
        value = getattr(options, name)
        if value != defaults.get_default(name):
            command.append(f"--{name.replace('_', '-')} {value}")
    for name in ("regularisation", "pruning_threshold"):
        if getattr(options, name):
            heading += f", {name.replace('_', ' ')} {getattr(options, name):g}"
    notes = [
        f"`{' '.join(command)}`: {len(training):,} digits to train, {len(test):,} to test, "
        f"{options.epochs} epochs, batch {options.batch_size}.",
        "",
        f"{machine()}.",
    ]
    write_report(options.report, heading, notes, outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mnist",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--nets", choices=("sparse", "dense", "both"), default="both", help="which nets to train")
    add(
        "--density-bound",
        type=frame.density_bound,
        default=0.095,
        metavar="RHO",
        help="bound of the first block, in (0, 1]; the second block has twice as much, at most 1",
    )
    add(
        "--regularisation",
        type=frame.not_negative,
        default=0.0,
        metavar="LAMBDA",
        help="scale of the density-biased L2 of the sparse net, with b1 = b2 = offset = 0.1; 0: none",
    )
    add(
        "--pruning-threshold",
        type=frame.not_negative,
        default=0.0,
        metavar="W",
        help="filter weights of the sparse net that stay below it for two epochs go; 0: none",
    )
    add("--learning-rate", type=frame.positive, default=0.01, metavar="RATE", help="Adagrad's rate")
    add("--epochs", type=frame.positive_int, default=10, metavar="N", help="epochs")
    add("--batch-size", type=frame.positive_int, default=32, metavar="N", help="digits a step")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights, order and dropout")
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's four IDX files, plain or .gz; by default the shipped digits",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/mnist"),
        metavar="DIR",
        help="folder for tables, picture and checkpoints; a new run replaces an earlier one's",
    )
    add(
        "--checkpoint-every",
        type=frame.positive_int,
        metavar="STEPS",
        help="leave a checkpoint after so many steps too; by default at the ends of epochs only",
    )
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    add("--report", type=Path, metavar="FILE", help="add the summary to this markdown file too")
    return parser


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on from the last checkpoint") from None
