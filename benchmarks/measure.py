"""From rows to figures: tasks that measure on a device, and what they found as a record for each row.

On a CPU a row is one task, which calls all candidates in turn. On a GPU each candidate has tasks of its own,
since one that breaks the device takes its process down: `benchmarks.gpu_check` runs them in processes of
their own. A layer is timed there as one program of several independent calls, on inputs that differ and, with
the outputs, exceed the cache; programs are queued and waited for once.
"""

import dataclasses
import functools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import ceilings, counts, device_time, peers, timing
from benchmarks.peers import Layer, Program
from benchmarks.problems import Problem
from benchmarks.rows import Row

Record = dict[str, Any]
Task = Callable[[], Record]

DEVICES = ("cpu", "gpu")
FLUSH = 256 << 20  # bytes: more than the second-level cache of any GPU holds
WORKSPACE = {"cpu": 32 << 20, "gpu": 256 << 20}  # bytes it may have, or 8 for each site of a grid


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is spent on a figure.

    Attributes:
      budget: seconds for each candidate that is called in turn with others.
      inputs: most calls of a program in a queue.
      seconds: of a queue.
      repeats: queues.
    """

    budget: float = 5.0
    inputs: int = 32
    seconds: float = 0.04
    repeats: int = 9

    def count(self, *arrays: Any) -> int:
        """How many calls it takes to move `FLUSH` bytes."""
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))
        return max(1, min(self.inputs, math.ceil(FLUSH / moved)))


SMALL = Effort(0.01, 2, 0.005, 3)


def tasks(
    rows: Sequence[Row],
    device: str,
    effort: Effort,
    limits: ceilings.Ceilings | None = None,
) -> dict[str, dict[str, Task]]:
    """Batch -> name -> task, in an order in which the most important come first.

    Profiling may slow down what follows, so it is a batch of its own.

    Args:
      rows: what to measure, all of them on `device`.
      device: one of `DEVICES`.
      effort: what to spend.
      limits: the processor's ceilings, of which layers then get their shares.
    """
    found: dict[str, dict[str, Task]] = {"ilajax": {}, "profile": {}, "peers": {}, "in turn": {}}
    for row in rows:
        if device == "cpu" or not row.problems:
            found["in turn"][row.name] = functools.partial(in_turn, row, device, effort, limits)
            continue
        for who, problem in row.problems.items():
            ours, profile = sources(row, who)
            found["ilajax"][ours] = functools.partial(time_layer, problem, effort)
            found["profile"][profile] = functools.partial(profile_layer, problem)
        problem = next(iter(row.problems.values()))
        for who in filter(peers.installed, row.peers(device)):
            ways = (
                [
                    functools.partial(time_dense, problem, who, layout, effort)
                    for layout in peers.LAYOUTS
                ]
                if who in peers.PRECISIONS
                else [functools.partial(time_peer, problem, who, effort)]
            )
            for name, way in zip(sources(row, who), ways, strict=True):
                found["peers"].setdefault(name, way)
    return found


def sources(row: Row, who: str) -> list[str]:
    """The tasks that measure a candidate on a GPU; a dense convolution serves several rows."""
    if who in row.problems:
        return [f"{row.name}, {who}", f"{row.name}, {who}, profile"]
    if who in peers.PRECISIONS:
        dense = next(iter(row.problems.values())).dense
        return [f"{dense}, {who}, {layout}" for layout in peers.LAYOUTS]
    return [f"{row.name}, {who}"]


def attempt(task: Task) -> Record:
    """What a task found, or the error that it ended with."""
    start = time.monotonic()
    try:
        record = task()
    except Exception:
        record = {"error": traceback.format_exc(limit=-3)[-1500:]}
    return record | {"seconds": round(time.monotonic() - start, 1)}


def records(rows: Iterable[Row], device: str, done: Mapping[str, Record]) -> list[Record]:
    """The rows of which tasks have ended: each candidate's figures, and what became of the targets.

    Args:
      rows: that were measured.
      device: where.
      done: the records of the tasks, by name.
    """
    found = []
    for row in rows:
        record: Record = {"row": row.name, "candidates": {}}
        if row.name in done:
            record |= done[row.name]
        else:
            for who in [*row.problems, *row.peers(device)]:
                if parts := [done[name] for name in sources(row, who) if name in done]:
                    record["candidates"][who] = _merged(parts)
        if missing := [name for name in row.peers(device) if not peers.installed(name)]:
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
    if row.most_s is not None and device == "gpu" and ours is not None:
        candidates[first] |= {"most_s": row.most_s, "met": ours <= row.most_s}
    for who, target in row.targets[device].items():
        theirs = candidates.get(who, {})
        if ours is None or "median_s" not in theirs:
            continue
        ratio = theirs.setdefault("ratio", theirs["median_s"] / ours)
        theirs |= {"target": target, "met": None if target is None else ratio >= target}


# --- On any device, in turn --------------------------------------------------------------------------


def in_turn(row: Row, device: str, effort: Effort, limits: ceilings.Ceilings | None) -> Record:
    """All candidates in one go, so that their ratios hold although the machine's speed drifts."""
    layers = {name: problem.layer() for name, problem in row.problems.items()}
    calls: dict[str, timing.Candidate] = {
        name: layers[name].call if name in layers else made()
        for name, made in row.candidates.items()
    }
    differences: dict[str, float] = {}
    if others := row.peers(device):
        compared, differences = peers.comparison(next(iter(layers.values())), others)
        calls = {**calls, **{name: compared[name] for name in differences}}
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
        if limits is not None:
            counted = counts.count(layer)
            reached = ceilings.reached(counted, timings.median(name), limits)
            candidates[name]["work"] = counted.record() | {"reached": reached}
    return {"candidates": candidates}


