"""Pooling over windows, and over the whole grid."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Padding, Window, pool_window, ravel, unravel
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops._supports import place_alike
from ilajax.ops.k_select import check_capacity, lookup_reference, select_reference
from ilajax.sparse_tensor import SparseTensor, check_sparse

_FORWARD, _BACKWARD = ffi.declare("pool")

Sizes = int | Sequence[int]


def max_pool(
    x: SparseTensor,
    window: Sizes,
    *,
    strides: Sizes | None = None,
    padding: Padding | None = None,
    capacity: int | None = None,
) -> SparseTensor:
    """Maximum over the stored entries of each window; a window without any stays empty.

    By default windows are cells side by side that cover the grid from its first site on: the output has
    ceil(S / window) sites along an axis, and the last cell may reach past the end. With strides or padding
    they lie as those of `ilajax.conv`, and may overlap. A negative maximum is not clipped, NaN is propagated.
    The gradient goes to the maximum; of equal entries to the one with the lower key.

    A shared support stays shared where nothing can be cut: with the default capacity, or one at least as
    large. Else each channel gets keys of its own.

    Args:
      x: [B, *S, C].
      window: sites of a window; one integer, or one for each axis.
      strides: steps between windows, as `window`; its sizes if only padding is given.
      padding: "SAME", "VALID", or a (low, high) pair for each axis; "SAME" if only strides are given.
      capacity: slots of the output; by default as many as can be needed, min(n * x.capacity, output sites),
        where n windows may hold a site (one, if they do not overlap). Where it is less, k-selection by value
        keeps the largest maxima.

    Returns:
      A SparseTensor on the grid of windows.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.arange(16.0).reshape(1, 4, 4, 1), capacity=16)
      >>> ilajax.max_pool(x, 2).values
      Array([[[ 5.,  7., 13., 15.]]], dtype=float32)
      >>> ilajax.max_pool(x, 3, strides=2).values
      Array([[[10., 11., 14., 15.]]], dtype=float32)

    Source: Hackel et al., "Pooling layer".
    """
    return _pool_checked(x, window, strides, padding, capacity, "max")


def avg_pool(
    x: SparseTensor,
    window: Sizes,
    *,
    strides: Sizes | None = None,
    padding: Padding | None = None,
    capacity: int | None = None,
    count: str = "sites",
) -> SparseTensor:
    """Mean over each window; a window without stored entries stays empty.

      count="sites":   sum of the stored entries / sites of the window inside the grid
      count="stored":  sum of the stored entries / number of them

    The first is a dense average, to which what is not stored counts as 0; the second, that of
    MinkowskiEngine, does not fade at the edge of a surface. Sums are in float32. The gradient is spread over
    the stored entries of the kept windows.

    Args:
      x: [B, *S, C].
      window, strides, padding, capacity: as in `max_pool`.
      count: what is counted, "sites" or "stored".

    Returns:
      A SparseTensor on the grid of windows.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.arange(16.0).reshape(1, 4, 4, 1), capacity=16)
      >>> ilajax.avg_pool(x, 2).values
      Array([[[ 2.5,  4.5, 10.5, 12.5]]], dtype=float32)
    """
    check_over(count, "count")
    return _pool_checked(x, window, strides, padding, capacity, f"over_{count}")


def sum_pool(
    x: SparseTensor,
    window: Sizes,
    *,
    strides: Sizes | None = None,
    padding: Padding | None = None,
    capacity: int | None = None,
) -> SparseTensor:
    """Sum over the stored entries of each window; a window without any stays empty.

    Sums are in float32; one that is 0 stays stored. The gradient of a kept window goes to each of its
    entries.

    Args:
      x: [B, *S, C].
      window, strides, padding, capacity: as in `max_pool`.

    Returns:
      A SparseTensor on the grid of windows.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.arange(16.0).reshape(1, 4, 4, 1), capacity=16)
      >>> ilajax.sum_pool(x, 2).values
      Array([[[10., 18., 42., 50.]]], dtype=float32)
    """
    return _pool_checked(x, window, strides, padding, capacity, "sum")


def global_max_pool(x: SparseTensor) -> jax.Array:
    """Maximum over the stored entries of each sample and channel, [B, C]; 0 where there is none.

    A negative maximum is not clipped, NaN is propagated. Plain jax.numpy: one reduction, which XLA fuses.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> ilajax.global_max_pool(x)
      Array([[1.]], dtype=float32)
    """
    check_sparse("x", x)
    (x,) = place_alike([x])
    stored = x.keys < x.sites
    # Padding repeats the first entry, which wins over it.
    values = jnp.where(stored, x.values, x.values[..., :1])
    # By its place, so that the gradient goes to one entry: of equal ones to the lower key.
    first = jnp.argmax(values, axis=2, keepdims=True)
    largest = jnp.take_along_axis(values, first, axis=2)[..., 0]
    return jnp.where(jnp.any(stored, axis=2), largest, 0)


def global_avg_pool(x: SparseTensor, *, over: str = "sites") -> jax.Array:
    """Sum over the stored entries of each sample and channel by a number of sites, [B, C].

      over="sites":   sum(values) / sites, the mean of the dense map
      over="stored":  sum(values) / stored entries; 0 where there is none

    The second does not fade as a map gets sparser: the same object in a finer grid, whose surface fills a
    smaller share of the sites, keeps its scale. The gradient with respect to a stored value is 1 by the same
    number. Plain jax.numpy: one reduction, in float32, which XLA fuses.

    Args:
      x: [B, *S, C].
      over: what the sum is divided by, "sites" or "stored".

    Returns:
      [B, C], in the dtype of x.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> ilajax.global_avg_pool(x)
      Array([[0.33333334]], dtype=float32)
      >>> ilajax.global_avg_pool(x, over="stored")
      Array([[1.]], dtype=float32)
    """
    check_sparse("x", x)
    check_over(over)
    stored = x.keys < x.sites
    total = jnp.sum(jnp.where(stored, x.values, 0), axis=2, dtype=jnp.float32)
    number = x.sites if over == "sites" else jnp.maximum(jnp.sum(stored, axis=2), 1)
    return (total / number).astype(x.dtype)


def check_over(over: str, argument: str = "over") -> None:
    """Raises ValueError unless a mean can be over that."""
    if over not in ("sites", "stored"):
        raise ValueError(
            f"{argument} must be 'sites' (the mean of the dense map) or 'stored' (the mean over stored "
            f"entries), got {over!r}."
        )


def _pool_checked(
    x: SparseTensor,
    window: Sizes,
    strides: Sizes | None,
    padding: Padding | None,
    capacity: int | None,
    mode: str,
) -> SparseTensor:
    check_sparse("x", x)
    cells = pool_window(x.spatial_shape, window, strides, padding)
    lossless = min(math.prod(_reach(cells)) * x.capacity, cells.output_sites)
    capacity = lossless if capacity is None else check_capacity(capacity)
    if capacity < lossless:
        x = x.unshare()
    operands = ffi.place((x.keys, x.values), (True, True))
    keys, values = pool(cells, capacity, mode, *operands)
    return SparseTensor(keys, values, cells.output_shape)


def _reach(cells: Window) -> list[int]:
    """How many windows may hold a site, along each axis."""
    return [-(-w // s) for w, s in zip(cells.window_shape, cells.strides, strict=True)]


class _Config(NamedTuple):
    cells: Window
    capacity: int
    mode: str


def pool(
    cells: Window, capacity: int, mode: str, keys: jax.Array, values: jax.Array
) -> ffi.Outputs:
    """Keys and values of the pooled map, of arrays that are placed alike.

    Args:
      cells: the geometry.
      capacity: slots of the result; a shared support must not be cut.
      mode: "max", "sum", "over_sites" or "over_stored".
      keys, values: int32[B, C or 1, K] and float[B, C, K].
    """
    return _pool(_Config(cells, capacity, mode), keys, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(config: _Config, keys: jax.Array, values: jax.Array) -> ffi.Outputs:
    return _forward(config, keys, values)


def _forward(
    config: _Config, keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"]
) -> ffi.Outputs:
    return ffi.dispatch(
        _FORWARD,
        functools.partial(_forward_reference, config),
        (keys, values),
        (True, True),
        (
            ffi.result((keys.shape[1], config.capacity), jnp.int32),
            ffi.result((values.shape[1], config.capacity), values.dtype),
        ),
        window=config.cells,
        mode=config.mode,
    )


def _vjp_forward(config, keys, values):
    pooled_keys, pooled_values = _forward(config, keys, values)
    compared = values if config.mode == "max" else values[..., :0]
    return (pooled_keys, pooled_values), (keys, compared, pooled_keys)


def _vjp_backward(config, residuals, cotangents):
    """With g[w] the cotangent of window w, 0 where it was not kept, and the sums over the windows of e:

    "max":          x_bar[e] = sum of g[w] where e is the maximum of w; ties: the lower key
    "sum":          x_bar[e] = sum of g[w]
    "over_sites":   x_bar[e] = sum of g[w] / (sites of w inside the grid)
    "over_stored":  x_bar[e] = sum of g[w] / (stored entries of w)
    """
    keys, values, pooled_keys = residuals
    return None, spread(config.cells, config.mode, keys, values, pooled_keys, cotangents[1])


def spread(
    cells: Window,
    mode: str,
    keys: jax.Array,
    values: jax.Array,
    pooled_keys: jax.Array,
    cotangent: jax.Array,
) -> jax.Array:
    """What the entries of a map have of numbers in its windows, [B, C, K]: the gradient of pooling.

    Args:
      cells, mode, keys, values: as in `pool`; modes other than "max" need no values: float[B, C, 0].
      pooled_keys, cotangent: the windows that have a number, int32[B, C or 1, Q], and float[B, C, Q].
    """
    (result,) = ffi.dispatch(
        _BACKWARD,
        functools.partial(_backward_reference, cells, mode),
        (keys, values, pooled_keys, cotangent),
        (True,) * 4,
        (ffi.result((values.shape[1], keys.shape[2]), values.dtype),),
        window=cells,
        mode=mode,
    )
    return result


_pool.defvjp(_vjp_forward, _vjp_backward)


def _forward_reference(
    config: _Config, keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"]
) -> tuple[Int32[Array, "b ck q"], Float[Array, "b c q"]]:
    cells = config.cells
    by_cell = _sorted_by_cell(cells, keys, values)
    pooled = by_cell.values
    if config.mode != "max":
        pooled = _segment_sums(by_cell, by_cell.values) / _divisor(cells, config.mode, by_cell)
    pooled = pooled.astype(values.dtype)
    # One entry stands for its cell, which for a maximum is the first in the order of the sort.
    candidate = by_cell.first & (by_cell.cell < cells.output_sites)
    selection = (cells.output_sites, config.capacity, "value")
    selected = select_reference(by_cell.cell, pooled, candidate, *selection)
    # A shared support loses no cell, so every channel has the same ones.
    return selected.keys[:, : keys.shape[1]], selected.values


def _backward_reference(
    cells: Window,
    mode: str,
    keys: Int32[Array, "b ck k"],
    values: Float[Array, "b c k_or_0"],
    pooled_keys: Int32[Array, "b ck q"],
    cotangent: Float[Array, "b c q"],
) -> tuple[Float[Array, "b c k"]]:
    if mode != "max":
        values = jnp.zeros((*values.shape[:2], keys.shape[2]), values.dtype)
    by_cell = _sorted_by_cell(cells, keys, values)
    pooled_keys = jnp.broadcast_to(pooled_keys, cotangent.shape)
    gradient = lookup_reference(by_cell.cell, pooled_keys, cotangent, cells.output_sites)
    gradient = gradient.astype(jnp.float32)
    if mode == "max":
        gradient = jnp.where(by_cell.first, gradient, 0)
    else:
        gradient /= _divisor(cells, mode, by_cell)

    def add_up(slots, gradient):
        return jnp.zeros(keys.shape[2], jnp.float32).at[slots].add(gradient)

    return (jax.vmap(jax.vmap(add_up))(by_cell.slots, gradient).astype(values.dtype),)


class _ByCell(NamedTuple):
    """Entries [B, C, K], for each window that may hold one, in the order of these cells.

    Within a cell the largest stands first, ties by key.
    """

    cell: jax.Array  # output_sites for padding
    values: jax.Array  # float32
    slots: jax.Array  # where the entry stood
    first: jax.Array  # whether it is the first of its cell


def _sorted_by_cell(
    cells: Window, keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"]
) -> _ByCell:
    keys = jnp.broadcast_to(keys, values.shape)
    cell = _cells_of(cells, keys)
    copies = cell.shape[2] // keys.shape[2]
    wide = jnp.tile(values.astype(jnp.float32), copies)
    nan = jnp.isnan(wide)
    slots = jnp.broadcast_to(jnp.arange(wide.shape[2], dtype=jnp.int32), wide.shape)
    order = (cell, ~nan, jnp.where(nan, 0, -wide), slots % keys.shape[2], slots)
    cell, _, _, slots, places = jax.lax.sort(order, dimension=2, num_keys=4)
    before = jnp.pad(cell[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=-1)
    return _ByCell(cell, jnp.take_along_axis(wide, places, axis=2), slots, cell != before)


def _cells_of(cells: Window, keys: Int32[Array, "b c k"]) -> Int32[Array, "b c n"]:
    """The cells that may hold each key, one list behind the other; `output_sites` for those that do not."""
    inside = (keys >= 0) & (keys < cells.input_sites)
    positions = unravel(keys, cells.input_shape)
    places = [p + low for p, low in zip(positions, cells.low, strict=True)]
    found = []
    for earlier in itertools.product(*map(range, _reach(cells))):
        holds, cell = inside, []
        for p, n, stride, width in zip(
            places, earlier, cells.strides, cells.window_shape, strict=True
        ):
            cell.append(p // stride - n)
            holds &= p - cell[-1] * stride < width
        found.append(jnp.where(holds, ravel(cell, cells.output_shape), cells.output_sites))
    return jnp.concatenate(found, axis=2)


def _segment_sums(by_cell: _ByCell, values: jax.Array) -> Float32[Array, "b c k"]:
    """At each entry the sum over its cell."""
    segment = jnp.cumsum(by_cell.first, axis=2) - 1

    sums = lambda s, v: jax.ops.segment_sum(v, s, v.size)[s]  # noqa: E731
    return jax.vmap(jax.vmap(sums))(segment, values)


def _divisor(cells: Window, mode: str, by_cell: _ByCell) -> Float32[Array, "b c k"]:
    """What the sum over each entry's cell is divided by."""
    if mode == "over_stored":
        return _segment_sums(by_cell, jnp.ones_like(by_cell.values))
    count = jnp.ones(by_cell.cell.shape, jnp.float32)
    if mode == "sum":
        return count
    position = unravel(by_cell.cell, cells.output_shape)
    axes = (position, cells.input_shape, cells.window_shape, cells.strides, cells.low)
    for p, size, width, stride, low in zip(*axes, strict=True):
        start = p * stride - low
        count *= jnp.clip(jnp.minimum(start + width, size) - jnp.maximum(start, 0), 1)
    return count
