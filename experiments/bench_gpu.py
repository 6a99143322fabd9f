"""Times ilajax's convolution on a GPU against dense cuDNN, in the same run.

    python -m experiments.bench_gpu [--rows r256 shell128] [--json results.json]

A row is timed as one jitted program that holds several independent calls on rotated inputs, so that the
L2 cache does not flatter; programs are queued and waited for once, and the median over repeats is
reported with the spread. Dense is `jax.lax.conv_general_dilated` on the scattered inputs, with and
without TF32, in the better of two layouts; the sparse sums are always float32.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from experiments import workloads


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    resolution: int
    batch: int
    in_channels: int
    bound: float
    data: str  # "random" or "shell"
    kernel_density: float = 1.0
    cut: bool = True
    backward: bool = False
    dense: bool = True
    dtype: str = "float32"
    rotations: int = 8

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.resolution,) * 3

    @property
    def capacity(self) -> int:
        return ilajax.capacity(self.bound, self.grid)


OUT_CHANNELS = 8
ROWS = [
    Row("r256 1-8 rho_f=0.1, nothing cut", 256, 1, 1, 1 / 256, "random", 0.1, cut=False),
    Row("r256 1-8 rho_f=0.1, cut", 256, 1, 1, 1 / 256, "random", 0.1),
    Row("r256 1-8 rho_f=1, cut", 256, 1, 1, 1 / 256, "random"),
    Row("shell64 8-8 b32", 64, 32, 8, 1 / 32, "shell", rotations=4),
    Row("shell128 8-8 b32", 128, 32, 8, 1 / 64, "shell", rotations=2),
    Row("shell128 8-8 b32 bf16", 128, 32, 8, 1 / 64, "shell", rotations=2, dtype="bfloat16"),
    Row("shell64 8-8 b32 fwd+bwd", 64, 32, 8, 1 / 32, "shell", backward=True, rotations=4),
    Row("shell128 8-8 b32 fwd+bwd", 128, 32, 8, 1 / 64, "shell", backward=True, rotations=2),
    Row("r512 8-8 b32", 512, 32, 8, 1 / 512, "shell", dense=False, rotations=1),
    Row("r1024 8-8 b8", 1024, 8, 8, 1 / 1024, "shell", dense=False, rotations=1),
]


def features(row: Row, seed: int) -> ilajax.SparseTensor:
    """Random sites, or a sphere's shell of which each channel holds three quarters."""
    common = {"batch": row.batch, "capacity": row.capacity, "dtype": row.dtype, "seed": seed}
    if row.data == "random":
        return workloads.random_sites(row.resolution, row.in_channels, density=row.bound, **common)
    radius = workloads.fitting_radius(row.resolution, row.capacity)
    return workloads.shell(row.resolution, row.in_channels, subset=0.75, radius=radius, **common)


def kernel(row: Row, seed: int) -> ilajax.SparseKernel:
    """Random weights; where nothing shall be cut each output channel has one above 0."""
    return workloads.kernel(
        row.in_channels, OUT_CHANNELS, density=row.kernel_density, cut=row.cut, seed=seed
    )


def sparse_program(row: Row) -> Callable:
    def forward(x, kernel, bias):
        return ilajax.conv(x, kernel, bias, capacity=row.capacity, select="positive")

    def step(x, kernel, bias, g):
        def loss(values, weights, bias):
            out, _ = forward(
                x.with_values(values), dataclasses.replace(kernel, values=weights), bias
            )
            return out.values

        values, pull = jax.vjp(loss, x.values, kernel.values, bias)
        return values, pull(g)

    def program(xs, kernel, bias, g):
        if row.backward:
            return [step(x, kernel, bias, g) for x in xs]
        return [forward(x, kernel, bias) for x in xs]

    return program


def dense_program(row: Row, layout: str, precision: jax.lax.Precision) -> Callable:
    spec = ("NCDHW", "OIDHW", "NCDHW") if layout == "NCDHW" else ("NDHWC", "DHWIO", "NDHWC")

    def forward(x, w, bias):
        y = jax.lax.conv_general_dilated(
            x, w, (1, 1, 1), "SAME", dimension_numbers=spec, precision=precision
        )
        return jax.nn.relu(y + bias.reshape((-1, 1, 1, 1) if layout == "NCDHW" else (-1,)))

    def program(xs, w, bias):
        if row.backward:
            out = []
            for x in xs:
                y, pull = jax.vjp(forward, x, w, bias)
                out.append((y, pull(y)))
            return out
        return [forward(x, w, bias) for x in xs]

    return program


