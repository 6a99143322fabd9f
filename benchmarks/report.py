"""The records of rows as tables on the terminal, and as pages with the command that made them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.rows import MOST_LAUNCHES
from benchmarks.timing import headline, show
from experiments import frame
from experiments.frame import Cells

Record = dict[str, Any]

AGAINST = "Layers and steps against PyTorch"
TIMES = "Times, and targets"
WORK = "What must happen, and what share of the ceiling was reached"
MEMORY = "Memory and launches"
QUIET = "Not quiet"
NOTES = {
    AGAINST: [
        "Medians, and how many times as long PyTorch took: forward, and forward and backward (f + b).",
        "Whole steps, and updates of weights, stand under f + b. PyTorch runs on all cores: dense layers, in",
        "the quicker of two memory formats; beside submanifold convolutions a gather, a matrix product and a",
        "scatter for each tap, with the maps given.",
    ],
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
    QUIET: [
        "What other processes took of the cores while a row was timed, and calls of which the slowest",
        "quarter took far longer than the quickest.",
    ],
    MEMORY: [
        "Workspace and output as XLA plans them, in MiB, beside their bounds. Candidates are the most of any",
        "channel. Launches, and their time, are from a profile of one call, with all that XLA adds.",
    ],
}
HEAD = ("row", "median (min to max)", "against", "median (min to max)", "ratio", "target", "met")
COLUMNS = "{:40} {:33} {:15} {:33} {:24} {:>7} {}"
MET = {None: "", True: "yes", False: "NO"}


def write(stem: Path, title: str, record: Record, body: Sequence[str]) -> None:
    """Writes a record, which has a `timing.provenance`, as `stem`.json, and its page as `stem`.md."""
    frame.write_json(stem.with_suffix(".json"), record)
    origin = f"`{record['command']}` at commit {record['commit']}."
    lines = [f"# {title}", "", origin, "", f"{headline(record)}.", "", *body]
    frame.write_text(stem.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def page(records: Sequence[Record], limits: work.Ceilings | None = None) -> list[str]:
    """The tables of a page, but for empty ones, each under its heading."""
    lines = []
    if disturbed := [record for record in records if record.get("not_quiet")]:
        lines += [f"Not quiet: in {len(disturbed)} of {len(records)} rows, listed at the end.", ""]
    makers = {
        AGAINST: against_torch,
        TIMES: times,
        WORK: work_done,
        MEMORY: memory,
        QUIET: not_quiet,
    }
    for heading, make in makers.items():
        head, *body = make(records)
        if body:
            lines += [f"## {heading}", "", *NOTES[heading], ""]
            if heading == WORK and limits:
                copy, products = limits["copy"] / 1e9, limits["multiply_adds"] / 1e9
                lines += [f"- copy from memory, all cores: {copy:.1f} GB/s"]
                lines += [f"- float32 multiply-adds, all cores: {products:.1f} G/s", ""]
            lines += [*frame.markdown_table([head, *body]), ""]
    return lines


def lines(records: Sequence[Record]) -> list[str]:
    """The table of times for the terminal, without its head; what went wrong is told in a line."""
    found = [COLUMNS.format(*cells).rstrip() for cells in times(records)[1:]]
    for record in records:
        parts = {"": record, **{f", {who}": one for who, one in record["candidates"].items()}}
        if why := record.get("not_quiet"):
            found.append(f"{record['row']}: not quiet: {why}")
        for who, one in parts.items():
            if "error" in one:
                found.append(f"{record['row']}{who}: {one['error'].strip().splitlines()[-1]}")
        found += [f"{record['row']}: {who} is not installed" for who in record.get("missing", ())]
    return found


def against_torch(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each layer or step that PyTorch was timed beside."""
    ways = ("forward", "f + b")
    found: dict[str, dict[str, str]] = {}
    for record in records:
        layer = record["row"]
        for way in ways:
            layer = layer.removesuffix(f", {way}")
        for who, one in record["candidates"].items():
            if who.startswith("PyTorch") and "ratio" in one:
                ours = next(iter(record["candidates"].values()))
                way = ways[ours.get("backward", True)]
                found.setdefault(layer, {}).update(
                    {
                        f"ilajax, {way}": show(ours["median_s"]),
                        f"PyTorch, {way}": show(one["median_s"]),
                        f"ratio, {way}": f"{one['ratio']:.3g}x",
                    }
                )
    head = [f"{what}, {way}" for what in ("ilajax", "PyTorch", "ratio") for way in ways]
    lines = [(layer, *(cells.get(name, "") for name in head)) for layer, cells in found.items()]
    return [("layer or step", *head), *lines]


