"""Single operations and whole training steps against what else there is, side by side, with the bar of each.

    python -m experiments.bench                            # every row: some minutes
    python -m experiments.bench --list                     # their names
    python -m experiments.bench --rows r64 pruning         # rows with one of these in their name
    python -m experiments.bench --json results.json --markdown results.md
    python -m experiments.bench --report                   # experiments/results/bench.{json,md}
    python -m experiments.bench --data-dir ../shared/data/kicad       # with rows about real parts

Every row calls its candidates in turn (`experiments.timing`) and compares within the run. Each peer is
first seen to compute what ilajax computes. PyTorch and spconv take part where they are installed:
`pip install -e '.[bench]'`. What is written to files holds the machine's ceilings too
(`experiments.ceilings`), and for each layer what had to happen (`experiments.counts`) and which share of the
ceilings that was.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import ceilings, frame, timing
from experiments.bench_rows import ROWS, Row, parts_rows
from experiments.counts import count

Record = dict[str, Any]


def measure(row: Row, budget: float, limits: ceilings.Ceilings | None = None) -> Record:
    """Times a row's candidates; returns its record, with the work of its layers where `limits` are given."""
    contest = row.build()
    timings = timing.side_by_side(contest.candidates, budget=budget)
    first = next(iter(contest.candidates))
    against: Record = {}
    for name, bar in row.bars.items():
        against[name] = {"bar": bar, "ratio": None, "met": None}
        if name in contest.candidates:
            ratios = timings.ratios(name, first)
            ratio = timings.ratio(name, first)
            against[name] |= {"ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios)}
            against[name]["met"] = None if bar is None else ratio >= bar
    record = {
        "row": row.name,
        "candidates": {name: timings.record(name) for name in contest.candidates},
        "against": against,
        **contest.facts,
    }
    if limits is not None:
        record["work"] = {}
        for name, layer in contest.layers.items():
            counts = count(layer)
            attained = ceilings.reached(counts, timings.median(name), limits)
            record["work"][name] = counts.record() | {"reached": attained}
    return record


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
    if options.data_dir:
        rows = [*rows, *parts_rows(options.data_dir)]
    chosen = [r for r in rows if not options.rows or _fits(r.name, options.rows)]
    if not chosen:
        parser.error(f"--rows fits none of {[row.name for row in rows]}")
    if options.list:
        print(*(row.name for row in chosen), sep="\n")
        return []
    if options.report:
        options.json = options.json or options.report / "bench.json"
        options.markdown = options.markdown or options.report / "bench.md"
    provenance = timing.provenance("bench", arguments)
    # They are those of the processor: of no use where an accelerator computes.
    if limits is None and provenance["platform"] == "cpu" and (options.json or options.markdown):
        limits = ceilings.measure()
    records: list[Record] = []
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(provenance))
        reporter.print(HEAD)
        reporter.begin("rows", len(chosen), 0)
        for row in chosen:
            try:
                record = measure(row, options.budget, limits)
            except Exception as error:  # the other rows are of use without this one
                record = {"row": row.name, "error": f"{type(error).__name__}: {error}"}
            records.append(record)
            for line in lines(record):
                reporter.print(line)
            reporter.step(row.name)
            if options.json:
                frame.write_json(options.json, provenance | {"ceilings": limits, "rows": records})
            gc.collect()  # what one row holds, another one may need
        if options.markdown:
            notes = [f"`{provenance['command']}` at commit {provenance['commit']}.", ""]
            notes += [f"{timing.headline(provenance)}.", ""]
            _write(options.markdown, "Bars", notes, cells(records))
            if limits is not None:
                notes = [*WORK_NOTES, "", *(f"- {line}" for line in ceilings.lines(limits)), ""]
                _write(options.markdown, WORK, notes, work_cells(records))
        reporter.print(verdict(records))
    return records


COLUMNS = "{:42} {:14}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}{:>8}  {}"
HEAD = COLUMNS.format(
    "row", "who", "median", "min", "max", "ratio", "min", "max", "bar", ""
).rstrip()


