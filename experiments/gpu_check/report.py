"""The check's record, a JSON file, as a page to read."""

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.frame import markdown_table
from experiments.gpu_check.bench import PRECISIONS
from experiments.gpu_check.rows import MOST_LAUNCHES, ROWS, Row
from experiments.peers import LAYOUTS

Record = dict[str, Any]


def passed(record: Record) -> bool:
    """Whether every stage that ran did what it should; a tool that is not installed is no failure."""
    return all(stage["status"] in ("passed", "skipped") for stage in record["stages"].values())


def page(record: Record) -> str:
    """The whole page."""
    stages = record["stages"]
    built = stages.get("build", {})
    lines = [f"# GPU check: {record['gpu']}", ""]
    if record["dry_run"]:
        lines += [
            "**A dry run on the CPU: no CUDA kernel has run, and no figure says anything.**",
            "",
        ]
    lines += [f"`{record['command']}` at commit {record['commit']}, {record['date']}."]
    lines += [f"Driver {record['driver']}, nvcc {record['nvcc']}."]
    if "versions" in built:
        versions = [f"{name} {version}" for name, version in built["versions"].items() if version]
        lines += [", ".join(versions) + "."]
    lines += ["", *markdown_table([("stage", "status", "seconds", ""), *_stages(stages)]), ""]
    if "targets" in built:
        lines += [f"Registered, and so tested: {', '.join(built['targets']) or 'none'}.", ""]
    lines += _failures(stages)
    if tasks := stages.get("bench", {}).get("tasks"):
        for title, notes, cells in (
            ("Times", TIMES, times(tasks)),
            ("Memory and launches", MEMORY, memory(tasks)),
        ):
            lines += [f"## {title}", "", notes, "", *markdown_table(cells), ""]
    return "\n".join(lines).rstrip() + "\n"


TIMES = (
    "Microseconds of a call, the median of queues of calls (least to most). Dense: "
    "`lax.conv_general_dilated` in the better of two layouts. A bar holds against the quicker of the two "
    "precisions; ilajax's sums are float32."
)
MEMORY = (
    "Launches, and their time, from a profile of one call, with all that XLA adds. Workspace and output as "
    "XLA plans them, in MiB, against the bounds."
)


def times(tasks: Record) -> list[tuple[str, ...]]:
    """A head, and a line for each row."""
    precisions = [f"dense {name}" for name in PRECISIONS]
    faster = [f"faster than {name}" for name in PRECISIONS]
    found = [("row", "us", *precisions, *faster, "spconv", "bar", "met")]
    for row in ROWS:
        if row.name not in tasks:
            continue
        ours = tasks[row.name].get("us")
        dense = {name: dense_us(row, name, tasks) for name in PRECISIONS}
        met = verdict(row, ours, list(dense.values()))
        bars = [
            f"{bar:g} {unit}"
            for bar, unit in ((row.bar, "x"), (row.bar_us, "us"))
            if bar is not None
        ]
        found.append(
            (
                row.name,
                _spread(tasks[row.name]),
                *("" if us is None else f"{us:.1f}" for us in dense.values()),
                *("" if us is None or not ours else f"{us / ours:.2f}x" for us in dense.values()),
                _spread(tasks.get(f"spconv {row.name}", {})),
                ", ".join(bars),
                {None: "", True: "yes", False: "NO"}[met],
            )
        )
    return found


def memory(tasks: Record) -> list[tuple[str, ...]]:
    """A head, and a line for each row that ran."""
    head = "row;workspace;bound;output;bound;candidates;capacity;same bits;launches;bar;kernels us"
    found = [tuple(head.split(";"))]
    for row in ROWS:
        ours, profile = tasks.get(row.name, {}), tasks.get(f"profile {row.name}", {})
        if "us" not in ours and "launches" not in profile:
            continue
        sizes = [ours.get(f"{what}_{kind}") for what, kind in SIZES]
        launches = profile.get("launches")
        found.append(
            (
                row.name,
                *("" if size is None else f"{size / 2**20:.1f}" for size in sizes),
                *(str(ours.get(name, "")) for name in ("most_candidates", "capacity")),
                {None: "", True: "yes", False: "NO"}[ours.get("same_bits")],
                "" if launches is None else f"{launches:g}",
                "" if row.backward else str(MOST_LAUNCHES),
                "" if launches is None else f"{profile['busy_us']:.1f}",
            )
        )
    return found