def not_quiet(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each row whose times may be those of other work."""
    found = [(record["row"], record["not_quiet"]) for record in records if record.get("not_quiet")]
    return [("row", "why"), *found]


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


def work_done(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each layer whose work was counted."""
    counted = ("entries", "sites", "candidates", "kept", "products")
    per = ("ns_per_product", "ns_per_candidate")
    shares = ("G products/s", "of ceiling", "MB", "GB/s", "of copy")
    found: list[Cells] = [("row", "median", *counted, *shares, *(p.replace("_", " ") for p in per))]
    for title, one in _candidates(records, "work"):
        done, reached = one["work"], one["work"]["reached"]
        cells = (
            *(title, show(one["median_s"])),
            *(f"{done[name]:,}" for name in counted),
            f"{reached['products_per_s'] / 1e9:.3g}",
            f"{reached['multiply_add_share']:.1%}",
            f"{done['bytes'] / 1e6:.3g}",
            f"{reached['bytes_per_s'] / 1e9:.3g}",
            f"{reached['copy_share']:.1%}",
            *("" if reached[name] is None else f"{reached[name]:.3g}" for name in per),
        )
        found.append(cells)
    return found


def memory(records: Sequence[Record]) -> list[Cells]:
    """A head, then a line for each layer."""
    head = "row;workspace;bound;output;bound;candidates;capacity;same bits;launches;target;kernels"
    found: list[Cells] = [tuple(head.split(";"))]
    sizes = ("workspace_bytes", "workspace_bound", "output_bytes", "output_bound")
    for title, one in _candidates(records, "workspace_bytes", "launches"):
        launched = "launches" in one
        cells = (
            title,
            *("" if one.get(name) is None else f"{one[name] / 2**20:.1f}" for name in sizes),
            *(str(one.get(name) or "") for name in ("most_candidates", "capacity")),
            MET[one.get("same_bits")],
            f"{one['launches']:g}" if launched else "",
            str(MOST_LAUNCHES) if launched and not one.get("backward") else "",
            show(one["busy_s"]) if launched else "",
        )
        found.append(cells)
    return found


def verdict(records: Sequence[Record]) -> str:
    """How many targets are met."""
    met = [one["met"] for _, one in _candidates(records, "met") if one["met"] is not None]
    return f"{sum(met)} of {len(met)} targets met, {errors(records)} errors"


def errors(records: Sequence[Record]) -> int:
    """How many rows and candidates have failed."""
    return sum("error" in one for one in records) + len([*_candidates(records, "error")])


def _candidates(records: Sequence[Record], *figures: str) -> Iterator[tuple[str, Record]]:
    """Those with one of `figures`."""
    for record in records:
        for who, one in record["candidates"].items():
            if any(name in one for name in figures):
                yield record["row"] if who == "ilajax" else f"{record['row']}, {who}", one


def _target(one: Mapping[str, Any]) -> str:
    if "most_s" in one:
        return show(one["most_s"])
    return "" if one.get("target") is None else f"{one['target']:g}x"


def _spread(one: Mapping[str, Any]) -> str:
    if "median_s" not in one:
        return "failed" if "error" in one else ""
    return "{} ({} to {})".format(*(show(one[f"{k}_s"]) for k in ("median", "min", "max")))
