"""Whether data come as fast as they are used: shapes, voxelised in worker processes, feed a training step.

    python -m benchmarks.feeding                                            # shapes made on the spot
    python -m benchmarks.feeding --data kicad --data-dir ../shared/data/kicad
    python -m benchmarks.feeding --resolution 64 --batch-size 32
    python -m benchmarks.feeding --no-step --batches 10000                  # memory, without training
    python -m benchmarks.feeding --report                     # benchmarks/results/feeding-...

OctNet3 trains, with the paper's bounds. Three figures: the share of the time that the step's process waits
for a batch, how often the step is compiled, and how the memory of all processes grows.
"""

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax
import psutil
from flax import nnx

import ilajax
from benchmarks import RESULTS, report
from benchmarks.rows import training_step
from benchmarks.timing import headline, provenance, show
from experiments import frame
from experiments.data.loader import feed
from experiments.data.sets import Dataset, add_data, load_dataset, where
from experiments.frame import Cells
from ilajax.models.octnet3 import TABLE_2

RESOLUTIONS = tuple(r for r, net in TABLE_2.items() if len(net.input_shape) == 3)
COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX reports
MOMENTS = 10  # at which memory is read


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the loop; returns what was measured, as in the JSON file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        data = load_dataset(
            options.data,
            **where(options),
            resolution=options.resolution,
            capacity=options.capacity,
            seed=0,
            train_size=options.shapes,
            test_size=0,
        )
        if len(data.training) < options.batch_size:
            raise ValueError(
                f"--batch-size {options.batch_size} is more than {len(data.training)} samples."
            )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    record: dict[str, Any] = provenance("benchmarks.feeding", arguments)
    record["versions"]["grain"] = version("grain")
    record["options"] = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
    record["samples"] = len(data.training)
    record["bounds"] = TABLE_2[options.resolution].density_bounds
    with frame.Reporter() as reporter:
        reporter.print(headline(record))
        record |= measure(options, data, reporter)
        summary, memory = _summary(record), _memory(record)
        reporter.print(frame.summary_table(summary))
        reporter.print(frame.summary_table(memory))
    if options.report:
        size, batch = options.resolution, options.batch_size
        step = "-no-step" if options.no_step else ""
        stem = options.report / f"feeding-{options.data}-{size}-b{batch}{step}"
        slots = f"{record['samples']:,} samples, {record['capacity']:,} slots each"
        bounds = ", ".join(map(str, record["bounds"]))
        body = [f"Data: {options.data}, {slots}.", f"OctNet3-{size}^3 with the bounds {bounds}."]
        for table in (summary, memory):
            body += ["", *frame.markdown_table(table)]
        report.write(stem, "Feeding", record, body)
    return record


def measure(options: argparse.Namespace, data: Dataset, reporter: frame.Reporter) -> dict[str, Any]:
    """Takes the batches one by one, and trains on each unless there is `no_step`."""
    fed = feed(
        data.training,
        options.batch_size,
        seed=0,
        # More than are taken: a worker that has no more to do ends, and its memory with it.
        epochs=options.batches + 100,
        workers=options.workers,
    )
    step = None if options.no_step else _step(options, len(data.class_names))
    marks = {round(options.batches * n / MOMENTS) for n in range(1, MOMENTS + 1)}
    waiting, stepping, cut, memory, compiled = [], [], 0, [], []

    def listen(event: str, _: float, **about: Any) -> None:
        if event == COMPILED:
            compiled.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    reporter.begin("feeding", options.batches, 0)
    with contextlib.closing(fed):
        for number in range(1, options.batches + 1):
            start = time.perf_counter()
            batch = next(fed)
            arrived = time.perf_counter()
            if step:
                jax.block_until_ready(step(batch.inputs, batch.labels))
            waiting.append(arrived - start)
            stepping.append(time.perf_counter() - arrived)
            cut += int(batch.overflow.sum())
            reporter.step(f"{show(waiting[-1])} for a batch, {show(stepping[-1])} for a step")
            if number in marks:
                workers = sorted(worker.pid for worker in multiprocessing.active_children())
                parent, *others = (psutil.Process(n).memory_info().rss for n in (None, *workers))
                memory.append({"batches": number, "parent": parent, "workers": others})
    # The first batch waits for the workers to start, and the first step is compiled.
    seconds = {"waiting": sum(waiting[1:]), "stepping": sum(stepping[1:])}
    return {
        "first_s": {"waiting": waiting[0], "stepping": stepping[0]},
        "seconds": seconds,
        "waiting_share": seconds["waiting"] / sum(seconds.values()) if step else None,
        "longest_wait_s": max(waiting[1:]),
        "compilations": compiled.count("jit(train_step)") if step else None,
        "capacity": batch.inputs.capacity,
        "voxels_cut": cut,
        "memory": memory,
    }


def _step(options: argparse.Namespace, classes: int) -> Callable[..., Any]:
    model = ilajax.models.OctNet3(options.resolution, num_classes=classes, rngs=nnx.Rngs(0))
    return training_step(model, ilajax.optim.sparse_training(model, optax.adam(5e-4)))


def _summary(record: dict[str, Any]) -> list[Cells]:
    options, seconds = record["options"], record["seconds"]
    others = options["batches"] - 1
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
    cells: list[Cells] = [("after batches", "resident memory", "of the workers")]
    for at in record["memory"]:
        workers = " + ".join(f"{size / 1e6:,.0f}" for size in at["workers"])
        cells.append((f"{at['batches']:,}", f"{at['parent'] / 1e6:,.0f} MB", f"{workers} MB"))
    return cells


def _parser() -> argparse.ArgumentParser:
    parser, whole = frame.parser("benchmarks.feeding", __doc__), frame.positive_int
    workers = frame.number(int, lambda n: n >= 0, "a whole number of at least 0")
    several = frame.number(int, lambda n: n >= 2, "a whole number of at least 2")
    add = parser.add_argument
    add_data(parser)
    add("--resolution", type=int, choices=RESOLUTIONS, default=32, help="of each axis")
    add("--shapes", type=whole, default=400, metavar="N", help="shapes to make")
    add("--batches", type=several, default=1000, metavar="N", help="batches to take")
    add("--batch-size", type=whole, default=8, metavar="N", help="samples a step")
    add("--workers", type=workers, default=2, metavar="N", help="processes that make batches")
    add("--no-step", action="store_true", help="take the batches without training on them")
    frame.add_report(parser, "feeding-DATA-R-bN.{md,json}, or feeding-DATA-R-bN-no-step,", RESULTS)
    return parser


if __name__ == "__main__":
    frame.run(main, resumes=False)
