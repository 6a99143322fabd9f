"""The records of rows as tables: on the terminal, and in a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import ceilings
from benchmarks.rows import MOST_LAUNCHES
from benchmarks.timing import show
from experiments.frame import Cells, markdown_table

Record = dict[str, Any]

TIMES = "Times, and targets"
WORK = "What must happen, and what share of the ceiling was reached"
MEMORY = "Memory and launches"
NOTES = {
    TIMES: [
        "The ratio is how many times as long the other took as the row's first candidate: on a CPU the",
        "median over a run in which all are called in turn. On a GPU times are medians of queues of calls,",
        "and XLA's dense convolution is that of the quicker of two layouts.",
    ],
    WORK: [
        "Products are multiply-adds of an entry and a weight that meet in an output site. Bytes are inputs",
        "read once and outputs written once. Times are of the whole call, on all cores; shares are those",
        "of the ceilings of all cores. A working set that fits into a cache can exceed the copy's.",
    ],
    MEMORY: [
        "Workspace and output as XLA plans them, in MiB, beside their bounds. Candidates are the most of any",
        "channel. Launches, and their time, are from a profile of one call, with all that XLA adds.",
    ],
}
MET = {None: "", True: "yes", False: "NO"}


def sections(
    records: Sequence[Record], limits: ceilings.Ceilings | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Heading and lines of each table that has any."""
    ceiling_lines = [f"- {line}" for line in ceilings.lines(limits)] if limits is not None else []
    for heading, make in ((TIMES, times), (WORK, work), (MEMORY, memory)):
        head, *body = make(records)
        if body:
            more = [*ceiling_lines, ""] if heading == WORK and ceiling_lines else []
            yield heading, [*NOTES[heading], "", *more, *markdown_table([head, *body])]


HEAD = ("row", "median (min to max)", "against", "median (min to max)", "ratio", "target", "met")


def lines(records: Sequence[Record]) -> list[str]:
    """The table of times for the terminal, without its head; what went wrong is told in a line."""
    found = [COLUMNS.format(*cells).rstrip() for cells in times(records)[1:]]
    for record in records:
        parts = {"": record, **{f", {who}": one for who, one in record["candidates"].items()}}
        failed = {who: one["error"] for who, one in parts.items() if "error" in one}
        found += [f"{record['row']}{who}: {_last_line(text)}" for who, text in failed.items()]
        found += [f"{record['row']}: {who} is not installed" for who in record.get("missing", ())]
    return found


COLUMNS = "{:40} {:33} {:15} {:33} {:24} {:>7} {}"


def times(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each candidate but the first, or for that one where it is alone."""
    found: list[Cells] = [HEAD]
    for record in records:
        if not record["candidates"]:
            continue
        (_, first), *others = record["candidates"].items()
        ours = (record["row"], _spread(first))
        if "most_s" in first or not others:
            found.append((*ours, "", "", "", _target(first), MET[first.get("met")]))
        for who, one in others:
            ratio = f"{one['ratio']:.3g}x" if "ratio" in one else ""
            if "ratio_min" in one:
                ratio += " ({ratio_min:.3g} to {ratio_max:.3g})".format(**one)
            found.append((*ours, who, _spread(one), ratio, _target(one), MET[one.get("met")]))
    return found


def work(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each layer whose work was counted."""
    head = (
        "row;median;entries;sites;candidates;kept;products;G products/s;of ceiling;MB;GB/s;of copy"
    )
    found: list[Cells] = [(*head.split(";"), "ns per product", "ns per candidate")]
    for title, one in _layers(records):
        if "work" not in one:
            continue
        counted, reached = one["work"], one["work"]["reached"]
        per = [reached[f"ns_per_{each}"] for each in ("product", "candidate")]
        found.append(
            (
                title,
                show(one["median_s"]),
                *(
                    f"{counted[k]:,}"
                    for k in ("entries", "sites", "candidates", "kept", "products")
                ),
                f"{reached['products_per_s'] / 1e9:.3g}",
                f"{reached['multiply_add_share']:.1%}",
                f"{counted['bytes'] / 1e6:.3g}",
                f"{reached['bytes_per_s'] / 1e9:.3g}",
                f"{reached['copy_share']:.1%}",
                *("" if value is None else f"{value:.3g}" for value in per),
            )
        )
    return found


def memory(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each layer."""
    head = "row;workspace;bound;output;bound;candidates;capacity;same bits;launches;target;kernels"
    found: list[Cells] = [tuple(head.split(";"))]
    for title, one in _layers(records):
        sizes = [one.get(f"{what}_{of}") for what in ("workspace", "output") for of in BYTES]
        counted = [one.get(name) for name in ("most_candidates", "capacity")]
        launched = "launches" in one
        found.append(
            (
                title,
                *("" if size is None else f"{size / 2**20:.1f}" for size in sizes),
                *("" if value is None else str(value) for value in counted),
                MET[one.get("same_bits")],
                f"{one['launches']:g}" if launched else "",
                str(MOST_LAUNCHES) if launched and not one.get("backward") else "",
                show(one["busy_s"]) if launched else "",
            )
        )
    return found


BYTES = ("bytes", "bound")


def verdict(records: Sequence[Record]) -> str:
    """How many targets are met."""
    candidates = [one for record in records for one in record["candidates"].values()]
    met = [one["met"] for one in candidates if one.get("met") is not None]
    return f"{sum(met)} of {len(met)} targets met, {errors(records)} errors"


def errors(records: Sequence[Record]) -> int:
    """How many rows and candidates have failed."""
    candidates = [one for record in records for one in record["candidates"].values()]
    return sum("error" in one for one in [*records, *candidates])


def _layers(records: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    for record in records:
        for who, one in record["candidates"].items():
            if "workspace_bytes" in one or "launches" in one:
                yield record["row"] if who == "ilajax" else f"{record['row']}, {who}", one


def _target(one: Mapping[str, Any]) -> str:
    if "most_s" in one:
        return show(one["most_s"])
    return "" if one.get("target") is None else f"{one['target']:g}x"


def _spread(one: Mapping[str, Any]) -> str:
    if "median_s" not in one:
        return "failed" if "error" in one else ""
    return "{} ({} to {})".format(*(show(one[f"{k}_s"]) for k in ("median", "min", "max")))


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
