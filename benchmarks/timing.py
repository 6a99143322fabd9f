"""Times functions side by side, in one run, so that their ratios hold although the machine's speed drifts."""

import dataclasses
import datetime
import gc
import itertools
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from ilajax.ffi import routes

# A function of nothing that returns arrays: JAX's are waited for, those of other libraries are ready.
Candidate = Callable[[], Any]

PACKAGES = ("ilajax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "spconv")


# What a quiet machine does not exceed: cores that others take, and the ratio of a call's quartiles.
QUIET_CORES, QUIET_SPREAD = 0.1, 1.3
LEAST_SECONDS = 0.3  # the kernel counts in hundredths
SHORT_SECONDS = 0.1  # a call this short suffers from cores that were idle before it


@dataclasses.dataclass(frozen=True)
class Timings:
    """Calls: name -> round -> seconds. Not every candidate takes part in every round."""

    calls: Mapping[Hashable, Mapping[int, float]]
    others: float | None = None  # cores that other processes took meanwhile; None: nothing tells

    def seconds(self, name: Hashable) -> list[float]:
        return list(self.calls[name].values())

    def median(self, name: Hashable) -> float:
        return statistics.median(self.seconds(name))

    def ratios(self, name: Hashable, to: Hashable) -> list[float]:
        """How many times as long `name` took as `to`, once for each call of the one that was called less.

        That call is compared with the median of the other's until the next one: in the same stretch of the
        run, and not with a single call that something may have disturbed.
        """
        rare = min(name, to, key=lambda which: len(self.calls[which]))
        found = []
        for start, end in itertools.pairwise([*self.calls[rare], math.inf]):
            one, other = (
                [s for number, s in self.calls[which].items() if start <= number < end]
                for which in (name, to)
            )
            if one and other:  # the last stretch may be too short
                found.append(statistics.median(one) / statistics.median(other))
        return found

    def ratio(self, name: Hashable, to: Hashable) -> float:
        return statistics.median(self.ratios(name, to))

    @property
    def disturbed(self) -> str | None:
        """Why these figures are not those of a quiet machine, if they are not."""
        found = []
        if self.others is not None and self.others > QUIET_CORES:
            found.append(f"others took {self.others:.2g} cores")
        for name in self.calls:
            if len(seconds := self.seconds(name)) >= 4:
                low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
                if high / low > QUIET_SPREAD:
                    found.append(f"{name}'s quartiles are {high / low:.2g}x apart")
        return "; ".join(found) or None

    def record(self, name: Hashable) -> dict[str, Any]:
        return spread(self.seconds(name))


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """The median, the least, the most and every call, for JSON."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "calls_s": list(seconds),
    }


def side_by_side(
    candidates: Mapping[Any, Candidate],
    *,
    budget: float = 5.0,
    rounds: int = 25,
    least: int = 2,
    pause: float = 0.01,
) -> Timings:
    """Calls the candidates in turn, A B C A B C, and times each call until its results are there.

    A first call of each is not counted: it compiles, and fills caches and pools. Threads of a pool look for
    more work for some milliseconds after a call, and would take the processor from the next candidate: hence
    the pause before each call. Cores that were idle take milliseconds to come back to their speed, as those
    of a training loop need not: of short calls two are made after a pause, and the second counts.

    Args:
      candidates: name -> function.
      budget: seconds for each candidate's calls that count. One that is too slow for all rounds takes part in
        every second, third, and so on, but at least in `least`.
      rounds: most calls of a candidate.
    """
    turns = {}
    for name, call in candidates.items():
        seconds = _timed(call, pause)
        # The warm-up of a candidate that is far too slow counts as its estimate, so as not to call it twice.
        if seconds < budget:
            seconds = _timed(call, pause)
        turns[name] = min(rounds, max(least, int(budget / seconds)))
    last = max(turns.values())
    start, before = time.perf_counter(), _others_time()
    calls: dict[Hashable, dict[int, float]] = {name: {} for name in candidates}
    for number in range(last):
        for name, call in candidates.items():
            if number % math.ceil(last / turns[name]) == 0:
                calls[name][number] = _timed(call, pause)
    seconds, after = time.perf_counter() - start, _others_time()
    told = before is not None and after is not None and seconds >= LEAST_SECONDS
    return Timings(calls, max(0.0, after - before) / seconds if told else None)


def queued(call: Callable[[], Any], calls: int, *, seconds: float, repeats: int) -> list[float]:
    """Times calls that are queued, so that the device has the next one before the last one ends.

    `call` starts a program that contains `calls` of what is timed. There are `repeats` queues of about as
    many `seconds`; the result is a call's time in each of them.
    """

    def queue(length: int) -> float:
        start = time.perf_counter()
        for _ in range(length):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / length

    for _ in range(2):  # compile and load; fill pools
        queue(1)
    length = max(1, min(50, int(seconds / queue(1))))
    return [queue(length) / calls for _ in range(repeats)]


def _timed(call: Candidate, pause: float) -> float:
    time.sleep(pause)
    seconds = _once(call)
    return _once(call) if pause > 0 and seconds < SHORT_SECONDS else seconds


def _once(call: Candidate) -> float:
    collects = gc.isenabled()
    gc.disable()  # a collection in the middle of a call is not the candidate's
    try:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start
    finally:
        if collects:
            gc.enable()


def _others_time(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds of a core that everything but this process has taken, a hypervisor too; None: nothing tells."""
    try:
        line = stat.read_text().partition("\n")[0]
        user, nice, system, _, _, *interrupts = map(int, line.split()[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    busy = user + nice + system + sum(interrupts)
    return busy / ticks - time.process_time() if busy else None


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power p of y ~ x^p that fits best, by least squares of the logarithms."""
    return statistics.linear_regression([*map(math.log, x)], [*map(math.log, y)]).slope


def provenance(module: str, arguments: list[str] | None) -> dict[str, Any]:
    """What a file of figures must say; `arguments` are those of `module`, None: those of this process."""
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "-m", module, *given]),
        "machine": machine(),
        "platform": jax.devices()[0].platform,
        "backend": routes.choice(),
        "kernels": routes.native_platforms(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine() -> str:
    """The processor, how much of it, and the versions that count."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*\S)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {device.device_kind}"
    versions = ", ".join(f"{package} {version(package)}" for package in ("ilajax", "jax", "flax"))
    return f"{name}, {cores()} cores{accelerator}; {versions}, Python {platform.python_version()}"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def headline(record: Mapping[str, Any]) -> str:
    """The machine of a `provenance`, and what runs: figures of the reference must not pass for a kernel's."""
    platform = {"gpu": "cuda"}.get(record["platform"], record["platform"])
    native = platform in record["kernels"] and record["backend"] != "reference"
    runs = "native kernels" if native else "NO KERNELS, the reference runs"
    return f"{record['machine']}; {runs}"


def commit() -> str:
    """The commit that this file belongs to, with "+" if the working tree has changed since."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(seconds: float) -> str:
    """Seconds, to three digits or so, in the unit that fits."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 2}f} ms"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
