"""The tasks of the check's tables, run in one process until one fails: it may have broken the device.

    python -m experiments.gpu_check.bench [--small] TASK...

Prints a line of JSON for each task. A layer is timed as one program of several independent calls, on
inputs that differ and, with the outputs, exceed the GPU's cache; programs are queued and waited for once.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import peers
from experiments.gpu_check.device_time import in_ways, profile, queued
from experiments.gpu_check.process import to_line
from experiments.gpu_check.rows import DRY_ROWS, ROWS, Row
from experiments.peers import Layer

Record = dict[str, Any]

FLUSH = 256 << 20  # bytes: more than the second-level cache of any GPU holds
WORKSPACE = 256 << 20  # bytes that a workspace may have, or 8 for each site of a grid
TOLERANCE = 1e-4  # of the largest entry, for float32 sums in another order
PRECISIONS = {"tf32": jax.lax.Precision.DEFAULT, "float32": jax.lax.Precision.HIGHEST}


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is spent on a figure.

    Attributes:
      inputs: most calls of a program.
      seconds: of a queue.
      repeats: queues.
    """

    inputs: int = 32
    seconds: float = 0.04
    repeats: int = 9

    def time(self, call: Callable[[], Any], calls: int) -> Record:
        return queued(call, calls, seconds=self.seconds, repeats=self.repeats)

    def count(self, *arrays: Any) -> int:
        """How many calls it takes to move `FLUSH` bytes."""
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))
        return max(1, min(self.inputs, math.ceil(FLUSH / moved)))


def tasks(*, small: bool) -> dict[str, dict[str, Callable[[], Record]]]:
    """Batch -> name -> task. Each batch has processes of its own: profiling may slow down what follows."""
    rows, effort = (DRY_ROWS, Effort(2, 0.005, 3)) if small else (ROWS, Effort())
    dense: dict[str, Row] = {}
    for row in rows:
        if row.against == "XLA dense":
            dense.setdefault(row.problem, row)
    return {
        "ilajax": {row.name: functools.partial(time_layer, row, effort) for row in rows},
        "profile": {f"profile {row.name}": functools.partial(profile_layer, row) for row in rows},
        "peers": {
            **{
                f"dense {problem}, {precision}, {layout}": functools.partial(
                    time_dense, row, layout, precision, effort
                )
                for problem, row in dense.items()
                for precision, layout in itertools.product(PRECISIONS, peers.LAYOUTS)
            },
            **{
                f"spconv {row.name}": functools.partial(time_spconv, row, effort)
                for row in rows
                if row.against == "spconv" and peers.installed("spconv")
            },
        },
    }


def time_layer(row: Row, effort: Effort) -> Record:
    """ilajax's time in the quickest way, its memory, and whether all ways give the same bits."""
    layer = row.layer()
    output = layer.output
    count = effort.count(layer.x, output)
    xs = [layer.x, *map(row.features, range(1, count))]
    operands = (xs, *layer.operands[1:])

    def chain(xs, *rest):
        return [layer.function(x, *rest) for x in xs]

    programs, errors = in_ways(jax.jit(chain).lower(*operands))
    ways = {way: effort.time(lambda p=p: p(*operands), count) for way, p in programs.items()}
    best = min(ways.values(), key=lambda times: times["us"])
    first, *others = (program(*operands) for program in programs.values())
    same = all(bool(_same_bits(first, other)) for other in others)
    memory = layer.program[0].memory_analysis()
    return {
        **{name: best[name] for name in ("us", "us_min", "us_max")},
        "ways": ways | errors,
        "inputs": count,
        "problem": row.problem,
        "same_bits": same,
        "most_candidates": int(output.responses.max()),
        "capacity": layer.capacity,
        "entries": int(layer.x.counts.sum()),
        "output_bytes": memory.output_size_in_bytes,
        "output_bound": _output_bound(layer),
        "workspace_bytes": memory.temp_size_in_bytes,
        "workspace_bound": max(8 * row.resolution**3, WORKSPACE),
        **({} if same else {"error": "The bits differ from call to call."}),
    }


