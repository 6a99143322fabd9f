"""Builds and checks the CUDA kernels on this machine's GPU, with one command and without a network.

    make gpu-check                                       # all of it, in at most eight minutes
    python -m benchmarks.gpu_check --stages build bench
    python -m benchmarks.gpu_check --dry-run            # on the CPU, small: all but the CUDA lines

| stage | |
|---|---|
| build | ilajax with its CUDA kernels, for this GPU |
| check | `python -m ilajax check`, which leaves a stamp |
| tests | the test suite on the GPU |
| sanitizer | every kernel under compute-sanitizer's memcheck and racecheck, broken keys under memcheck |
| bits | all operations in several processes at once: the same bits in each |
| bench | times against dense cuDNN and spconv, launches, memory |

It needs nvcc and what pyproject.toml's build and tests need, installed for the Python that runs it. Each
stage has a part of the time, and those behind it share what it leaves. A failure is noted and the rest goes
on; the record, `<gpu>.json` and `<gpu>.md`, is written anew after each step. Logs are in build/gpu-check.
The exit status is 1 if anything failed. A target that is missed is a figure, not a failure.
"""

import argparse
import datetime
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, timing
from benchmarks.gpu_check import page
from benchmarks.gpu_check.process import ROOT
from benchmarks.gpu_check.stages import STAGES, Check, Facts
from experiments import frame

BUDGET = 480.0
FOLDER = ROOT / "build" / "gpu-check"
GPU_FACTS = ("gpu", "driver", "capability", "memory")
GPU_QUERY = ["--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the check; returns its exit status."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + options.budget
    # Whoever stops this process stops those that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    gpu = dict.fromkeys(GPU_FACTS, "none") | {"gpu": "dry run"} if options.dry_run else _gpu()
    if gpu is None:
        print("nvidia-smi finds no GPU here. To try the check itself: --dry-run", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.log"):
        old.unlink()
    given = sys.argv[1:] if arguments is None else arguments
    record: dict[str, Any] = {
        **gpu,
        "nvcc": _nvcc(),
        "dry_run": options.dry_run,
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *given]),
        "commit": options.commit or timing.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stages": {},
    }
    out = options.out or (FOLDER if options.dry_run else ROOT / RESULTS)
    stem = out / re.sub(r"[^a-z0-9]+", "-", gpu["gpu"].lower())

    def save() -> None:
        frame.write_json(Path(f"{stem}.json"), record)
        try:
            text = page.render(record)
        except Exception:  # the figures are of use without it, and those to come
            text = traceback.format_exc()
        Path(f"{stem}.md").write_text(text)

    capability = None if options.dry_run else gpu["capability"]
    check = Check(
        FOLDER, options.dry_run, lambda line: print(" ", line, flush=True), save, capability
    )
    print(f"{gpu['gpu']}, driver {gpu['driver']}, nvcc {record['nvcc']}", flush=True)
    chosen = [name for name in STAGES if name in options.stages]
    for at, name in enumerate(chosen):
        shares = [STAGES[later][1] for later in chosen[at:]]
        limit = max(1.0, deadline - time.monotonic()) * shares[0] / sum(shares)
        facts: Facts = {"status": "running"}
        record["stages"][name] = facts
        save()
        print(f"{name}: at most {limit:.0f} s", flush=True)
        _run(name, check, facts, limit)
        save()
        print(f"{name}: {facts['status']}, {facts['seconds']:.0f} s", flush=True)
        if name == "build" and facts["status"] != "passed":
            skipped = {later: {"status": "not run"} for later in chosen[at + 1 :]}
            record["stages"] |= skipped
            break
    save()
    print(Path(f"{stem}.md").read_text(), f"{stem}.json, {stem}.md", sep="\n", flush=True)
    return 0 if page.passed(record) else 1


def _run(name: str, check: Check, facts: Facts, limit: float) -> None:
    start = time.monotonic()
    try:
        facts["status"] = STAGES[name][0](check, facts, limit)
    except Exception:  # of this check's own making: the other stages are of use without it
        facts |= {"status": "failed", "output": traceback.format_exc().splitlines()}
        check.say(facts["output"][-1])
    facts["seconds"] = round(time.monotonic() - start, 1)


def _gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU."""
    said = _said("nvidia-smi", *GPU_QUERY)
    return dict(zip(GPU_FACTS, said.splitlines()[0].split(", "), strict=True)) if said else None


def _nvcc() -> str:
    found = re.search(r"V([\d.]+)", _said("nvcc", "--version"))
    return found[1] if found else "not found"


def _said(*command: str) -> str:
    """What a program prints; nothing if it is not there, or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("benchmarks.gpu_check", __doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="on the CPU and small: all but the CUDA lines")
    add("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="what to run")
    add("--commit", metavar="NAME", help="of the sources, where git cannot tell it")
    add("--budget", type=frame.positive, default=BUDGET, metavar="S", help="seconds for all of it")
    out = f"folder of the record, else {RESULTS}; of a dry run build/gpu-check"
    add("--out", type=Path, metavar="DIR", help=out)
    return parser


if __name__ == "__main__":
    sys.exit(main())