SIZES = [(what, kind) for what in ("workspace", "output") for kind in ("bytes", "bound")]


def dense_us(row: Row, precision: str, tasks: Record) -> float | None:
    """The dense convolution's time in the better layout."""
    problem = tasks.get(row.name, {}).get("problem", row.problem)
    names = [f"dense {problem}, {precision}, {layout}" for layout in LAYOUTS]
    found = [tasks[name]["us"] for name in names if "us" in tasks.get(name, {})]
    return min(found, default=None) if row.against == "XLA dense" else None


def verdict(row: Row, ours: float | None, dense: Sequence[float | None]) -> bool | None:
    """Whether all bars of a row are met; None: it has none, or they have not been measured."""
    if ours is None or (row.bar is None and row.bar_us is None):
        return None
    if row.bar_us is not None and ours > row.bar_us:
        return False
    if row.bar is None:
        return True
    if any(us is None for us in dense):
        return None
    return min(us for us in dense if us is not None) >= row.bar * ours


def _stages(stages: Record) -> Iterator[tuple[str, ...]]:
    for name, facts in stages.items():
        said = SAID[name](facts) if facts["status"] != "not run" else ""
        yield name, facts["status"], f"{facts.get('seconds', 0):.0f}", said


def _build(facts: Record) -> str:
    return f"{len(facts.get('targets', ()))} targets"


def _tests(facts: Record) -> str:
    outcomes = facts.get("outcomes", {})
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    left_out = f"; left out: {', '.join(facts['left_out'])}" if facts.get("left_out") else ""
    return f"{sum(outcomes.values())} of {facts.get('tests', '?')}: {counts}{left_out}"


def _sanitizer(facts: Record) -> str:
    programs = {name: one for name, one in facts.items() if isinstance(one, dict)}
    return "; ".join(
        " ".join([f"{name}: {one['status']}", *one["summary"]]) for name, one in programs.items()
    )


def _bits(facts: Record) -> str:
    different = ", ".join(facts.get("different", ())) or "none"
    return f"{len(facts.get('compared', ()))} results, different: {different}"


def _bench(facts: Record) -> str:
    tasks = facts.get("tasks", {})
    errors = sum("error" in task for task in tasks.values())
    return f"{len(tasks) - errors} of {len(tasks)} tasks"


SAID = {
    "build": _build,
    "check": lambda facts: facts.get("said", ""),
    "tests": _tests,
    "sanitizer": _sanitizer,
    "bits": _bits,
    "bench": _bench,
}


def _failures(stages: Record) -> list[str]:
    """What went wrong, in short; logs have the rest."""
    found: dict[str, str] = {}
    for name, facts in stages.items():
        parts = {name: facts}
        if name == "sanitizer":
            parts |= {f"{name}, {k}": v for k, v in facts.items() if isinstance(v, dict)}
        found |= {k: "\n".join(v["output"]) for k, v in parts.items() if "output" in v}
    found |= stages.get("tests", {}).get("failures", {})
    for name, task in stages.get("bench", {}).get("tasks", {}).items():
        if "error" in task:
            found[name] = task["error"]
    if not found:
        return []
    lines = ["## Failures", ""]
    for name, text in list(found.items())[:40]:
        lines += [f"{name}", "", *(f"    {line}" for line in text.splitlines()[:25]), ""]
    return lines


def _spread(task: Record) -> str:
    if "us" not in task:
        return "failed" if "error" in task else ""
    return f"{task['us']:.1f} ({task['us_min']:.1f} to {task['us_max']:.1f})"
