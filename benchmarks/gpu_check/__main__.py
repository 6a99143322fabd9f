"""Builds and checks the CUDA kernels on this machine's GPU, with one command and without a network.

    make gpu-check                                       # all of it, in at most eight minutes
    python -m benchmarks.gpu_check --stages build bench
    python -m benchmarks.gpu_check --dry-run            # on the CPU, small: all but the CUDA lines

It needs nvcc and what pyproject.toml's build and tests need, installed for the Python that runs it. Each
stage of `benchmarks.gpu_check.stages` has a part of the time, and those behind it share what it leaves. A
failure is noted and the rest goes on; the record, `<gpu>.json` and `<gpu>.md`, is written anew after each
step. Logs are in build/gpu-check. The exit status is 1 if anything failed. A target that is missed is a
figure, not a failure.
"""

import datetime
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback

from benchmarks import RESULTS, measure, report, timing
from benchmarks.gpu_check.process import ROOT
from benchmarks.gpu_check.stages import STAGES, Check, Facts
from benchmarks.gpu_check.tasks import rows
from experiments import frame

BUDGET = 480.0
FOLDER = ROOT / "build" / "gpu-check"
GPU_FACTS = ("gpu", "driver", "capability", "memory")
GPU_QUERY = ["--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the check; returns its exit status."""
    parser = frame.parser("benchmarks.gpu_check", __doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="on the CPU and small: all but the CUDA lines")
    add("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="what to run")
    add("--budget", type=frame.positive, default=BUDGET, metavar="S", help="seconds for all of it")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    # Whoever stops this process stops those that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    gpu = ["dry run", "none", "none", "none"]
    if not options.dry_run:
        gpu = _said("nvidia-smi", *GPU_QUERY).partition("\n")[0].split(", ")
        if len(gpu) < len(GPU_FACTS):
            print("nvidia-smi finds no GPU here. To try the check: --dry-run", file=sys.stderr)
            return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.log"):
        old.unlink()
    given = sys.argv[1:] if arguments is None else arguments
    nvcc = re.search(r"V([\d.]+)", _said("nvcc", "--version"))
    record: Facts = {
        **dict(zip(GPU_FACTS, gpu, strict=True)),
        "nvcc": nvcc[1] if nvcc else "not found",
        "dry_run": options.dry_run,
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *given]),
        "commit": timing.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stages": {},
    }
    out = FOLDER if options.dry_run else ROOT / RESULTS
    stem = re.sub(r"[^a-z0-9]+", "-", record["gpu"].lower())

    def save() -> None:
        frame.write_json(out / f"{stem}.json", record)
        try:
            text = render(record)
        except Exception:  # the figures are of use without it, and those to come
            text = traceback.format_exc()
        frame.write_text(out / f"{stem}.md", text)

    capability = None if options.dry_run else record["capability"]
    check = Check(FOLDER, options.dry_run, save, capability)
    print(f"{record['gpu']}, driver {record['driver']}, nvcc {record['nvcc']}", flush=True)
    chosen = [name for name in STAGES if name in options.stages]
    stages = record["stages"]
    for at, name in enumerate(chosen):
        if stages.get("build", {"status": "passed"})["status"] != "passed":
            stages[name] = {"status": "not run"}
            continue
        shares = [STAGES[later][1] for later in chosen[at:]]
        limit = max(1.0, deadline - time.monotonic()) * shares[0] / sum(shares)
        stages[name] = {"status": "running"}
        save()
        print(f"{name}: at most {limit:.0f} s", flush=True)
        _run(name, check, stages[name], limit)
        print(f"{name}: {stages[name]['status']}, {stages[name]['seconds']:.0f} s", flush=True)
    save()
    print((out / f"{stem}.md").read_text(), out / f"{stem}.json", sep="\n", flush=True)
    return 0 if passed(record) else 1


def _run(name: str, check: Check, facts: Facts, limit: float) -> None:
    start = time.monotonic()
    try:
        facts["status"] = STAGES[name][0](check, facts, limit)
    except Exception:  # of this check's own making: the other stages are of use without it
        facts |= {"status": "failed", "output": traceback.format_exc().splitlines()}
        check.say(facts["output"][-1])
    facts["seconds"] = round(time.monotonic() - start, 1)


def _said(*command: str) -> str:
    """What a program prints; nothing if it is not there, or fails."""
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ""


def passed(record: Facts) -> bool:
    """Whether every stage that ran did what it should; a tool that is not installed is no failure."""
    return all(stage["status"] in ("passed", "skipped") for stage in record["stages"].values())


def render(record: Facts) -> str:
    """The record as a page to read."""
    stages = record["stages"]
    built = stages.get("build", {})
    lines = [f"# GPU check: {record['gpu']}", ""]
    if record["dry_run"]:
        lines += ["**A dry run on the CPU: no CUDA kernel has run, no figure says anything.**", ""]
    lines += [
        f"`{record['command']}` at commit {record['commit']}, {record['date']}.",
        f"Driver {record['driver']}, nvcc {record['nvcc']}.",
    ]
    if "versions" in built:
        lines += [", ".join(f"{k} {v}" for k, v in built["versions"].items() if v) + "."]
    cells = [("stage", "status", "seconds", "")]
    for name, facts in stages.items():
        seconds = f"{facts.get('seconds', 0):.0f}"
        cells.append((name, facts["status"], seconds, facts.get("said", "")))
    lines += ["", *frame.markdown_table(cells), ""]
    if "targets" in built:
        lines += [f"Registered, and so tested: {', '.join(built['targets']) or 'none'}.", ""]
    lines += failures(stages)
    if tasks := stages.get("bench", {}).get("tasks"):
        records = measure.records(rows(small=record["dry_run"]), "gpu", tasks)
        lines += report.page(records)
    return "\n".join(lines).rstrip() + "\n"


def failures(stages: Facts) -> list[str]:
    """What went wrong, in short; logs have the rest."""
    found: dict[str, str] = {}
    for name, facts in stages.items():
        parts = {name: facts} | {f"{name}, {k}": v for k, v in facts.items() if isinstance(v, dict)}
        found |= {k: "\n".join(v["output"]) for k, v in parts.items() if "output" in v}
    found |= stages.get("tests", {}).get("failures", {})
    tasks = stages.get("bench", {}).get("tasks", {})
    found |= {name: task["error"] for name, task in tasks.items() if "error" in task}
    lines = ["## Failures", ""] if found else []
    for name, text in list(found.items())[:40]:
        lines += [name, "", *(f"    {line}" for line in text.splitlines()[:25]), ""]
    return lines


if __name__ == "__main__":
    sys.exit(main())
