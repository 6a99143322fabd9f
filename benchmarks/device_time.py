"""How long a GPU works on a program, and what it runs there."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

# How XLA starts what it runs: launches captured in a CUDA graph, which it may have to update; one by one; and
# as it decides itself.
WAYS: dict[str, dict[str, Any]] = {
    "captured": {
        "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL",
        "xla_gpu_graph_min_graph_size": 1,
    },
    "launched": {"xla_gpu_enable_command_buffer": ""},
    "default": {},
}
# Platform -> how a profile's planes and lines of what runs there begin.
TRACKS = {"gpu": ("/device:GPU", "Stream"), "cpu": ("/host:CPU", "")}
MOST_KERNELS = 40


def in_ways(
    lowered: jax.stages.Lowered, ways: Mapping[str, dict[str, Any]] = WAYS
) -> tuple[dict[str, jax.stages.Compiled], dict[str, str]]:
    """A program, compiled in each of `ways`, and why in some it is not: XLA's options come and go."""
    compiled, errors = {}, {}
    for way, options in ways.items():
        try:
            compiled[way] = lowered.compile(compiler_options=options)
        except Exception as error:
            errors[way] = str(error)[:300]
    return compiled, errors


def queued(call: Callable[[], Any], calls: int, *, seconds: float, repeats: int) -> list[float]:
    """Times calls that are queued, so that the device has the next one before the last one ends.

    Args:
      call: starts a program that contains `calls` of what is timed.
      calls: how many.
      seconds: about how long a queue lasts.
      repeats: queues to time, each waited for.

    Returns:
      Seconds of what is timed, for each queue.
    """
    for _ in range(2):  # compile and load; fill pools
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    length = max(1, min(50, int(seconds / (time.perf_counter() - start))))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(length):
            result = call()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / (length * calls))
    return found


def profile(call: Callable[[], Any], times: int = 3) -> dict[str, Any]:
    """What runs on the device in one call: launches, their time, and both for each kernel."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
    in_plane, in_line = TRACKS[jax.default_backend()]
    kernels: dict[str, list[float]] = {}
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith(in_plane) else ():
            for event in line.events if line.name.startswith(in_line) else ():
                entry = kernels.setdefault(event.name[:200], [0, 0.0])
                entry[0] += 1 / times
                entry[1] += event.duration_ns / 1e3 / times
    if not kernels:
        raise RuntimeError(f"The profile shows nothing on {in_plane}: is CUPTI installed?")
    launches, busy = (sum(column) for column in zip(*kernels.values(), strict=True))
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:MOST_KERNELS]
    return {"launches": launches, "busy_s": busy / 1e6, "kernels_us": dict(longest)}
