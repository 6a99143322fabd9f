"""Single operations and whole training steps beside other libraries, with the target of each row.

    python -m benchmarks                            # every row of this device: some minutes
    python -m benchmarks --device cpu               # on the CPU, although there is a GPU
    python -m benchmarks --list                     # the rows' names
    python -m benchmarks --rows r64 pruning         # rows with one of these in their name
    python -m benchmarks --json results.json --markdown results.md
    python -m benchmarks --report                   # benchmarks/results/bench.{json,md}, on a GPU bench-gpu
    python -m benchmarks --data-dir ../shared/data/kicad       # with rows about real parts

`benchmarks.measure` says how candidates are timed on either device. Each peer is first seen to compute what
ilajax computes. PyTorch and spconv take part where they are installed: `pip install -e '.[bench]'`. What is
written to files holds a CPU's ceilings too (`benchmarks.ceilings`), and for each layer what had to happen
(`benchmarks.counts`) and which share of the ceilings that was.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import RESULTS, ceilings, measure, report, timing
from benchmarks.rows import ROWS, Row, parts_rows
from experiments import frame

Record = dict[str, Any]


def main(
    arguments: list[str] | None = None,
    rows: Sequence[Row] = ROWS,
    limits: ceilings.Ceilings | None = None,
) -> list[Record]:
    """Runs the benchmark; returns the record of each row.

    Args:
      arguments: of the command line.
      rows: what there is to choose from.
      limits: the processor's ceilings; by default they are measured, if anything is written.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    device = options.device or jax.default_backend()
    if options.data_dir:
        rows = [*rows, *parts_rows(options.data_dir)]
    rows = [row for row in rows if device in row.targets and _fits(row.name, options.rows)]
    if not rows:
        parser.error(f"--rows fits no row of {device}: see --list")
    if options.list:
        print(*(row.name for row in rows), sep="\n")
        return []
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != device:
        parser.error(f"--device {device}, but JAX runs on {jax.default_backend()}")
    if options.report:
        stem = options.report / ("bench" if device == "cpu" else f"bench-{device}")
        options.json = options.json or stem.with_suffix(".json")
        options.markdown = options.markdown or stem.with_suffix(".md")
    if limits is None and device == "cpu" and (options.json or options.markdown):
        limits = ceilings.measure()
    return run(rows, device, options, timing.provenance("benchmarks", arguments), limits)


def run(
    rows: Sequence[Row],
    device: str,
    options: argparse.Namespace,
    provenance: Record,
    limits: ceilings.Ceilings | None,
) -> list[Record]:
    """Runs the rows' tasks one by one, prints the table, and writes all that is known after each task."""
    batches = measure.tasks(rows, device, measure.Effort(options.budget), limits)
    waiting = {name: task for batch in batches.values() for name, task in batch.items()}
    done: dict[str, Record] = {}
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(provenance))
        reporter.begin("tasks", len(waiting), 0)
        reporter.print(report.COLUMNS.format(*report.HEAD))
        for name, task in waiting.items():
            done[name] = measure.attempt(task)
            records = measure.records(rows, device, done)
            for line in report.lines([record for record in records if record["row"] == name]):
                reporter.print(line)
            reporter.step(name)
            if options.json:
                frame.write_json(options.json, provenance | {"ceilings": limits, "rows": records})
            gc.collect()  # what one task holds, another one may need
        for line in report.lines([record for record in records if record["row"] not in done]):
            reporter.print(line)
        if options.markdown:
            origin = f"`{provenance['command']}` at commit {provenance['commit']}."
            origin = f"{origin}\n\n{timing.headline(provenance)}.\n\n"
            for heading, lines in report.sections(records, limits):
                body = (origin if heading == report.TIMES else "") + "\n".join(lines)
                frame.write_section(options.markdown, heading, body, title="Benchmarks")
        reporter.print(report.verdict(records))
    return records


def _fits(name: str, parts: Sequence[str] | None) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("benchmarks", __doc__)
    add = parser.add_argument
    add("--device", choices=measure.DEVICES, help="where to measure; by default where JAX runs")
    add("--rows", nargs="+", metavar="NAME", help="only rows with one of these in their name")
    add("--list", action="store_true", help="print the names of the rows, and end")
    budget = "seconds for each candidate"
    add("--budget", type=frame.positive, default=5.0, metavar="S", help=budget)
    folder = "folder with parts in a train.npz, for more rows"
    add("--data-dir", type=Path, metavar="DIR", help=folder)
    add("--json", type=Path, metavar="FILE", help="write every figure to this file, row by row")
    add("--markdown", type=Path, metavar="FILE", help="write the tables to this markdown file")
    frame.add_report(parser, "bench.{json,md}", RESULTS)
    return parser


if __name__ == "__main__":
    if report.errors(main()):
        raise SystemExit("a row has failed")
