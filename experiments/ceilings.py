"""What this machine attains at most, measured: bytes copied and float32 multiply-adds a second.

    python -m experiments.ceilings [--json FILE]          # seconds

A ceiling is the median of a few rounds of the quickest of several ways, all of them with vector
instructions of tuned libraries: it is what such a library attains, not what the processor's data sheet
says. Copies count each byte twice, as read and as written, and are NumPy's: of large arrays, which come
from memory, on all cores and on one, and of arrays that fit into one core's second-level cache.
Multiply-adds are those of a large matrix product: by NumPy's BLAS or by XLA on all cores, and by NumPy's
BLAS in a process of its own on one. One multiply-add is two operations.

A third ceiling would tell more about a sparse convolution: random additions to rows of 32 bytes in the
first-level cache. NumPy and XLA take tens of nanoseconds for each such row, most of it overhead of their
loops, so there is no honest figure from here.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import frame, timing
from experiments.counts import Counts

LARGE = 128  # MiB of each of two arrays: more than a third-level cache holds
MATRIX = 1536  # rows and columns
ROUNDS = 7
SECOND_LEVEL = 512 << 10  # bytes, where the system does not say
# Caches treat a copy between equal places of two pages as a dependency, and slow it down tenfold.
SHIFT = 2048
BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

WAYS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "copy": lambda source, target: np.copyto(target, source),
    "negate": lambda source, target: np.negative(source, out=target),
}
# Name in a record -> (what it is, unit).
SHOWN = {
    "copy": ("copy from memory, all cores", "GB/s"),
    "copy_one_core": ("copy from memory, one core", "GB/s"),
    "copy_cached_one_core": ("copy in the second-level cache, one core", "GB/s"),
    "multiply_adds": ("float32 multiply-adds, all cores", "G/s"),
    "multiply_adds_one_core": ("float32 multiply-adds, one core", "G/s"),
}

Ceilings = Mapping[str, float]


def measure(*, large: int = LARGE, matrix: int = MATRIX, rounds: int = ROUNDS) -> dict[str, float]:
    """Measures all ceilings.

    Args:
      large: MiB of an array that does not fit into any cache.
      matrix: rows and columns of the matrices.
      rounds: calls of each way; the median counts.

    Returns:
      The figures of `SHOWN` a second (bytes, multiply-adds), and "cores".
    """
    cores = timing.cores()
    # Source and target take half of the cache together; a call lasts some milliseconds.
    cached = second_level_cache() // 4
    return {
        "cores": cores,
        "copy": copy_rate(large << 20, threads=cores, rounds=rounds),
        "copy_one_core": copy_rate(large << 20, rounds=rounds),
        "copy_cached_one_core": copy_rate(cached, repeats=500, rounds=rounds),
        "multiply_adds": multiply_rate(matrix, rounds, ("NumPy", "XLA")),
        "multiply_adds_one_core": _multiply_rate_of_one_core(matrix, rounds),
    }


def copy_rate(size: int, *, threads: int = 1, repeats: int = 1, rounds: int = ROUNDS) -> float:
    """Bytes read and written a second, of arrays of `size` bytes that are copied `repeats` times."""
    # Written to, so that memory stands behind every page.
    source = np.ones(size // 4, np.float32)
    target = np.ones(size // 4 + SHIFT // 4, np.float32)[SHIFT // 4 :]
    parts = [np.array_split(array, threads) for array in (source, target)]
    with ThreadPoolExecutor(threads) as pool:

        def timed(way: Callable[[np.ndarray, np.ndarray], Any]) -> timing.Candidate:
            def call() -> None:
                for _ in range(repeats):
                    if threads == 1:
                        way(source, target)
                    else:
                        list(pool.map(way, *parts))  # NumPy lets go of the interpreter's lock

            return call

        return _rate(
            2 * source.nbytes * repeats, {n: timed(way) for n, way in WAYS.items()}, rounds
        )


def multiply_rate(
    size: int, rounds: int = ROUNDS, libraries: tuple[str, ...] = ("NumPy",)
) -> float:
    """Multiply-adds a second of a product of float32 matrices, on as many cores as the library takes."""
    a, b = np.random.default_rng(0).random((2, size, size), np.float32)
    calls: dict[str, timing.Candidate] = {"NumPy": lambda: a @ b}
    if "XLA" in libraries:
        product, device = jax.jit(jnp.matmul), jax.devices("cpu")[0]
        operands = [jax.device_put(matrix, device) for matrix in (a, b)]
        calls["XLA"] = lambda: product(*operands)
    return _rate(size**3, {name: calls[name] for name in libraries}, rounds)


def second_level_cache() -> int:
    """Bytes of a core's second-level cache."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        text = path.read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return SECOND_LEVEL


def reached(counts: Counts, seconds: float, ceilings: Ceilings) -> dict[str, float | None]:
    """What a layer attained in `seconds`, and the shares of the ceilings of all cores."""
    products, candidates = counts.products, counts.candidates
    return {
        "products_per_s": products / seconds,
        "multiply_add_share": products / seconds / ceilings["multiply_adds"],
        "bytes_per_s": counts.bytes / seconds,
        "copy_share": counts.bytes / seconds / ceilings["copy"],
        "ns_per_product": 1e9 * seconds / products if products else None,
        "ns_per_candidate": 1e9 * seconds / candidates if candidates else None,
    }


def lines(ceilings: Ceilings) -> list[str]:
    """A line for each figure."""
    shown = SHOWN.items()
    return [f"{what}: {ceilings[name] / 1e9:.1f} {unit}" for name, (what, unit) in shown]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measures, prints and writes the ceilings."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ceilings",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, whole = parser.add_argument, frame.positive_int
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add("--large", type=whole, default=LARGE, metavar="MIB", help="of an array that fits no cache")
    add("--matrix", type=whole, default=MATRIX, metavar="N", help="rows and columns of a matrix")
    add("--rounds", type=whole, default=ROUNDS, metavar="N", help="calls of each way")
    options = parser.parse_args(arguments)
    record = timing.provenance("ceilings", arguments)
    with frame.Reporter() as reporter:
        reporter.print(record["machine"])
        ceilings = measure(large=options.large, matrix=options.matrix, rounds=options.rounds)
        for line in lines(ceilings):
            reporter.print(line)
    if options.json:
        frame.write_json(options.json, record | {"ceilings": ceilings})
    return ceilings


def _rate(work: int, calls: Mapping[str, timing.Candidate], rounds: int) -> float:
    """Work a second, in the way whose median is best."""
    timings = timing.side_by_side(calls, budget=60, rounds=rounds)
    return work / min(timings.median(name) for name in calls)


def _multiply_rate_of_one_core(size: int, rounds: int) -> float:
    # A BLAS library reads how many threads it may have when it is loaded.
    code = f"from experiments.ceilings import multiply_rate; print(multiply_rate({size}, {rounds}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | dict.fromkeys(BLAS_THREADS, "1"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(result.stdout)


if __name__ == "__main__":
    main()
