"""Rooms, point by point: the U-Net on what scanners see, with and without sites of its own, at equal time.

    python -m experiments.segmentation                        # both nets, 26 minutes each
    python -m experiments.segmentation --minutes 5            # a first impression
    python -m experiments.segmentation --nets submanifold --epochs 40
    python -m experiments.segmentation --resume               # goes on where a run was stopped
    python -m experiments.segmentation --report    # writes experiments/results/segmentation.{csv,json,md,png}

Points become voxels, the U-Net gives logits to voxels, and `ilajax.sample` reads them at the points. The
submanifold net's blocks stay at the sites that they are given; those of the dilating net reach new sites on
the four levels down, and keep the strongest up to the density bounds.

Training scenes are new ones in every epoch. To give both nets equal time, their steps are timed in turn
first, and each gets as many epochs as fit in; `--resume` keeps to that plan. They are trained in turn too, an
eighth each, so that what else the machine does meanwhile falls on both. What is reported is the last
epoch, whichever was the best one.
"""

import argparse
import contextlib
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from benchmarks import timing
from experiments import frame
from experiments.checkpoints import CheckpointError, Checkpoints, check_options, remove_checkpoints
from experiments.data.loader import Batch
from experiments.data.scenes import CLASSES, FEATURES, Clouds, SceneSource
from experiments.frame import Cells, summary_table
from experiments.segmentation_picture import segmentation_picture
from experiments.segmentation_score import baseline, judged, score_points, test_row, test_step
from experiments.training import (
    Judge,
    Row,
    Run,
    as_it_is,
    checkpoint_directory,
    train,
    train_step,
)

NETS = ("submanifold", "dilating")
DEPTH = 14
# Above what the scenes need at 64: their levels fill 16, 41, 75 and 100% at most.
BOUNDS = [0.2, 0.45, 0.8, 1.0]
TRAINING_SEED, TEST_SEED = 0, 1  # of the scenes
SHOWN = (0, 1)  # test scenes of the picture
TURNS = 8  # that the nets take in training
TIMING_S = 15.0  # for the steps of each net
# What changes the bits of a run, and therefore must not change when it goes on.
FIXED = (
    *(
        "minutes",
        "epochs",
        "scenes",
        "rays",
        "resolution",
        "capacity",
        "density_bounds",
        "features",
    ),
    *("learning_rate", "weight_decay", "batch_size", "seed"),
)


class Segmenter(nnx.Module):
    """Logits for each point of `Clouds`, [B, P, classes]: the U-Net's, read between the voxels' centres."""

    def __init__(self, net: ilajax.models.UNet):
        self.net = net

    def __call__(self, clouds: Clouds) -> jax.Array:
        logits = self.net(clouds.voxels)
        rows = jnp.arange(len(clouds.present), dtype=jnp.int32)[:, None]
        index = jnp.where(clouds.present, rows, -1)
        return ilajax.sample(logits, clouds.points, index, method="linear")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns its record, as the JSON file has it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    record = timing.provenance("experiments.segmentation", arguments)
    nets = [net for net in NETS if options.nets in (net, "both")]
    fixed = {name: getattr(options, name) for name in FIXED}
    plan_path = options.out / "plan.json"
    try:
        training, held_out = _sources(options)
        if len(training) < options.batch_size:
            raise ValueError(
                f"--batch-size {options.batch_size} is more than the {len(training)} scenes of an epoch."
            )
        if options.test_scenes <= max(SHOWN):
            raise ValueError(
                f"--test-scenes must be at least {max(SHOWN) + 1}, for the picture, got "
                f"{options.test_scenes}."
            )
        for net in nets:  # before anything is written: what does not fit raises
            nnx.eval_shape(functools.partial(make_net, net, options))
            checkpoints = checkpoint_directory(options.out, net)
            if options.resume:
                check_options(checkpoints, fixed)
            else:
                remove_checkpoints(checkpoints)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record["options"] = fixed | {"test_scenes": options.test_scenes}

    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))
        test = held_out.batch(np.arange(len(held_out)), 1)
        record["scenes"] = _about(test)
        reporter.print(
            "held-out scenes: {scenes}, {points:,.0f} points and {voxels:,.0f} voxels in the mean, "
            "{voxels_cut:,} voxels cut".format(**record["scenes"])
        )
        record["baseline"] = judged(baseline(training, held_out))
        reporter.print(f"baseline: mean IoU {record['baseline']['mean_iou']:.2%}")
        plan = _plan(plan_path, nets, training, options, reporter)
        written = [options.out / f"segmentation.{end}" for end in ("csv", "json", "md", "png")]
        runs = {net: _run(net, plan[net], training, options, fixed) for net in nets}
        tables = _trained(runs, plan, training, test, options, reporter)
        record["nets"] = [_result(net, runs[net], tables[net]) for net in nets]
        lines = [{"net": "baseline"} | record["baseline"], *map(_line, record["nets"])]
        frame.write_table(written[0], list(lines[-1]), lines)
        shown = held_out.batch(np.array(SHOWN), 1).inputs
        found = {net: predicted(run.model, shown) for net, run in runs.items()}
        cells = _cells(record)
        reporter.print(summary_table(cells))
        frame.write_json(written[1], record)
        _write(written[2], record, cells)
        segmentation_picture(written[3], record, [held_out.scene(n) for n in SHOWN], found)
        frame.publish(reporter, written, options.report, "segmentation")
    return record


