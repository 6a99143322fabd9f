"""The stages of the check: each runs programs in processes of their own and says what came of it."""

import dataclasses
import json
import os
import re
import shutil
import site
import sys
import time
import venv
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.process import Ended, from_line, run, together
from benchmarks.gpu_check.tasks import batches
from benchmarks.timing import cores

Facts = dict[str, Any]

DIGEST = "tests/digest.py"
# Where a kernel is missing, an error rather than the reference.
NATIVE = {"ILAJAX_BACKEND": "native"}
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# Each array in memory of its own: else the sanitizer sees one block, and no step from one array to the next.
OWN_MEMORY = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
BROKEN_KEYS = ["tests/ops/test_memory_safety.py", "-k", "garbage_keys and (any-int32 or all-max)"]
LEFT_OUT = ["tests/benchmarks/test_gpu_check.py"]  # of this check itself
DRY_TESTS = ["tests/ops/test_pool.py", "-k", "ties and native"]
TEST_LIMIT = 90  # seconds of one test
TASK_LIMIT = 60  # seconds of a task of the benchmark


@dataclasses.dataclass
class Check:
    """What the stages share."""

    folder: Path  # for logs and what is built
    dry: bool  # whether this is a dry run, on the CPU
    save: Callable[[], None]  # writes what is known so far
    capability: str | None = None  # of the GPU, such as "9.0"

    def say(self, line: str) -> None:
        print(" ", line, flush=True)

    def tell(self, facts: Facts, line: str) -> None:
        """Prints what a stage has to say, and keeps it for the page."""
        facts["said"] = line
        self.say(line)

    @property
    def python(self) -> Path:
        """Whose ilajax is tested: what was built here. A dry run takes the one at hand, which has kernels."""
        built = self.folder / "venv" / "bin" / "python"
        return Path(sys.executable) if self.dry or not built.exists() else built

    @property
    def env(self) -> dict[str, str]:
        """One device; JAX fails where its CUDA plugin does, rather than take the CPU."""
        if self.dry:
            return {"JAX_PLATFORMS": "cpu"}
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": device}

    @property
    def shared(self) -> dict[str, str]:
        """`env` for processes that share the GPU's memory."""
        return self.env | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def build(check: Check, facts: Facts, limit: float) -> str:
    """Installs ilajax into an environment over the interpreter's own, built for this GPU, offline."""
    start = time.monotonic()
    made = check.folder / "venv"
    venv.create(made, clear=True, symlinks=True)
    (packages,) = made.glob("lib/python*/site-packages")
    # What the interpreter sees; --system-site-packages would pass over it where that is an environment.
    outer = [path for path in sys.path if path.endswith("-packages")] or site.getsitepackages()
    (packages / "outer.pth").write_text("\n".join(outer) + "\n")

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", made]
    options = ["--no-index", "--no-deps", "--no-build-isolation"]
    options += [f"-Cbuild-dir={check.folder}/cmake", *["-Cwheel.cmake=false"] * check.dry]
    env = {
        "ILAJAX_CUDA": "ON",
        "CUDAARCHS": check.capability.replace(".", "") + "-real" if check.capability else "native",
        "CUDAFLAGS": "-lineinfo",  # for the sanitizer: code stays as it is
    }
    log = check.folder / "build.log"
    ended = run([*pip, "install", "-v", *options, "-e", "."], log=log, limit=limit, env=env)
    facts["build_s"] = round(ended.seconds, 1)
    left = limit - (time.monotonic() - start)
    if ended.status == "passed" and check.dry:  # this has no kernels, and is not used any further
        ended = run([made / "bin" / "python", "-c", "import ilajax"], log=log, limit=left)
    if ended.status == "passed":
        probe = [check.python, "-m", "benchmarks.gpu_check.probe"]
        ended = run(probe, log=log, limit=left, env=check.env)
    if ended.status != "passed":
        # Without a working compiler the package is installed as plain Python: the log says why.
        errors = re.findall(r"^.*(?:\berror\b|Error at).*$", log.read_text(errors="replace"), re.M)
        facts["output"] = [*errors[:40], *ended.tail()]
        return ended.status
    facts |= _printed(ended)
    check.tell(facts, f"on {facts['platform']}: {len(facts['targets'])} targets")
    if facts["platform"] != ("cpu" if check.dry else "gpu"):
        facts["output"] = ["JAX does not use the GPU: is its CUDA plugin installed?", *ended.tail()]
        return "failed"
    return "passed"


