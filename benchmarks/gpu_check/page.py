"""The check's record, a JSON file, as a page to read."""

from typing import Any

from benchmarks import measure, report
from benchmarks.gpu_check.tasks import rows
from experiments.frame import markdown_table

Record = dict[str, Any]


def passed(record: Record) -> bool:
    """Whether every stage that ran did what it should; a tool that is not installed is no failure."""
    return all(stage["status"] in ("passed", "skipped") for stage in record["stages"].values())


def render(record: Record) -> str:
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
    cells = [("stage", "status", "seconds", "")]
    for name, facts in stages.items():
        seconds = f"{facts.get('seconds', 0):.0f}"
        cells.append((name, facts["status"], seconds, facts.get("said", "")))
    lines += ["", *markdown_table(cells), ""]
    if "targets" in built:
        lines += [f"Registered, and so tested: {', '.join(built['targets']) or 'none'}.", ""]
    lines += _failures(stages)
    if tasks := stages.get("bench", {}).get("tasks"):
        records = measure.records(rows(small=record["dry_run"]), "gpu", tasks)
        for heading, table in report.sections(records):
            lines += [f"## {heading}", "", *table, ""]
    return "\n".join(lines).rstrip() + "\n"


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
