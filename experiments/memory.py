"""Memory of a convolution, sparse and dense, from XLA's own analysis: the paper's table 1.

    python -m experiments.memory                 # r = 32 to 512, in seconds: nothing runs
    python -m experiments.memory --resolutions 1024 --batch-size 4
    python -m experiments.memory --resolutions 1024 --batch-size 4 --run  # runs it and reports peak memory
    python -m experiments.memory --report        # writes experiments/results/memory.{csv,json,md} too

Batch 32, 8 -> 8 channels, float32, rho = rho_up = 1 / r. XLA knows all memory before a program runs:
outputs are 8 bytes for each of B * C * K slots (a key and a value) and 4 for each of B * C counts of
candidates; the workspace is at most one grid's 8 * r^3 bytes, the paper's "Sparse Temp", or a fixed
budget where that is more. A program that computes gradients puts them out too, in the shapes of their
primals, and stays within the same workspace.
"""

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ilajax
from benchmarks import timing, workloads
from experiments import frame

BATCH = 32
CHANNELS = 8
BUDGET = {"cpu": 32 << 20, "gpu": 256 << 20}
Row = dict[str, Any]
# The paper's table 1, in GB: at 256^3 and 512^3 its dense tensor did not fit into the GPU.
PAPER = {
    32: (0.04, 2e-3, 3e-4),
    64: (0.27, 8e-3, 0.002),
    128: (2.15, 0.03, 0.016),
    256: (17.18, 0.2, 0.13),
    512: (137.28, 0.8, 1.07),
}


def main(arguments: list[str] | None = None) -> list[Row]:
    """Runs the experiment; returns the rows of the table."""
    options = _parser().parse_args(arguments)
    record = timing.provenance("experiments.memory", arguments)
    rows: list[Row] = []
    written = [options.out / f"memory.{suffix}" for suffix in ("csv", "json", "md")]
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))
        reporter.print(HEAD)
        for resolution in sorted(set(options.resolutions)):
            for backward in (False, True):
                rows.append(measure(resolution, options.batch_size, backward=backward))
                frame.write_table(written[0], list(rows[0]), rows)
                reporter.print(line(rows[-1]))
        if options.run:
            record["run"] = run(max(options.resolutions), options.batch_size)
            reporter.print(
                "r = {resolution}, batch {batch}, forward + backward: {seconds:.1f} s; the process "
                "took {peak_bytes:,} bytes at most, {before_bytes:,} before".format(**record["run"])
            )
        frame.write_json(written[1], record | {"rows": rows})
        write_page(written[2], record, rows)
        stem = "memory" if options.batch_size == BATCH else f"memory-b{options.batch_size}"
        frame.publish(reporter, written, options.report, stem)
    return rows


def measure(resolution: int, batch: int, *, backward: bool) -> Row:
    """Compiles the layer for shapes alone, and compares XLA's figures with the bound."""
    x, kernel, bias, cotangent = shapes(resolution, batch)
    slots = x.capacity
    if backward:
        lowered = jax.jit(step).lower(x, kernel, bias, cotangent)
    else:
        lowered = jax.jit(forward).lower(x, kernel, bias)
    memory = lowered.compile().memory_analysis()
    # XLA counts a table of pointers to the results too.
    outputs = memory.output_size_in_bytes - 8 * len(jax.tree.leaves(lowered.out_info))
    output_bound = 8 * batch * CHANNELS * slots + 4 * batch * CHANNELS
    dense_bytes = 4 * batch * resolution**3 * CHANNELS
    if backward:
        gradients = (x.values, kernel.values, bias)
        output_bound += sum(a.size * a.dtype.itemsize for a in gradients)
        dense_bytes *= 2
    workspace_bound = max(8 * resolution**3, BUDGET[jax.default_backend()])
    return {
        "resolution": resolution,
        "batch": batch,
        "capacity": slots,
        "backward": backward,
        "dense_bytes": dense_bytes,
        "output_bytes": outputs,
        "output_bound": output_bound,
        "workspace_bytes": memory.temp_size_in_bytes,
        "workspace_bound": workspace_bound,
        "holds": outputs == output_bound and memory.temp_size_in_bytes <= workspace_bound,
    }


def run(resolution: int, batch: int) -> Row:
    """Runs forward and backward on random data; peak memory is that of the whole process."""
    x = workloads.random_sites(resolution, CHANNELS, batch=batch)
    kernel = workloads.kernel(CHANNELS, CHANNELS)
    operands = (x, kernel, jnp.zeros(CHANNELS), jnp.ones_like(x.values))
    compiled = jax.jit(step).lower(*operands).compile()
    before = _peak()
    start = time.perf_counter()
    result, gradients = jax.block_until_ready(compiled(*operands))
    return {
        "resolution": resolution,
        "batch": batch,
        "seconds": time.perf_counter() - start,
        "before_bytes": before,
        "peak_bytes": _peak(),
        "output_entries": int(result.features.counts.sum()),
        "finite": bool(all(jnp.isfinite(g).all() for g in gradients)),
    }


