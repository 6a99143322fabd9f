"""Single operations and whole training steps against what else there is, side by side, with the bar of each.

    python -m experiments.bench                            # every row: some minutes
    python -m experiments.bench --rows r64 pruning         # rows whose name begins with one of these
    python -m experiments.bench --json results.json --markdown results.md
    python -m experiments.bench --data-dir ../shared/data/kicad       # with rows about real parts

Every row calls its candidates in turn (`experiments.timing`) and compares within the run. Each peer is
first seen to compute what ilajax computes. PyTorch and spconv take part where they are installed:
`pip install -e '.[bench]'`.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import frame, timing
from experiments.bench_rows import ROWS, Row, parts_rows

Record = dict[str, Any]


def measure(row: Row, budget: float) -> Record:
    """Times a row's candidates; returns its record."""
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
    return {
        "row": row.name,
        "candidates": {name: timings.record(name) for name in contest.candidates},
        "against": against,
        **contest.facts,
    }


def main(arguments: list[str] | None = None, rows: Sequence[Row] = ROWS) -> list[Record]:
    """Runs the benchmark; returns the record of each row."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.data_dir:
        rows = [*rows, *parts_rows(options.data_dir)]
    chosen = [r for r in rows if not options.rows or r.name.startswith(tuple(options.rows))]
    if not chosen:
        parser.error(f"--rows fits none of {[row.name for row in rows]}")
    provenance = timing.provenance("bench", arguments)
    records: list[Record] = []
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(provenance))
        reporter.print(HEAD)
        reporter.begin("rows", len(chosen), 0)
        for row in chosen:
            try:
                record = measure(row, options.budget)
            except Exception as error:  # the other rows are of use without this one
                record = {"row": row.name, "error": f"{type(error).__name__}: {error}"}
            records.append(record)
            for line in lines(record):
                reporter.print(line)
            reporter.step(row.name)
            if options.json:
                frame.write_json(options.json, provenance | {"rows": records})
            gc.collect()  # what one row holds, another one may need
        if options.markdown:
            notes = [f"`{provenance['command']}` at commit {provenance['commit']}.", ""]
            notes += [f"{timing.headline(provenance)}.", ""]
            body = "\n".join(notes + frame.markdown_table(cells(records)))
            frame.write_section(options.markdown, "Bars", body, title="Benchmarks")
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


def verdict(records: Sequence[Record]) -> str:
    """How many bars are met."""
    against = [entry for record in records for entry in record.get("against", {}).values()]
    entries = [entry for entry in against if entry["bar"] is not None]
    met = [entry["met"] for entry in entries if entry["met"] is not None]
    errors = sum("error" in record for record in records)
    return f"{sum(met)} of {len(met)} bars met, {len(entries) - len(met)} not measured, {errors} errors"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", nargs="+", metavar="NAME", help="only rows whose name begins with one of these")
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
    add("--markdown", type=Path, metavar="FILE", help="write the table to this markdown file")
    return parser


if __name__ == "__main__":
    if any("error" in record for record in main()):
        raise SystemExit("a row has failed")