def agreement(check: Check, facts: Facts, limit: float) -> str:
    """`python -m ilajax check`: every operation beside its reference. A GPU that passes gets its stamp."""
    command = [check.python, "-m", "ilajax", "check", "--limit", f"{limit:.0f}"]
    ended = run(command, log=check.folder / "check.log", limit=limit + 5, env=check.shared)
    check.tell(facts, "".join(ended.tail(1)))
    if ended.status != "passed":
        facts["output"] = [line for line in ended.output.splitlines() if "FAILED" in line]
    return ended.status


def tests(check: Check, facts: Facts, limit: float) -> str:
    """The test suite on the default device: kernels against the reference, all on the GPU."""
    left_out = LEFT_OUT + ([] if find_spec("jupytext") else ["tests/test_notebooks.py"])
    command = _pytest(check, workers=2 if check.dry else cores())
    command += ["-p", "benchmarks.gpu_check.plugin", *(f"--ignore={path}" for path in left_out)]
    command += DRY_TESTS if check.dry else ["tests"]
    # Dense convolutions and products, which tests compare with, in float32.
    env = check.shared | NO_PLUGINS | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    facts |= {"left_out": left_out, "failures": failures}
    told = time.monotonic()

    def tell() -> None:
        facts["outcomes"] = dict(Counter(outcomes.values()))
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(facts["outcomes"].items()))
        of = f"{len(outcomes)} of {facts.get('tests', '?')}"
        check.tell(facts, f"{of}: {counts}; left out: {', '.join(left_out)}")

    def each(line: str) -> None:
        nonlocal told
        record = from_line(line) or {}
        if "test" not in record:
            facts.update(record)
            return
        name, outcome = record["test"], record["outcome"]
        if outcome in ("failed", "error"):
            failures[name] = record["message"]
            first, _, _ = record["message"].partition("\n")
            check.say(f"{outcome}: {name}: {first[:160]}")
        if outcomes.get(name) not in ("failed", "error"):
            outcomes[name] = outcome
        if time.monotonic() - told > 15:
            told = time.monotonic()
            tell()
            check.save()

    ended = run(command, log=check.folder / "tests.log", limit=limit, env=env, each=each)
    tell()
    if ended.status == "failed" and not failures:
        facts["output"] = ended.tail()
    return ended.status


