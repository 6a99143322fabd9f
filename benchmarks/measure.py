"""From rows to figures: tasks that measure on a device, and what they found as a record for each row.

On a CPU a row is one task, which calls all candidates in turn. On a GPU each candidate has tasks of its own,
since one that breaks the device takes its process down: `benchmarks.gpu_check` runs them in processes of
their own. A layer is timed there as one program of several independent calls, on inputs that differ and, with
the outputs, exceed the cache; programs are queued and waited for once.
"""

import functools
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from benchmarks import peers, timing, work
from benchmarks.layers import Layer, Program, Timed
from benchmarks.rows import Problem, Row

Record = dict[str, Any]
Task = Callable[[], Record]

DEVICES = ("cpu", "gpu")
# The most important first. Profiling may slow down what follows, so it is a batch of its own.
BATCHES = ("ilajax", "profile", "peers", "in turn")
FLUSH = 256 << 20  # bytes: more than the second-level cache of any GPU holds
WORKSPACE = {"cpu": 32 << 20, "gpu": 256 << 20}  # bytes it may have, or 8 for each site of a grid
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


class Effort(NamedTuple):
    """What is spent on a figure."""

    budget: float = 5.0  # seconds for each candidate that is called in turn with others
    inputs: int = 32  # most calls of a program in a queue
    seconds: float = 0.04  # of a queue
    repeats: int = 9  # queues

    def calls(self, *arrays: Any) -> int:
        """How many calls it takes to move `FLUSH` bytes."""
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))
        return max(1, min(self.inputs, math.ceil(FLUSH / moved)))

    def spread(self, call: timing.Candidate, calls: int) -> Record:
        """The times of a program that contains `calls` calls."""
        seconds = timing.queued(call, calls, seconds=self.seconds, repeats=self.repeats)
        return timing.spread(seconds)


SMALL = Effort(0.01, 2, 0.005, 3)


class Step(NamedTuple):
    """A task by its name, the candidate that it is about ("": all), and when it is run."""

    batch: str
    who: str
    name: str
    task: Task


def steps(
    row: Row, device: str, effort: Effort = SMALL, limits: work.Ceilings | None = None
) -> Iterator[Step]:
    """What measures a row on a device; a dense convolution serves several rows."""
    partial = functools.partial
    if device == "cpu" or not row.problems:
        yield Step("in turn", "", row.name, partial(in_turn, row, device, effort, limits))
        return
    for who, problem in row.problems.items():
        name = f"{row.name}, {who}"
        yield Step("ilajax", who, name, partial(time_layer, problem, effort))
        yield Step("profile", who, f"{name}, profile", partial(profile_layer, problem))
    problem = next(iter(row.problems.values()))
    for who in filter(peers.installed, row.peers(device)):
        if who in peers.PRECISIONS:
            for layout in peers.LAYOUTS:
                name = f"{problem.dense}, {who}, {layout}"
                yield Step("peers", who, name, partial(time_dense, problem, who, layout, effort))
        else:
            name = f"{row.name}, {who}"
            yield Step("peers", who, name, partial(time_peer, problem, who, effort))


def tasks(
    rows: Sequence[Row], device: str, effort: Effort, limits: work.Ceilings | None = None
) -> dict[str, dict[str, Task]]:
    """Batch -> name -> task; with a processor's ceilings layers get their shares of them."""
    found: dict[str, dict[str, Task]] = {batch: {} for batch in BATCHES}
    for row in rows:
        for batch, _, name, task in steps(row, device, effort, limits):
            found[batch].setdefault(name, task)
    return found


def attempt(task: Task) -> Record:
    """What a task found, or the error that it ended with."""
    start = time.monotonic()
    try:
        record = task()
    except Exception:
        record = {"error": traceback.format_exc(limit=-3)[-1500:]}
    return record | {"seconds": round(time.monotonic() - start, 1)}


