"""Single operations and whole training steps beside other libraries, with the target of each row.

    python -m benchmarks                            # every row of this device: a quarter of an hour
    python -m benchmarks --device cpu               # on the CPU, although there is a GPU
    python -m benchmarks --list                     # the rows' names
    python -m benchmarks --rows r64 pruning         # rows with one of these in their name
    python -m benchmarks --rows "b8 shell" step     # OctNet3 beside PyTorch, its layers and whole steps
    python -m benchmarks --budget 0.5               # seconds for each candidate: quicker, and less certain
    python -m benchmarks --report                   # benchmarks/results/bench.{json,md}, on a GPU bench-gpu
    python -m benchmarks --data-dir ../shared/data/kicad       # with rows about real parts

`benchmarks.measure` says how candidates are timed on either device. Each peer is first seen to compute what
ilajax computes. PyTorch and spconv take part where they are installed: `pip install -e '.[bench]'`. If the
machine was not quiet a row says so: what other processes took of the cores, and how far calls differ. What is
written to files begins with layers and steps against PyTorch. It holds a CPU's ceilings too, and for each
convolution what had to happen and which share of the ceilings that was (`benchmarks.work`).
"""

import gc
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import RESULTS, measure, report, timing, work
from benchmarks.measure import Record
from benchmarks.rows import ROWS, Row, parts_rows
from experiments import frame


def main(
    arguments: list[str] | None = None,
    rows: Sequence[Row] = ROWS,
    limits: work.Ceilings | None = None,
) -> list[Record]:
    """Runs the benchmark; returns the record of each row. Ceilings are measured, if anything is written."""
    parser = frame.parser("benchmarks", __doc__)
    add = parser.add_argument
    add("--device", choices=measure.DEVICES, help="where to measure; by default where JAX runs")
    add("--rows", nargs="+", default=[""], metavar="NAME", help="with one of these in the name")
    add("--list", action="store_true", help="print the names of the rows, and end")
    add("--budget", type=frame.positive, default=5.0, metavar="S", help="seconds per candidate")
    add("--data-dir", type=Path, metavar="DIR", help="with parts in a train.npz, for more rows")
    frame.add_report(parser, "bench.{json,md}", RESULTS)
    options = parser.parse_args(arguments)

    device = options.device or jax.default_backend()
    rows = [*rows, *(parts_rows(options.data_dir) if options.data_dir else [])]
    wanted = [part.lower() for part in options.rows]
    rows = [r for r in rows if device in r.targets and any(p in r.name.lower() for p in wanted)]
    if not rows:
        parser.error(f"--rows fits no row of {device}: see --list")
    if options.list:
        print(*(row.name for row in rows), sep="\n")
        return []
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != device:
        parser.error(f"--device {device}, but JAX runs on {jax.default_backend()}")

    if limits is None and device == "cpu" and options.report:
        limits = work.ceilings()
    provenance = timing.provenance("benchmarks", arguments)
    batches = measure.tasks(rows, device, measure.Effort(options.budget), limits)
    tasks = {name: task for batch in batches.values() for name, task in batch.items()}
    done: dict[str, Record] = {}
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(provenance))
        reporter.begin("tasks", len(tasks), 0)
        reporter.print(report.COLUMNS.format(*report.HEAD))
        for name, task in tasks.items():
            done[name] = measure.attempt(task)
            records = measure.records(rows, device, done)
            for line in report.lines([record for record in records if record["row"] == name]):
                reporter.print(line)
            reporter.step(name)
            if options.report:
                stem = options.report / ("bench" if device == "cpu" else f"bench-{device}")
                record = provenance | {"ceilings": limits, "rows": records}
                report.write(stem, "Benchmarks", record, report.page(records, limits))
            gc.collect()  # what one task holds, another one may need
        for line in report.lines([record for record in records if record["row"] not in done]):
            reporter.print(line)
        reporter.print(report.verdict(records))
    return records


if __name__ == "__main__":
    if report.errors(main()):
        raise SystemExit("a row has failed")