def lines(record: Record) -> list[str]:
    """A row of the table: a line for each candidate, with how many times as long it took as the first."""
    if "error" in record:
        return [f"{record['row']:42} {record['error']}"]
    found = []
    for name, seconds in record["candidates"].items():
        title = "" if found else record["row"]
        times = [timing.show(seconds[f"{which}_s"]) for which in ("median", "min", "max")]
        rest = [""] * 5
        if name in record["against"]:
            entry = record["against"][name]
            rest = [f"{entry[k]:.3g}x" for k in ("ratio", "ratio_min", "ratio_max")]
            bar, met = entry["bar"], entry["met"]
            rest += ["", ""] if bar is None else [f"{bar:g}x", "met" if met else "NOT MET"]
        found.append(COLUMNS.format(title, name, *times, *rest).rstrip())
    missing = [name for name in record["against"] if name not in record["candidates"]]
    found += [COLUMNS.format("", name, *[""] * 7, "not installed") for name in missing]
    return found


def cells(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A head, then a line for each bar."""
    found = [
        ("row", "median (min to max)", "against", "median (min to max)", "ratio", "bar", "met")
    ]
    for record in records:
        for name, entry in record.get("against", {}).items():
            if entry["ratio"] is None:
                continue
            first, other = (
                "{} ({} to {})".format(
                    *(timing.show(s[f"{k}_s"]) for k in ("median", "min", "max"))
                )
                for s in (next(iter(record["candidates"].values())), record["candidates"][name])
            )
            ratio = "{ratio:.3g}x ({ratio_min:.3g} to {ratio_max:.3g})".format(**entry)
            bar = "" if entry["bar"] is None else f"{entry['bar']:g}x"
            met = {None: "", True: "yes", False: "no"}[entry["met"]]
            found.append((record["row"], first, name, other, ratio, bar, met))
    return found


WORK = "What must happen, and what share of the ceiling was reached"
WORK_NOTES = [
    "Products are multiply-adds of an entry and a weight that meet in an output site. Bytes are inputs",
    "read once and outputs written once. Times are of the whole call, on all cores; shares are those of the",
    "ceilings of all cores. A working set that fits into a cache can exceed the copy's.",
]


def work_cells(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A head, then a line for each layer that was timed."""
    head = (
        "row;median;entries;sites;candidates;kept;products;G products/s;of ceiling;MB;GB/s;of copy"
    )
    found = [(*head.split(";"), "ns per product", "ns per candidate")]
    for record in records:
        for name, work in record.get("work", {}).items():
            attained = work["reached"]
            sizes = [f"{work[k]:,}" for k in ("entries", "sites", "candidates", "kept", "products")]
            arithmetic = f"{attained['products_per_s'] / 1e9:.3g}"
            traffic = [f"{work['bytes'] / 1e6:.3g}", f"{attained['bytes_per_s'] / 1e9:.3g}"]
            times = [attained[f"ns_per_{each}"] for each in ("product", "candidate")]
            found.append(
                (
                    record["row"] if name == "ilajax" else f"{record['row']}, {name}",
                    timing.show(record["candidates"][name]["median_s"]),
                    *sizes,
                    *(arithmetic, f"{attained['multiply_add_share']:.1%}"),
                    *(*traffic, f"{attained['copy_share']:.1%}"),
                    *("" if t is None else f"{t:.3g}" for t in times),
                )
            )
    return found


def verdict(records: Sequence[Record]) -> str:
    """How many bars are met."""
    against = [entry for record in records for entry in record.get("against", {}).values()]
    entries = [entry for entry in against if entry["bar"] is not None]
    met = [entry["met"] for entry in entries if entry["met"] is not None]
    errors = sum("error" in record for record in records)
    return f"{sum(met)} of {len(met)} bars met, {len(entries) - len(met)} not measured, {errors} errors"


def _fits(name: str, parts: Sequence[str]) -> bool:
    return any(part.lower() in name.lower() for part in parts)


def _write(path: Path, heading: str, notes: list[str], table: list[tuple[str, ...]]) -> None:
    body = "\n".join(notes + frame.markdown_table(table))
    frame.write_section(path, heading, body, title="Benchmarks")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", nargs="+", metavar="NAME", help="only rows with one of these in their name")
    add("--list", action="store_true", help="print the names of the rows, and end")
    add(
        "--budget", type=frame.positive, default=5.0, metavar="S", help="seconds for each candidate"
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with parts in a train.npz, for more rows",
    )
    add("--json", type=Path, metavar="FILE", help="write every figure to this file, row by row")
    add("--markdown", type=Path, metavar="FILE", help="write the tables to this markdown file")
    frame.add_report(parser, "bench.{json,md}")
    return parser


if __name__ == "__main__":
    if any("error" in record for record in main()):
        raise SystemExit("a row has failed")