def records(rows: Iterable[Row], device: str, done: Mapping[str, Record]) -> list[Record]:
    """The rows of which tasks are done: each candidate's figures, and what became of the targets."""
    found = []
    for row in rows:
        parts: dict[str, list[Record]] = {}
        for step in steps(row, device):
            if step.name in done:
                parts.setdefault(step.who, []).append(done[step.name])
        (whole,) = parts.pop("", [{}])
        candidates = {who: _merged(records) for who, records in parts.items()}
        record: Record = {"row": row.name, "candidates": candidates} | whole
        if missing := [name for name in row.targets[device] if not peers.installed(name)]:
            record["missing"] = missing
        if record["candidates"] or "error" in record:
            _judge(row, device, record["candidates"])
            found.append(record)
    return found


def _merged(parts: Iterable[Record]) -> Record:
    """All that is known of a candidate; of several times the quickest counts."""
    merged: Record = {}
    for part in sorted(parts, key=lambda part: -part.get("median_s", math.inf)):
        merged |= part
    if "median_s" in part and "error" not in part:
        merged.pop("error", None)  # the other layout may not fit into the memory
    return merged


def _judge(row: Row, device: str, candidates: dict[str, Record]) -> None:
    first, *_ = row.candidates
    ours = candidates.get(first, {}).get("median_s")
    if ours is None:
        return
    if most := row.most_s.get(device):
        candidates[first] |= {"most_s": most, "met": ours <= most}
    for who, target in row.targets[device].items():
        theirs = candidates.get(who, {})
        if "median_s" in theirs:
            ratio = theirs.setdefault("ratio", theirs["median_s"] / ours)
            theirs |= {"target": target, "met": None if target is None else ratio >= target}


def in_turn(row: Row, device: str, effort: Effort, limits: work.Ceilings | None) -> Record:
    """All candidates in one go, so that their ratios hold although the machine's speed drifts."""
    layers = {name: problem.layer() for name, problem in row.problems.items()}
    beside = [name for name in row.targets[device] if peers.installed(name)]
    calls: dict[str, timing.Candidate] = {
        name: layers[name].call if name in layers else made()
        for n, (name, made) in enumerate(row.candidates.items())
        if n == 0 or name in beside
    }
    differences: dict[str, float] = {}
    if others := row.peers(device):
        compared, differences = peers.comparison(next(iter(layers.values())), others)
        calls |= {name: compared[name] for name in differences}
    timings = timing.side_by_side(calls, budget=effort.budget)
    candidates = {name: timings.record(name) for name in calls}
    first, *others = calls
    for name in others:
        ratios = timings.ratios(name, first)
        spread = {"ratio_min": min(ratios), "ratio_max": max(ratios)}
        candidates[name] |= {"ratio": timings.ratio(name, first), **spread}
    for name, difference in differences.items():
        candidates[name]["difference"] = difference
    for name, layer in layers.items():
        candidates[name] |= facts(layer, device)
        if limits is not None and isinstance(layer, Layer):
            counts = work.count(layer)
            reached = work.reached(counts, timings.median(name), limits)
            candidates[name]["work"] = counts | {"reached": reached}
    return {
        "candidates": candidates,
        "others_cores": timings.others,
        "not_quiet": timings.disturbed,
    }


def facts(layer: Timed, device: str) -> Record:
    """What the work of a layer depends on, and its memory."""
    memory = layer.compiled.memory_analysis()
    found: Record = {
        "backward": layer.backward,
        "output_bytes": memory.output_size_in_bytes,
        "workspace_bytes": memory.temp_size_in_bytes,
    }
    if not isinstance(layer, Layer):
        return found
    responses = layer.output.responses
    bound = None  # none is stated for gradients and for shared keys
    if not layer.backward and layer.capacity is not None:
        slots = layer.x.batch_size * layer.kernel.out_channels * layer.capacity
        bound = (4 + layer.x.dtype.itemsize) * slots + 4 * responses.size
    return found | {
        "input_entries": int(layer.x.counts.sum()),
        "input_density": float(layer.x.density.mean()),
        "weights": int(layer.kernel.count),
        "capacity": layer.capacity,
        "output_entries": int(layer.output.features.counts.sum()),
        "most_candidates": int(responses.max()),
        "output_bound": bound,
        "workspace_bound": max(8 * layer.x.sites, WORKSPACE[device]),
    }