def measure(function: Callable, args: tuple, calls: int, repeats: int = 9, seconds: float = 0.05):
    """Microseconds of one call: median, least, most."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    once = time.perf_counter() - start
    queue = max(1, min(20, int(seconds / once)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queue):
            result = compiled(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / queue / calls * 1e6)
        del result
    memory = compiled.memory_analysis()
    return statistics.median(times), min(times), max(times), memory.temp_size_in_bytes


def run(row: Row) -> dict:
    """Measures one row."""
    xs = [features(row, seed) for seed in range(row.rotations)]
    w, bias = kernel(row, 100), jnp.zeros(OUT_CHANNELS)
    g = jnp.ones((row.batch, OUT_CHANNELS, row.capacity), row.dtype)
    result = {"row": row.name, **dataclasses.asdict(row)}
    median, least, most, temp = measure(sparse_program(row), (xs, w, bias, g), row.rotations)
    result |= {"us": median, "us_min": least, "us_max": most, "temp_bytes": temp}
    responses = np.asarray(
        jax.jit(sparse_program(dataclasses.replace(row, backward=False)))(xs[:1], w, bias, None)[
            0
        ].responses
    )
    result["responses_max"] = int(responses.max())
    result["workspace_bound"] = max(8 * row.resolution**3, 256 << 20)
    if row.dense:
        dense_x = [ilajax.to_dense(x) for x in xs]
        dense_w = w.to_dense()
        del xs
        for name, precision in (
            ("tf32", jax.lax.Precision.DEFAULT),
            ("float32", jax.lax.Precision.HIGHEST),
        ):
            times = {}
            for layout in ("NDHWC", "NCDHW"):
                if row.dtype != "float32" and name == "float32":
                    continue
                lx, lw = dense_x, dense_w.astype(row.dtype)
                if layout == "NCDHW":
                    lx = [jnp.moveaxis(x, -1, 1) for x in dense_x]
                    lw = jnp.transpose(lw, (4, 3, 0, 1, 2))
                try:
                    program = dense_program(row, layout, precision)
                    args = (lx, lw, bias.astype(row.dtype))
                    times[layout] = measure(program, args, row.rotations, repeats=5)
                except Exception as error:  # out of memory, or no algorithm
                    result[f"dense_{name}_{layout}_error"] = str(error)[:200]
            for layout, (time_us, _, _, temp) in times.items():
                result[f"dense_{name}_{layout}_us"] = time_us
                result[f"dense_{name}_{layout}_temp"] = temp
            if times:
                result[f"dense_{name}_us"] = min(t[0] for t in times.values())
                result[f"ratio_{name}"] = result[f"dense_{name}_us"] / median
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", help="only rows whose name begins with one of these")
    parser.add_argument("--no-dense", action="store_true", help="time the sparse side only")
    parser.add_argument(
        "--once",
        action="store_true",
        help="run the sparse program of one input twice, for a profiler",
    )
    parser.add_argument("--json", type=pathlib.Path, help="where to write every figure")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}, backend {os.environ.get('ILAJAX_BACKEND', 'auto')}"
    )
    print(
        f"{'row':34}{'us':>10}{'min':>9}{'max':>9}{'tf32 x':>9}{'f32 x':>9}{'temp MiB':>10}{'cand':>9}"
    )
    results = []
    for row in ROWS:
        if args.rows and not any(row.name.startswith(name) for name in args.rows):
            continue
        if args.once:
            program = jax.jit(sparse_program(row))
            g = jnp.ones((row.batch, OUT_CHANNELS, row.capacity), row.dtype)
            operands = ([features(row, 0)], kernel(row, 100), jnp.zeros(OUT_CHANNELS), g)
            for _ in range(2):
                jax.block_until_ready(program(*operands))
            continue
        if args.no_dense:
            row = dataclasses.replace(row, dense=False)
        try:
            r = run(row)
        except Exception as error:
            print(f"{row.name:34} {type(error).__name__}: {str(error)[:300]}", flush=True)
            results.append({"row": row.name, "error": str(error)[:2000]})
            continue
        results.append(r)
        print(
            f"{r['row']:34}{r['us']:10.1f}{r['us_min']:9.1f}{r['us_max']:9.1f}"
            f"{r.get('ratio_tf32', float('nan')):9.2f}{r.get('ratio_float32', float('nan')):9.2f}"
            f"{r['temp_bytes'] / 2**20:10.0f}{r['responses_max']:9}",
            flush=True,
        )
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(
                json.dumps(
                    {"device": device.device_kind, "jax": jax.__version__, "rows": results},
                    indent=1,
                    default=str,
                )
            )


if __name__ == "__main__":
    main()
