"""Whether data come as fast as they are used: clouds, voxelised in worker processes, feed a training step.

    python -m experiments.feeding --data-dir ../shared/data/kicad            # the set's own clouds
    python -m experiments.feeding                                            # clouds made on the spot
    python -m experiments.feeding --no-step --batches 10000                  # memory, without training

OctNet3 takes 32^3 voxels. Three figures: the share of the time that the step's process waits for a batch, how
often the step is compiled, and how the memory of all processes grows.
"""

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import psutil
from flax import nnx

import ilajax
from experiments import frame
from experiments.data.loader import feed
from experiments.data.point_sets import Clouds, PointSets, load_point_sets, make_point_sets
from experiments.summary import Cells, summary_table
from experiments.timing import headline, provenance, show
from experiments.training import train_step

RESOLUTION = 32
BOUNDS = (0.04, 0.12, 0.28)
COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX reports
MOMENTS = 10  # at which memory is read


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the loop; returns what was measured, as in the JSON file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.data_dir:
            sets = load_point_sets(options.data_dir / "train.npz")
        else:
            sets = make_point_sets(options.clouds, 2048, seed=0)
        if len(sets) < options.batch_size:
            raise ValueError(f"--batch-size {options.batch_size} is more than {len(sets)} clouds.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record: dict[str, Any] = provenance("feeding", arguments)
    record["versions"]["grain"] = version("grain")
    record["options"] = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
    record["clouds"] = len(sets)
    with frame.Reporter() as reporter:
        reporter.print(headline(record))
        record |= measure(options, sets, reporter)
        cells = [_summary(record), _memory(record)]
        for table in cells:
            reporter.print(summary_table(table))
        written = [options.out / "feeding.md", options.out / "feeding.json"]
        frame.write_json(written[1], record)
        _write(written[0], record, cells)
        if options.report:
            written += frame.report(options.report, "feeding", written)
        reporter.print("wrote " + ", ".join(map(str, written)))
    return record


def measure(
    options: argparse.Namespace, sets: PointSets, reporter: frame.Reporter
) -> dict[str, Any]:
    """Takes the batches one by one, and trains on each unless there is `no_step`."""
    capacity = options.capacity or sets.points.shape[1]
    source = Clouds(sets, RESOLUTION, capacity, seed=options.seed)
    # More epochs than are taken: a worker that has no more to do ends, and its memory with it.
    epochs = options.batches + 100
    fed = feed(
        source, options.batch_size, seed=options.seed, epochs=epochs, workers=options.workers
    )
    step = None if options.no_step else _step(len(sets.class_names), options.seed)
    marks = {round(options.batches * n / MOMENTS) for n in range(1, MOMENTS + 1)}
    waiting, stepping, cut, memory = [], [], 0, []
    reporter.begin("feeding", options.batches, 0)
    with contextlib.closing(fed), _compilations() as compiled:
        for number in range(1, options.batches + 1):
            start = time.perf_counter()
            batch = next(fed)
            arrived = time.perf_counter()
            if step:
                step(batch.inputs, batch.labels)
            waiting.append(arrived - start)
            stepping.append(time.perf_counter() - arrived)
            cut += int(batch.overflow.sum())
            reporter.step(f"{show(waiting[-1])} for a batch, {show(stepping[-1])} for a step")
            if number in marks:
                memory.append({"batches": number, **_resident()})
    # The first batch waits for the workers to start, and the first step is compiled.
    seconds = {"waiting": sum(waiting[1:]), "stepping": sum(stepping[1:])}
    return {
        "first_s": {"waiting": waiting[0], "stepping": stepping[0]},
        "seconds": seconds,
        "waiting_share": seconds["waiting"] / sum(seconds.values()) if step else None,
        "longest_wait_s": max(waiting[1:], default=0.0),
        "compilations": compiled.count("jit(train_step)") if step else None,
        "voxels_cut": cut,
        "memory": memory,
    }


def _step(classes: int, seed: int) -> Callable[..., None]:
    """A training step that returns when it has ended."""
    model = ilajax.models.OctNet3(
        RESOLUTION, num_classes=classes, density_bounds=BOUNDS, rngs=nnx.Rngs(seed)
    )
    recipe = ilajax.optim.sparse_training(model, optax.adam(5e-4))
    optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
    model.train()
    step = nnx.cached_partial(train_step, model, optimizer)

    def call(x: ilajax.SparseTensor, labels: jax.Array) -> None:
        jax.block_until_ready(step(x, labels, jnp.asarray(False), to_input=as_it_is))

    return call


def as_it_is(x: ilajax.SparseTensor) -> ilajax.SparseTensor:
    return x


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """The names of the functions that JAX compiles meanwhile."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILED:
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _resident() -> dict[str, Any]:
    """Resident memory in bytes: of this process, and of each worker."""
    workers = sorted(worker.pid for worker in multiprocessing.active_children())
    return {
        "parent": psutil.Process().memory_info().rss,
        "workers": [psutil.Process(worker).memory_info().rss for worker in workers],
    }


def _summary(record: dict[str, Any]) -> list[Cells]:
    options, seconds = record["options"], record["seconds"]
    others = max(1, options["batches"] - 1)
    cells: list[Cells] = [
        ("", ""),
        ("batches", f"{options['batches']:,} of {options['batch_size']}"),
        ("worker processes", str(options["workers"])),
        ("until the first batch is there", show(record["first_s"]["waiting"])),
        ("then waiting, for a batch", show(seconds["waiting"] / others)),
        ("longest wait", show(record["longest_wait_s"])),
        ("voxels cut", f"{record['voxels_cut']:,}"),
    ]
    if not options["no_step"]:
        cells += [
            ("training step", show(seconds["stepping"] / others)),
            ("share of the time spent waiting", f"{record['waiting_share']:.2%}"),
            ("compilations of the step", str(record["compilations"])),
        ]
    return cells


def _memory(record: dict[str, Any]) -> list[Cells]:
    return [
        ("after batches", "resident memory", "of the workers"),
        *(
            (
                f"{at['batches']:,}",
                f"{at['parent'] / 1e6:,.0f} MB",
                " + ".join(f"{size / 1e6:,.0f}" for size in at["workers"]) + " MB",
            )
            for at in record["memory"]
        ),
    ]


def _write(path: Path, record: dict[str, Any], tables: list[list[Cells]]) -> None:
    lines = ["# Feeding", "", f"`{record['command']}`", "", f"{headline(record)}."]
    lines += ["", f"{record['clouds']:,} clouds, {RESOLUTION}^3 voxels, bounds {BOUNDS}."]
    for cells in tables:
        lines += ["", *frame.markdown_table(cells)]
    path.write_text("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.feeding",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with train.npz of point sets; by default clouds are made on the spot",
    )
    add("--clouds", type=frame.positive_int, default=400, metavar="N", help="clouds to make")
    add("--batches", type=frame.positive_int, default=1000, metavar="N", help="batches to take")
    add("--batch-size", type=frame.positive_int, default=8, metavar="N", help="clouds a step")
    add("--workers", type=workers, default=2, metavar="N", help="processes that make batches")
    add(
        "--capacity",
        type=frame.positive_int,
        metavar="K",
        help="voxels of a cloud that are kept; by default its number of points, which cuts nothing",
    )
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights, order and turns")
    add("--no-step", action="store_true", help="take the batches without training on them")
    add(
        "--out",
        type=Path,
        default=Path("runs/feeding"),
        metavar="DIR",
        help="folder for what is written",
    )
    frame.add_report(parser, "feeding.md and feeding.json")
    return parser


workers = frame.number(int, lambda n: n >= 0, "a whole number of at least 0")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