def sanitizer(check: Check, facts: Facts, limit: float) -> str:
    """Every kernel at a small size, and broken keys, under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if not tool and not check.dry:
        check.tell(facts, "compute-sanitizer is not installed")
        return "skipped"

    def under(name: str, *command: Any) -> list[Any]:
        return [*([] if check.dry else [tool, "--tool", name, "--error-exitcode", "86"]), *command]

    keys = [*_pytest(check, workers=1), *(DRY_TESTS if check.dry else BROKEN_KEYS)]
    commands = {
        "memcheck": under("memcheck", check.python, DIGEST),
        "memcheck-keys": under("memcheck", *keys),
    }
    if not check.dry:
        commands["racecheck"] = under("racecheck", check.python, DIGEST)
    env = check.shared | NATIVE | OWN_MEMORY | NO_PLUGINS
    ended = together(commands, folder=check.folder, limit=limit, env=env)
    said = []
    for name, one in ended.items():
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", one.output)
        facts[name] = {"status": one.status, "seconds": round(one.seconds, 1), "summary": summary}
        if one.status != "passed":
            reports = [line for line in one.output.splitlines() if line.startswith("=====")]
            facts[name]["output"] = reports[:60] or one.tail()
        said.append(" ".join([f"{name}: {one.status}", *summary]))
    check.tell(facts, "; ".join(said))
    return _worst(ended)


def bits(check: Check, facts: Facts, limit: float) -> str:
    """All operations in processes that run at once, and so disturb each other: the same bits in each."""
    names = [f"bits-{n}" for n in range(2 if check.dry else 3)]
    commands = {name: [check.python, DIGEST] for name in names}
    ended = together(commands, folder=check.folder, limit=limit, env=check.shared | NATIVE)
    if (status := _worst(ended)) != "passed":
        facts["output"] = next(e.tail() for e in ended.values() if e.status == status)
        return status
    first, *others = map(_printed, ended.values())
    facts["compared"] = list(first)
    facts["different"] = [n for n in first if any(other[n] != first[n] for other in others)]
    different = ", ".join(facts["different"]) or "none"
    check.tell(facts, f"{len(first)} results in {len(names)} processes; different: {different}")
    return "failed" if facts["different"] else "passed"


def bench(check: Check, facts: Facts, limit: float) -> str:
    """The tables, task by task; a task that fails, or hangs, costs the process that it ran in."""
    deadline = time.monotonic() + limit
    records: dict[str, Facts] = {}
    facts["tasks"] = records

    def note(task: str, **record: Any) -> None:
        records[task] = record
        figures = [f"{k} {v:.5g}" for k, v in record.items() if isinstance(v, float | int)]
        said = record["error"].splitlines()[-1][:200] if "error" in record else ", ".join(figures)
        check.say(f"{task}: {said}")
        check.save()

    def each(line: str) -> None:
        if record := from_line(line):
            note(**record)

    program = [check.python, "-m", "benchmarks.gpu_check.tasks", *["--small"] * check.dry]
    log, env = check.folder / "bench.log", check.env | NATIVE
    for batch in batches(small=check.dry).values():
        while waiting := [name for name in batch if name not in records]:
            if (left := deadline - time.monotonic()) < 1:
                note(waiting[0], error="not run: no time was left")
                continue
            command = [*program, *waiting]
            ended = run(command, log=log, limit=left, patience=TASK_LIMIT, env=env, each=each)
            settled = [records[name] for name in waiting if name in records]
            if len(settled) < len(waiting) and not any("error" in record for record in settled):
                # It ended in a task, and could not say why.
                how = f"{ended.status} after {ended.seconds:.0f} s"
                note(waiting[len(settled)], error="\n".join([*ended.tail(8), how]))
    errors = sum("error" in record for record in records.values())
    check.tell(facts, f"{len(records) - errors} of {len(records)} tasks")
    return "failed" if errors else "passed"


# Name -> the stage, and its part of the time; what one leaves, those behind it share.
STAGES: dict[str, tuple[Callable[[Check, Facts, float], str], int]] = {
    "build": (build, 60),
    "check": (agreement, 15),
    "tests": (tests, 40),
    "sanitizer": (sanitizer, 15),
    "bits": (bits, 8),
    "bench": (bench, 45),
}


def _pytest(check: Check, workers: int) -> list[Any]:
    """pytest with the plugins that are of use here. Others that happen to be installed may get in the way."""
    command = [check.python, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    if find_spec("pytest_timeout"):
        # A kernel that hangs: only the end of the process stops it.
        timeout = [f"--timeout={TEST_LIMIT}", "--timeout-method=thread"]
        command += ["-p", "pytest_timeout", *timeout]
    if workers > 1 and find_spec("xdist"):
        command += ["-p", "xdist.plugin", "-n", str(workers)]
    return command


def _printed(ended: Ended) -> Facts:
    """The last line that is JSON: libraries may have more to say behind it."""
    return json.loads([line for line in ended.output.splitlines() if line.startswith("{")][-1])


def _worst(ended: dict[str, Ended]) -> str:
    found = {one.status for one in ended.values()}
    return next((s for s in ("failed", "stopped at its limit") if s in found), "passed")