def shapes(resolution: int, batch: int) -> tuple[Any, ...]:
    """Input, kernel, bias and the output values' cotangent, without data."""
    grid = (resolution,) * 3
    slots = ilajax.capacity(1 / resolution, grid)
    keys = jax.ShapeDtypeStruct((batch, CHANNELS, slots), jnp.int32)
    values = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    kernel = jax.eval_shape(
        ilajax.SparseKernel.from_dense, jnp.zeros((3, 3, 3, CHANNELS, CHANNELS))
    )
    bias = jax.ShapeDtypeStruct((CHANNELS,), jnp.float32)
    return ilajax.SparseTensor(keys, values, grid), kernel, bias, values


def forward(x: Any, kernel: Any, bias: Any) -> Any:
    """The layer, with as many slots as its input."""
    return ilajax.conv(x, kernel, bias, capacity=x.capacity)


def step(x: Any, kernel: Any, bias: Any, cotangent: Any) -> Any:
    """The layer's result, and the gradients of input values, weights and bias."""

    def values_of(values, weights, bias):
        live = dataclasses.replace(kernel, values=weights)
        result = forward(x.with_values(values), live, bias)
        return result.features.values, result

    _, pull, result = jax.vjp(values_of, x.values, kernel.values, bias, has_aux=True)
    return result, pull(cotangent)


COLUMN = "{:>6}{:>7}{:>11}{:>10}{:>15}{:>15}{:>15}{:>10}{:>8}"
HEAD = COLUMN.format(
    *("r", "batch", "capacity", "", "dense MB", "outputs MB", "workspace MB", "of bound", "holds")
)


def line(row: Row) -> str:
    """A row for the terminal; megabytes are 10^6 bytes, as in the paper."""
    sizes = [
        f"{row[name] / 1e6:,.2f}" for name in ("dense_bytes", "output_bytes", "workspace_bytes")
    ]
    named = (row["resolution"], row["batch"], row["capacity"])
    what = "f + b" if row["backward"] else "forward"
    share = f"{row['workspace_bytes'] / row['workspace_bound']:.0%}"
    return COLUMN.format(*named, what, *sizes, share, "yes" if row["holds"] else "NO")


def write_page(path: Path, record: dict[str, Any], rows: Sequence[Row]) -> None:
    """Table 1 in the paper's layout, in GB; and the paper's own figures."""
    resolutions = sorted({row["resolution"] for row in rows})
    cells: list[tuple[str, ...]] = [("GB", *(f"{r}^3" for r in resolutions))]
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        members = [row for row in rows if row["backward"] == backward]
        names = {"dense": "dense", "sparse": "output", "sparse, workspace": "workspace"}
        for name, column in names.items():
            sizes = (f"{row[f'{column}_bytes'] / 1e9:.3g}" for row in members)
            cells.append((f"{name}, {what}", *sizes))
    if rows[0]["batch"] == BATCH:
        for at, name in enumerate(("dense", "sparse, 32 bits", "sparse, temporary")):
            known = (PAPER.get(resolution, (None,) * 3)[at] for resolution in resolutions)
            cells.append((f"paper: {name}", *("" if gb is None else f"{gb:.3g}" for gb in known)))
    frame.write_page(
        path,
        "# Memory of a convolution, the paper's table 1",
        f"`{record['command']}`",
        f"{timing.headline(record)}.",
        f"Batch {rows[0]['batch']}, {CHANNELS} to {CHANNELS} channels, a capacity of 1 / r of the sites. "
        "What the layer puts out, with gradients where it computes them, and what it needs on the way.",
        cells,
    )


def _peak() -> int:
    """The most memory that this process has taken so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.memory", __doc__)
    add = parser.add_argument
    frame.add_resolutions(parser, (32, 64, 128, 256, 512))
    add("--batch-size", type=frame.positive_int, default=BATCH, metavar="N", help="samples")
    add("--run", action="store_true", help="run the largest one too, and report peak memory")
    frame.add_out(parser, "runs/memory")
    frame.add_report(parser, "memory.{csv,json,md}, or memory-bN for another batch size, too")
    return parser


if __name__ == "__main__":
    if not all(row["holds"] for row in main()):
        raise SystemExit("the memory bound does not hold")