def time_layer(problem: Problem, effort: Effort) -> Record:
    """ilajax's time in the quickest way, its memory, and whether all ways give the same bits."""
    layer = problem.layer()
    program = Program(layer.function, layer.operands)
    record, calls = _queue(problem, program, effort, WAYS)
    first, *others = (call() for call in calls.values())
    same = all(bool(_same_bits(first, other)) for other in others)
    error = {} if same else {"error": "The bits differ from call to call."}
    return {**record, **facts(layer, "gpu"), "same_bits": same, **error}


def profile_layer(problem: Problem, times: int = 3) -> Record:
    """What runs on the device in one call of ilajax: launches, their time, and both for each kernel."""
    layer = problem.layer()
    programs, _ = _compiled(jax.jit(layer.function).lower(*layer.operands), WAYS)
    program = programs.get("launched", programs["default"])
    jax.block_until_ready(program(*layer.operands))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                jax.block_until_ready(program(*layer.operands))
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


def time_dense(problem: Problem, who: str, layout: str, effort: Effort) -> Record:
    """XLA's dense convolution, which is cuDNN's on a GPU; in float32 it must compute what ilajax does."""
    layer = problem.layer()
    peer = peers.dense(layer, layout, peers.PRECISIONS[who])
    record, calls = _queue(problem, peer.program, effort, {"default": {}})
    if who == "XLA dense":
        result, *_ = calls["default"]()
        # Of the features alone: a weight's gradient is a sum over millions of sites, in another order.
        features = peer._replace(read=lambda result: (peer.read(result)[0], None))
        record["difference"] = peers.checked_difference(layer, features, result, who)
    return record


def time_peer(problem: Problem, who: str, effort: Effort) -> Record:
    """A library that waits for each call; it must compute what ilajax does."""
    layer = problem.layer()
    peer = peers.quickest(peers.PEERS[who](layer))
    difference = peers.checked_difference(layer, peer, peer.call(), who)
    return effort.spread(peer.call, 1) | {"difference": difference}


def _compiled(
    lowered: jax.stages.Lowered, ways: Mapping[str, Record]
) -> tuple[dict[str, jax.stages.Compiled], dict[str, str]]:
    """A program, compiled in each of `ways`, and why in some it is not: XLA's options come and go."""
    compiled, errors = {}, {}
    for way, options in ways.items():
        try:
            compiled[way] = lowered.compile(compiler_options=options)
        except Exception as error:
            errors[way] = str(error)[:300]
    return compiled, errors


def _queue(
    problem: Problem, program: Program, effort: Effort, ways: Mapping[str, Record]
) -> tuple[Record, dict[str, timing.Candidate]]:
    """Times a program of several calls, compiled in each of `ways`; returns the programs' calls too."""
    x, *rest = program.operands
    count = effort.calls(x, jax.eval_shape(program.function, x, *rest))
    xs = [x, *(program.to_input(problem.features(seed)) for seed in range(1, count))]

    def chain(xs, *rest):
        return [program.function(x, *rest) for x in xs]

    compiled, errors = _compiled(jax.jit(chain).lower(xs, *rest), ways)
    calls = {way: functools.partial(one, xs, *rest) for way, one in compiled.items()}
    times = {way: effort.spread(call, count) for way, call in calls.items()}
    best = min(times.values(), key=lambda one: one["median_s"])
    return {**best, "inputs": count, "ways": times | errors}, calls


@jax.jit
def _same_bits(first: Any, second: Any) -> jax.Array:
    def bits(a):
        return jax.lax.bitcast_convert_type(a, {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize])

    same = jax.tree.map(lambda a, b: (bits(a) == bits(b)).all(), first, second)
    return jnp.stack(jax.tree.leaves(same)).all()
