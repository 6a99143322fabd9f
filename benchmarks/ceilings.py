"""What this processor attains at most, measured: bytes copied and float32 multiply-adds a second.

A ceiling is the median of a few rounds of the quickest of several ways, all of them with vector
instructions of tuned libraries: it is what such a library attains on all cores, not what the processor's data
sheet says. Copies, of arrays that no cache holds, are NumPy's, and count each byte twice, as read and as
written. Multiply-adds are those of a large matrix product, by NumPy's BLAS or by XLA. One is two operations.

A third ceiling would tell more about a sparse convolution: random additions to rows of 32 bytes in the
first-level cache. NumPy and XLA take tens of nanoseconds for each such row, most of it overhead of their
loops, so there is no honest figure from here.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.counts import Counts

# Caches treat a copy between equal places of two pages as a dependency, and slow it down tenfold.
SHIFT = 2048
# Name in a record -> (what it is, unit).
SHOWN = {
    "copy": ("copy from memory, all cores", "GB/s"),
    "multiply_adds": ("float32 multiply-adds, all cores", "G/s"),
}

Ceilings = Mapping[str, float]


def measure(*, large: int = 128, matrix: int = 1536, rounds: int = 7) -> dict[str, float]:
    """The figures of `SHOWN` a second.

    Args:
      large: MiB of each of two arrays.
      matrix: rows and columns of the matrices.
      rounds: calls of each way; the median counts.
    """
    return {
        "copy": copy_rate(large << 20, rounds),
        "multiply_adds": multiply_rate(matrix, rounds),
    }


def copy_rate(size: int, rounds: int) -> float:
    """Bytes read and written a second, of arrays of `size` bytes."""
    # Written to, so that there is memory behind every page.
    source = np.ones(size // 4, np.float32)
    target = np.ones(size // 4 + SHIFT // 4, np.float32)[SHIFT // 4 :]
    threads = timing.cores()
    parts = [np.array_split(array, threads) for array in (target, source)]
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter's lock
        calls = {
            "copy": lambda: list(pool.map(np.copyto, *parts)),
            "negate": lambda: list(pool.map(lambda t, s: np.negative(s, out=t), *parts)),
        }
        return _rate(2 * source.nbytes, calls, rounds)


def multiply_rate(size: int, rounds: int) -> float:
    """Multiply-adds a second of a product of float32 matrices."""
    a, b = np.random.default_rng(0).random((2, size, size), np.float32)
    product, device = jax.jit(jnp.matmul), jax.devices("cpu")[0]
    operands = [jax.device_put(matrix, device) for matrix in (a, b)]
    return _rate(size**3, {"NumPy": lambda: a @ b, "XLA": lambda: product(*operands)}, rounds)


def reached(counts: Counts, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """What a layer attained in `seconds`, and its shares of the ceilings."""
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


def _rate(work: int, calls: Mapping[str, timing.Candidate], rounds: int) -> float:
    """Work a second, in the way whose median is best."""
    timings = timing.side_by_side(calls, budget=60, rounds=rounds)
    return work / min(timings.median(name) for name in calls)