def facts(layer: Layer, device: str) -> Record:
    """What the work of a layer depends on, and its memory."""
    memory = layer.compiled.memory_analysis()
    return {
        "input_entries": int(layer.x.counts.sum()),
        "input_density": float(layer.x.density.mean()),
        "weights": int(layer.kernel.count),
        "capacity": layer.capacity,
        "output_entries": int(layer.output.features.counts.sum()),
        "most_candidates": int(layer.output.responses.max()),
        "backward": layer.backward,
        "output_bytes": memory.output_size_in_bytes,
        "output_bound": _output_bound(layer),
        "workspace_bytes": memory.temp_size_in_bytes,
        "workspace_bound": max(8 * layer.x.sites, WORKSPACE[device]),
    }


def _output_bound(layer: Layer) -> int | None:
    """Of keys, values and numbers of candidates; none is stated for gradients and for shared keys."""
    if layer.backward or layer.capacity is None:
        return None
    slots = layer.x.batch_size * layer.kernel.out_channels * layer.capacity
    return (4 + layer.x.dtype.itemsize) * slots + 4 * layer.output.responses.size


# --- On a GPU ----------------------------------------------------------------------------------------


def time_layer(problem: Problem, effort: Effort) -> Record:
    """ilajax's time in the quickest way, its memory, and whether all ways give the same bits."""
    layer = problem.layer()
    program = Program(layer.function, layer.operands)
    record, calls = _queue(problem, program, effort, device_time.WAYS)
    first, *others = (call() for call in calls.values())
    same = all(bool(_same_bits(first, other)) for other in others)
    error = {} if same else {"error": "The bits differ from call to call."}
    return {**record, **facts(layer, "gpu"), "same_bits": same, **error}


def profile_layer(problem: Problem) -> Record:
    """What one call of ilajax launches."""
    layer = problem.layer()
    programs, _ = device_time.in_ways(jax.jit(layer.function).lower(*layer.operands))
    program = programs.get("launched", programs["default"])
    return device_time.profile(functools.partial(program, *layer.operands))


def time_dense(problem: Problem, who: str, layout: str, effort: Effort) -> Record:
    """XLA's dense convolution, which is cuDNN's on a GPU; in float32 it must compute what ilajax does."""
    layer = problem.layer()
    peer = peers.dense(layer, layout, peers.PRECISIONS[who])
    assert peer.program is not None
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
    peer = peers.PEERS[who](layer)
    difference = peers.checked_difference(layer, peer, peer.call(), who)
    seconds = device_time.queued(peer.call, 1, seconds=effort.seconds, repeats=effort.repeats)
    return timing.spread(seconds) | {"difference": difference}


def _queue(
    problem: Problem, program: Program, effort: Effort, ways: Mapping[str, Record]
) -> tuple[Record, dict[str, timing.Candidate]]:
    """Times a program of several calls, compiled in each of `ways`; returns the programs' calls too."""
    x, *rest = program.operands
    count = effort.count(x, jax.eval_shape(program.function, x, *rest))
    features = [problem.features(seed) for seed in range(1, count)]
    xs = [x, *map(program.to_input, features)]

    def chain(xs, *rest):
        return [program.function(x, *rest) for x in xs]

    compiled, errors = device_time.in_ways(jax.jit(chain).lower(xs, *rest), ways)
    calls = {way: functools.partial(one, xs, *rest) for way, one in compiled.items()}
    times = {
        way: timing.spread(
            device_time.queued(call, count, seconds=effort.seconds, repeats=effort.repeats)
        )
        for way, call in calls.items()
    }
    best = min(times.values(), key=lambda one: one["median_s"])
    return {**best, "inputs": count, "ways": times | errors}, calls


@jax.jit
def _same_bits(first: Any, second: Any) -> jax.Array:
    def bits(a):
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
        return jax.lax.bitcast_convert_type(a, unsigned)

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jnp.stack([(bits(a) == bits(b)).all() for a, b in pairs]).all()
