"""What has to happen in a convolution, and how close a time comes to what this processor attains at most.

Counts are floors of the problem on its actual operands, the same for every implementation: nothing here
knows how the kernels work. A ceiling is the median of a few rounds of the quickest of several ways, all of
them with vector instructions of tuned libraries: it is what such a library attains on all cores, not what the
processor's data sheet says. Copies, of arrays that no cache holds, are NumPy's, and count each byte twice, as
read and as written. Multiply-adds are those of a large matrix product, by NumPy's BLAS or by XLA.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from benchmarks import timing
from benchmarks.layers import LAYOUTS, Layer

# Caches treat a copy between equal places of two pages as a dependency, and slow it down tenfold.
SHIFT = 2048

Counts = dict[str, int]
Ceilings = Mapping[str, float]


def count(layer: Layer) -> Counts:
    """The work of one call of a layer.

    Forward products are pairs of an entry and a live weight that meet in an output site: with support="input"
    one of the input's own. Backward products are two for each pair that meets in a kept output, for the
    gradients of the entry and of the weight. In sites any pair meets; candidates are what the selection sees.
    Bytes read are entries and live weights (key and value) and the bias; backward, which is a call of its
    own, entries and weights once more, and a key and a cotangent for each kept output. Bytes written are all
    slots of the output (key and value) and the numbers of candidates; backward the gradients of all slots of
    the input, of the weights and of the bias. Keys of a shared support count once for all channels, and with
    support="input" none is written. The first layer of a network has no gradient of its input.
    """
    x, kernel, output = layer.x, layer.kernel, layer.output
    features, own = output.features, layer.support == "input"
    entries, outputs, weights = _stored(x), _stored(features), int(kernel.count)
    forward, kept, sites = (_own_pairs if own else _pairs)(layer)
    backward = (1 if layer.first else 2) * kept if layer.backward else 0
    key, value = x.keys.dtype.itemsize, x.values.dtype.itemsize
    operands = key * int((x.keys < x.sites).sum()) + value * entries
    operands += (key + kernel.values.dtype.itemsize) * weights
    read = operands + layer.bias.nbytes
    written = value * features.values.size + output.responses.nbytes
    written += 0 if own else key * features.keys.size
    if layer.backward:
        read += operands + (value if own else key + value) * outputs
        written += 0 if layer.first else value * x.values.size
        written += kernel.values.nbytes + layer.bias.nbytes
    return {
        "entries": entries,
        "weights": weights,
        "forward_products": forward,
        "backward_products": backward,
        "sites": sites,
        "candidates": int(output.responses.sum()),
        "kept": outputs,
        "bytes_read": read,
        "bytes_written": written,
        "products": forward + backward,
        "bytes": read + written,
    }


def _pairs(layer: Layer) -> tuple[int, int, int]:
    """Pairs that meet, those that meet in a kept output, and sites where some meet: in dense arrays."""
    met = jax.lax.conv_general_dilated(
        *(_marks(layer.x), _live(layer), (1, 1, 1), "SAME"),
        dimension_numbers=LAYOUTS["channels last"],
        precision=jax.lax.Precision.HIGHEST,
    )
    met, kept = np.asarray(met), np.asarray(_marks(layer.output.features)) > 0
    pairs = (int(where.sum(dtype=np.float64)) for where in (met, met[kept]))
    return (*pairs, int(met.any(axis=-1).sum()))


def _own_pairs(layer: Layer) -> tuple[int, int, int]:
    """The same where outputs are at the input's sites, which all channels share and none is cut."""
    live = np.asarray(_live(layer)).reshape(layer.kernel.taps, -1).sum(axis=1)
    maps = [(added, int(count)) for (_, added), count in zip(layer.pairs(), live, strict=True)]
    met = sum(len(added) * count for added, count in maps)
    return met, met, len(np.unique(np.concatenate([added for added, count in maps if count])))


def _live(layer: Layer) -> jax.Array:
    """1 where a weight is live, [*window, Cin, Cout]."""
    kernel = layer.kernel
    return dataclasses.replace(kernel, values=jnp.ones_like(kernel.values)).to_dense()


def _stored(x: ilajax.SparseTensor) -> int:
    return int(x.counts.sum())


def _marks(x: ilajax.SparseTensor) -> jax.Array:
    """1 where something is stored, float32[B, *S, C]."""
    return ilajax.to_dense(x.map(lambda values: jnp.ones_like(values, jnp.float32)))


def reached(counts: Counts, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """What a layer attained in `seconds`, and its shares of the ceilings."""
    products, candidates = counts["products"], counts["candidates"]
    return {
        "products_per_s": products / seconds,
        "multiply_add_share": products / seconds / ceilings["multiply_adds"],
        "bytes_per_s": counts["bytes"] / seconds,
        "copy_share": counts["bytes"] / seconds / ceilings["copy"],
        "ns_per_product": 1e9 * seconds / products if products else None,
        "ns_per_candidate": 1e9 * seconds / candidates if candidates else None,
    }


def ceilings(*, large: int = 128, matrix: int = 1536, rounds: int = 7) -> dict[str, float]:
    """Both figures a second, of two arrays of `large` MiB and of matrices of `matrix` rows and columns."""
    # Written to, so that there is memory behind every page.
    source = np.ones(large << 18, np.float32)
    target = np.ones(source.size + SHIFT // 4, np.float32)[SHIFT // 4 :]
    threads = timing.cores()
    parts = [np.array_split(array, threads) for array in (target, source)]
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter's lock
        copies = {
            "copy": lambda: list(pool.map(np.copyto, *parts)),
            "negate": lambda: list(pool.map(lambda t, s: np.negative(s, out=t), *parts)),
        }
        copied = 2 * source.nbytes / _least(copies, rounds)
    a, b = np.random.default_rng(0).random((2, matrix, matrix), np.float32)
    product, operands = jax.jit(jnp.matmul), jax.device_put((a, b), jax.devices("cpu")[0])
    products = {"NumPy": lambda: a @ b, "XLA": lambda: product(*operands)}
    return {"copy": copied, "multiply_adds": matrix**3 / _least(products, rounds)}


def _least(calls: Mapping[str, timing.Candidate], rounds: int) -> float:
    timings = timing.side_by_side(calls, budget=60, rounds=rounds)
    return min(timings.median(name) for name in calls)