def profile_layer(row: Row) -> Record:
    """What one call of ilajax launches."""
    layer = row.layer()
    programs, _ = in_ways(jax.jit(layer.function).lower(*layer.operands))
    program = programs.get("launched", programs["default"])
    return profile(functools.partial(program, *layer.operands))


def time_dense(row: Row, layout: str, precision: str, effort: Effort) -> Record:
    """XLA's dense convolution, which is cuDNN's on a GPU; in float32 it must compute what ilajax does."""
    layer = row.layer()
    function = peers.dense_function(layer, layout, PRECISIONS[precision])
    x, *rest = peers.dense_operands(layer, layout)
    result = jax.eval_shape(function, x, *rest)
    count = effort.count(x, result)
    xs = [x, *(peers.dense_grid(row.features(seed), layout) for seed in range(1, count))]

    def chain(xs, *rest):
        return [function(x, *rest) for x in xs]

    program = jax.jit(chain).lower(xs, *rest).compile()
    record = {"inputs": count, **effort.time(lambda: program(xs, *rest), count)}
    record["workspace_bytes"] = program.memory_analysis().temp_size_in_bytes
    if (layout, precision) == ("channels last", "float32"):
        result = program(xs, *rest)[0]
        features = result[0] if row.backward else result
        record |= _compared(float(_difference(layer, features)))
    return record


def time_spconv(row: Row, effort: Effort) -> Record:
    """spconv, which waits for each call; it must compute what ilajax does."""
    layer = row.layer()
    peer = peers.PEERS["spconv"](layer)
    difference = peers.largest_difference(layer, peer)
    return {**effort.time(peer.call, 1), **_compared(difference)}


def _compared(difference: float) -> Record:
    record: Record = {"difference": difference}
    if not difference <= TOLERANCE:
        record["error"] = f"It differs from ilajax by {difference:.2g} of the largest entry."
    return record


def _output_bound(layer: Layer) -> int | None:
    """Of keys, values and numbers of candidates; none is stated for gradients and for shared keys."""
    if layer.backward or layer.capacity is None:
        return None
    slots = layer.x.batch_size * layer.kernel.out_channels * layer.capacity
    return (4 + layer.x.dtype.itemsize) * slots + 4 * layer.output.responses.size


@jax.jit
def _same_bits(first: Any, second: Any) -> jax.Array:
    def bits(a):
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
        return jax.lax.bitcast_convert_type(a, unsigned)

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jnp.stack([(bits(a) == bits(b)).all() for a, b in pairs]).all()


def _difference(layer: Layer, grid: jax.Array) -> jax.Array:
    """How far a dense result, channels last, is from ilajax's stored entries, in units of the largest."""
    features = layer.output.features

    @jax.jit
    def largest(keys, values, grid):
        flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
        stored = keys < features.sites
        sites = jnp.where(stored, keys, 0)
        seen = jnp.moveaxis(jnp.take_along_axis(flat, jnp.moveaxis(sites, 1, 2), axis=1), 2, 1)
        difference = jnp.where(stored, jnp.abs(seen - values), 0)
        return difference.max() / jnp.abs(values).max()

    return largest(features.keys, features.values, grid)


def _run(name: str, task: Callable[[], Record]) -> Record:
    start = time.monotonic()
    try:
        record = task()
    except Exception:
        record = {"error": traceback.format_exc(limit=-3)[-1500:]}
    return {"task": name, **record, "seconds": round(time.monotonic() - start, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Runs the tasks that are named; returns 1 if one failed, behind which none is run."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_check.bench", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--small", action="store_true", help="small layers, for a dry run")
    options = parser.parse_args(arguments)
    batches = tasks(small=options.small)
    named = {name: task for batch in batches.values() for name, task in batch.items()}
    for name in options.tasks:
        record = _run(name, named[name])
        print(to_line(record), flush=True)
        if "error" in record:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