def make_net(net: str, options: argparse.Namespace) -> Segmenter:
    """A net of `NETS`; both start from the same weights."""
    return Segmenter(
        ilajax.models.UNet(
            DEPTH,
            FEATURES,
            len(CLASSES),
            density_bounds=options.density_bounds,
            features=options.features,
            stem_features=options.features[0],
            dilate=net == "dilating",
            rngs=nnx.Rngs(options.seed),
        )
    )


@functools.cache
def make_transformation(rate: float, decay: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a cosine schedule; the same numbers give the same object, for the compiled step's sake."""
    warm = min(200, max(1, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1))
    # The chain lets AdamW take the extra arguments of the training loop, and ignore them.
    return optax.chain(optax.adamw(schedule, weight_decay=decay))


@nnx.jit
def _found(model: Segmenter, inputs: Clouds) -> jax.Array:
    return jnp.argmax(model(inputs), axis=-1)


def predicted(model: Segmenter, inputs: Clouds) -> np.ndarray:
    """The class that a net gives to each point, int[B, P]; any in padding."""
    model.eval()
    return np.asarray(_found(model, inputs))


# ---- The run.


def _sources(options: argparse.Namespace) -> tuple[SceneSource, SceneSource]:
    grid = options.rays, options.resolution, options.capacity
    training = SceneSource(options.scenes, *grid, seed=TRAINING_SEED)
    return training, SceneSource(options.test_scenes, *grid, seed=TEST_SEED, repeats=True)


def _about(test: Batch) -> dict[str, Any]:
    keys = np.asarray(test.inputs.voxels.keys)
    assert test.overflow is not None
    return {
        "scenes": len(test.labels),
        "points": float((test.labels >= 0).sum(axis=1).mean()),
        "voxels": float((keys < test.inputs.voxels.sites).sum(axis=(1, 2)).mean()),
        "voxels_cut": int(test.overflow.sum()),
    }


def _plan(
    path: Path,
    nets: list[str],
    training: SceneSource,
    options: argparse.Namespace,
    reporter: frame.Reporter,
) -> dict[str, int]:
    """The epochs of each net, from a file where the run goes on: the learning rate depends on them."""
    if options.epochs:
        return dict.fromkeys(nets, options.epochs)
    plan: dict[str, int] = json.loads(path.read_text()) if options.resume and path.exists() else {}
    if not all(net in plan for net in nets):
        reporter.print("timing the nets' steps in turn ...")
        numbers = itertools.count()
        ready = training.batch(np.arange(options.batch_size), 1)

        def make_batch() -> Batch:
            """A new one where training makes its own, else one that is ready."""
            places = (next(numbers) + np.arange(options.batch_size)) % len(training)
            return ready if options.workers else training.batch(places, 1)

        calls = {}
        for net in nets:
            run = _run(net, 1, training, options, {})
            run.model.train()
            step = nnx.cached_partial(train_step, run.model, run.optimizer)
            bound = functools.partial(step, to_input=run.to_input, score=run.score)
            calls[net] = lambda bound=bound: bound(*make_batch()[:2], jnp.asarray(False))
        timings = timing.side_by_side(calls, budget=TIMING_S)
        steps = len(training) // options.batch_size
        for net in nets:
            epoch = timings.median(net) * steps
            plan[net] = max(1, int(60 * options.minutes / epoch))
            reporter.print(f"{net}: {timing.show(timings.median(net))} a step, {plan[net]} epochs")
        frame.write_json(path, plan)
    return plan


def _trained(
    runs: dict[str, Run],
    plan: dict[str, int],
    training: SceneSource,
    test: Batch,
    options: argparse.Namespace,
    reporter: frame.Reporter,
) -> dict[str, list[Row]]:
    """Trains the nets in turn, a part of their epochs each, so that what disturbs one disturbs the other."""
    tables: dict[str, list[Row]] = {net: [] for net in runs}
    for turn in range(1, TURNS + 1):
        for net, run in runs.items():
            epochs = plan[net] * turn // TURNS
            # A run that goes on may be ahead of this turn; its last one restores what is finished.
            if epochs < max(_begun(run), 1) or epochs == len(tables[net]):
                continue
            tables[net] = train(
                run,
                training,
                (test.inputs, test.labels),
                epochs=epochs,
                batch_size=options.batch_size,
                reporter=reporter,
                test_batch=options.batch_size,
                workers=options.workers,
                checkpoint_every=options.checkpoint_every,
                epochs_after=sum(plan[net] for net in runs) * (TURNS - turn) // TURNS,
            )
    return tables


def _begun(run: Run) -> int:
    """Epochs that the newest checkpoint that can be read has begun; 0 without one."""
    if run.checkpoints.is_dir():
        with Checkpoints(run.checkpoints, read_only=True) as checkpoints:
            for number in checkpoints.numbers():
                with contextlib.suppress(CheckpointError):  # training tells of it
                    notes = checkpoints.notes(number)
                    return len(notes["rows"]) + bool(notes["so_far"])
    return 0


def _run(
    net: str, epochs: int, training: SceneSource, options: argparse.Namespace, fixed: dict[str, Any]
) -> Run:
    model = make_net(net, options)
    steps = epochs * (len(training) // options.batch_size)
    transformation = make_transformation(options.learning_rate, options.weight_decay, steps)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    # Put where restored variables are: of others the second turn would compile its steps again.
    state = nnx.state((model, optimizer))
    nnx.update((model, optimizer), jax.device_put(state, jax.devices()[0]))
    return Run(
        name=net,
        model=model,
        optimizer=optimizer,
        to_input=as_it_is,
        directory=options.out,
        seed=options.seed,
        densities=level_densities,
        bounds={f"level{n}": bound for n, bound in enumerate(options.density_bounds, 1)},
        options=fixed,
        score=score_points,
        judge=Judge(test_step, test_row),
    )


def level_densities(model: Segmenter) -> dict[str, float]:
    """For each level down, the share of the sites that its blocks reach, before a bound acts.

    The submanifold blocks reach those of the step down to them, the dilating ones their neighbours too.
    """
    densities = {}
    levels = zip(model.net.down, model.net.encoder, strict=True)
    for number, (down, blocks) in enumerate(levels, 1):
        dilates = blocks[0].density_bound is not None
        conv = blocks[0].conv1 if dilates else down.layers[0]
        densities[f"level{number}"] = float(conv.density[...].mean())
    return densities


# ---- What is written.


def _result(net: str, run: Run, rows: list[Row]) -> dict[str, Any]:
    seconds = np.cumsum([row["seconds"] for row in rows]).tolist()
    last = rows[-1]
    return {
        "net": net,
        "accuracy": last["test_accuracy"],
        "mean_iou": last["test_mean_iou"],
        **{name: value for name, value in last.items() if name.startswith("iou_")},
        "parameters": sum(p.size for p in jax.tree.leaves(nnx.state(run.model, nnx.Param))),
        "seconds": seconds[-1],
        "curve": [(at / 60, row["test_mean_iou"]) for at, row in zip(seconds, rows, strict=True)],
        "epochs": rows,
    }


def _line(net: dict[str, Any]) -> Row:
    return {name: value for name, value in net.items() if name not in ("curve", "epochs")}


def _cells(record: dict[str, Any]) -> list[Cells]:
    """A head, then a line for each net and the baseline."""
    cells: list[Cells] = [("net", "mean IoU", *CLASSES, "points told right")]
    for each in (record["baseline"] | {"net": "baseline"}, *record["nets"]):
        shares = [each["mean_iou"], *(each[f"iou_{name}"] for name in CLASSES), each["accuracy"]]
        cells.append((each["net"], *("" if s is None else f"{s:.1%}" for s in shares)))
    return cells


def _effort(record: dict[str, Any]) -> list[Cells]:
    """What the nets took: weights, time, steps, and the sites of the levels."""
    levels = [f"level {n}" for n in range(1, 5)]
    cells: list[Cells] = [
        ("net", "parameters", "training", "epochs", "step", "voxels cut", *levels)
    ]
    for net in record["nets"]:
        last = net["epochs"][-1]
        cells.append(
            (
                net["net"],
                f"{net['parameters']:,}",
                f"{net['seconds'] / 60:.1f} min",
                str(len(net["epochs"])),
                timing.show(np.median([row["seconds_per_step"] for row in net["epochs"]]).item()),
                f"{sum(row['voxels_cut'] for row in net['epochs']):,}",
                *(f"{last[f'density_level{n}']:.1%}" for n in range(1, 5)),
            )
        )
    return cells


def _over_time(record: dict[str, Any]) -> list[Cells]:
    """The mean IoU after some minutes of training: that of the last epoch that had ended by then."""
    most = max(net["curve"][-1][0] for net in record["nets"])
    times = [most * share / 8 for share in range(1, 9)]
    cells: list[Cells] = [("minutes", *(f"{t:.3g}" for t in times))]
    for net in record["nets"]:
        values = [[v for m, v in net["curve"] if m <= t] for t in times]
        cells.append((net["net"], *(f"{v[-1]:.1%}" if v else "" for v in values)))
    return cells


def _write(path: Path, record: dict[str, Any], cells: list[Cells]) -> None:
    options, scenes = record["options"], record["scenes"]
    r, edge = options["resolution"], 640 / options["resolution"]
    bounds = ", ".join(f"{bound:g}" for bound in options["density_bounds"])
    frame.write_page(
        path,
        "# Segmentation of rooms",
        f"`{record['command']}`: rooms made on the spot, {options['scenes']} new ones in each epoch, "
        f"{scenes['scenes']} held out; in the mean {scenes['points']:,.0f} points and "
        f"{scenes['voxels']:,.0f} voxels of {edge:g} cm in a grid of {r} x {r} x {r // 2}. Batch "
        f"{options['batch_size']}, seed {options['seed']}.",
        f"{timing.headline(record)}.",
        "IoU of each class over all points of the held-out scenes, after the last epoch. The baseline gives "
        "each bin of height and slope its usual class.",
        cells,
        f"UNet{DEPTH} with {', '.join(map(str, options['features']))} channels and density bounds {bounds}. "
        "Training counts the tests after each epoch. Voxels cut: of all training scenes, by the capacity. "
        "Levels: sites that the blocks of a level down reach, as a share of its grid, in the last step, "
        "before the bound acts.",
        _effort(record),
        "![](segmentation.png)",
        "Mean IoU over the time of training:",
        _over_time(record),
    )


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.segmentation", __doc__)
    add, whole = parser.add_argument, frame.positive_int
    add("--nets", choices=(*NETS, "both"), default="both", help="which nets to train")
    minutes = "of training steps for each net, by which it gets its epochs"
    add("--minutes", type=frame.positive, default=26.0, metavar="M", help=minutes)
    add("--epochs", type=whole, metavar="N", help="epochs of each net, in place of --minutes")
    add("--scenes", type=whole, default=200, metavar="N", help="scenes of an epoch")
    add("--test-scenes", type=whole, default=32, metavar="N", help="held-out scenes, at least 2")
    add("--rays", type=whole, default=8192, metavar="N", help="of the scanners of a scene")
    add("--resolution", type=whole, default=64, metavar="R", help="the grid is R x R x R / 2")
    add("--capacity", type=whole, default=6144, metavar="K", help="voxels of a scene")
    bounds = "of the four levels down, in (0, 1]"
    share = frame.density_bound
    add("--density-bounds", type=share, nargs=4, default=BOUNDS, metavar="RHO", help=bounds)
    features = "channels of the four levels down and the four up"
    default = [16, 32, 64, 128, 64, 64, 32, 32]
    add("--features", type=whole, nargs=8, default=default, metavar="C", help=features)
    add(
        "--learning-rate", type=frame.positive, default=3e-3, metavar="RATE", help="AdamW's highest"
    )
    add("--weight-decay", type=frame.not_negative, default=1e-2, metavar="W", help="AdamW's")
    add("--batch-size", type=whole, default=4, metavar="N", help="scenes a step")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights and order")
    workers = "processes that make the scenes; 0: the training process does"
    number = frame.number(int, lambda n: n >= 0, "a whole number of at least 0")
    add("--workers", type=number, default=0, metavar="N", help=workers)
    frame.add_out(parser, "runs/segmentation")
    every = "leave a checkpoint after so many steps too; by default at the ends of epochs only"
    add("--checkpoint-every", type=whole, metavar="STEPS", help=every)
    resume = "go on from the newest checkpoint in --out that can be read, if there is any"
    add("--resume", action="store_true", help=resume)
    frame.add_report(parser, "segmentation.{csv,json,md,png}")
    return parser


if __name__ == "__main__":
    frame.run(main)
