"""Pooling over non-overlapping cells and over the whole grid."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window, pool_window, ravel, unravel
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops._supports import place_alike
from ilajax.ops.k_select import check_capacity, lookup_reference, select_reference
from ilajax.sparse_tensor import SparseTensor, check_sparse

_FORWARD, _BACKWARD = ffi.declare("pool")


def max_pool(
    x: SparseTensor, window: int | Sequence[int], *, capacity: int | None = None
) -> SparseTensor:
    """Maximum over the stored entries of each cell; a cell without any stays empty.

    Cells do not overlap (stride = window) and cover the grid: the output has ceil(S / window) sites along an
    axis, and the last cell may reach past the end. A negative maximum is not clipped, NaN is propagated. The
    gradient goes to the maximum; of equal entries to the one with the lower key.

    A shared support stays shared where nothing can be cut: with the default capacity, or one at least as
    large. Else each channel gets keys of its own.

    Args:
      x: [B, *S, C].
      window: sites of a cell; one integer, or one for each axis.
      capacity: slots of the output; by default min(x.capacity, output sites), which loses nothing. Where it
        is less, k-selection by value keeps the largest maxima.

    Returns:
      A SparseTensor on the coarser grid.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.arange(16.0).reshape(1, 4, 4, 1), capacity=16)
      >>> ilajax.max_pool(x, 2).values
      Array([[[ 5.,  7., 13., 15.]]], dtype=float32)

    Source: Hackel et al., "Pooling layer".
    """
    return _pool_checked(x, window, capacity, "max")


def avg_pool(
    x: SparseTensor, window: int | Sequence[int], *, capacity: int | None = None
) -> SparseTensor:
    """Sum over the stored entries of each cell by the number of its sites inside the grid.

    What is not stored counts as 0, as in a dense average; a cell without stored entries stays empty. Sums are
    in float32. The gradient is spread over the stored entries of the kept cells.

    Args:
      x: [B, *S, C].
      window: sites of a cell, as in `max_pool`.
      capacity: slots of the output, as in `max_pool`.

    Returns:
      A SparseTensor on the coarser grid.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.arange(16.0).reshape(1, 4, 4, 1), capacity=16)
      >>> ilajax.avg_pool(x, 2).values
      Array([[[ 2.5,  4.5, 10.5, 12.5]]], dtype=float32)
    """
    return _pool_checked(x, window, capacity, "avg")


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


def check_over(over: str) -> None:
    """Raises ValueError unless a mean can be over that."""
    if over not in ("sites", "stored"):
        raise ValueError(
            f"over must be 'sites' (the mean of the dense map) or 'stored' (the mean over stored entries), "
            f"got {over!r}."
        )


def _pool_checked(
    x: SparseTensor, window: int | Sequence[int], capacity: int | None, mode: str
) -> SparseTensor:
    check_sparse("x", x)
    cells = pool_window(x.spatial_shape, window)
    lossless = min(x.capacity, cells.output_sites)
    capacity = lossless if capacity is None else check_capacity(capacity)
    if capacity < lossless:
        x = x.unshare()
    operands = ffi.place((x.keys, x.values), (True, True))
    keys, values = _pool(_Config(cells, capacity, mode), *operands)
    return SparseTensor(keys, values, cells.output_shape)


class _Config(NamedTuple):
    cells: Window
    capacity: int
    mode: str


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
    return (pooled_keys, pooled_values), (keys, values, pooled_keys)


def _vjp_backward(config, residuals, cotangents):
    """With g the cotangent of the cell that holds entry e, 0 where it was not kept:

    "max": x_bar[e] = g if e is its cell's maximum, else 0; ties: the lower key
    "avg": x_bar[e] = g / (sites of the cell inside the grid)
    """
    keys, values, pooled_keys = residuals
    (values_bar,) = ffi.dispatch(
        _BACKWARD,
        functools.partial(_backward_reference, config),
        (keys, values, pooled_keys, cotangents[1]),
        (True,) * 4,
        (ffi.result(values.shape[1:], values.dtype),),
        window=config.cells,
        mode=config.mode,
    )
    return None, values_bar


_pool.defvjp(_vjp_forward, _vjp_backward)


def _forward_reference(
    config: _Config, keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"]
) -> tuple[Int32[Array, "b ck q"], Float[Array, "b c q"]]:
    cells = config.cells
    by_cell = _sorted_by_cell(cells, keys, values)
    pooled = by_cell.values
    if config.mode == "avg":
        pooled = _segment_sums(by_cell) / _sites_of(cells, by_cell.cell)
    pooled = pooled.astype(values.dtype)
    # One entry stands for its cell, which for a maximum is the first in the order of the sort.
    candidate = by_cell.first & (by_cell.cell < cells.output_sites)
    selection = (cells.output_sites, config.capacity, "value")
    selected = select_reference(by_cell.cell, pooled, candidate, *selection)
    # A shared support loses no cell, so every channel has the same ones.
    return selected.keys[:, : keys.shape[1]], selected.values


def _backward_reference(
    config: _Config,
    keys: Int32[Array, "b ck k"],
    values: Float[Array, "b c k"],
    pooled_keys: Int32[Array, "b ck q"],
    cotangent: Float[Array, "b c q"],
) -> tuple[Float[Array, "b c k"]]:
    cells = config.cells
    by_cell = _sorted_by_cell(cells, keys, values)
    pooled_keys = jnp.broadcast_to(pooled_keys, cotangent.shape)
    gradient = lookup_reference(by_cell.cell, pooled_keys, cotangent, cells.output_sites)
    gradient = gradient.astype(jnp.float32)
    if config.mode == "max":
        gradient = jnp.where(by_cell.first, gradient, 0)
    else:
        gradient /= _sites_of(cells, by_cell.cell)
    scatter = jax.vmap(jax.vmap(lambda slots, g: jnp.zeros_like(g).at[slots].set(g)))
    return (scatter(by_cell.slots, gradient).astype(values.dtype),)


class _ByCell(NamedTuple):
    """Entries [B, C, K] in the order of their cells; within a cell the largest first, ties by key."""

    cell: jax.Array  # output_sites for padding
    values: jax.Array  # float32
    slots: jax.Array  # where the entry stood
    first: jax.Array  # whether it is the first of its cell


def _sorted_by_cell(
    cells: Window, keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"]
) -> _ByCell:
    keys = jnp.broadcast_to(keys, values.shape)
    cell = _cell_of(cells, keys)
    wide = values.astype(jnp.float32)
    nan = jnp.isnan(wide)
    slots = jnp.broadcast_to(jnp.arange(keys.shape[2], dtype=jnp.int32), keys.shape)
    order = (cell, ~nan, jnp.where(nan, 0, -wide), slots)
    cell, _, _, slots = jax.lax.sort(order, dimension=2, num_keys=4)
    before = jnp.pad(cell[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=-1)
    return _ByCell(cell, jnp.take_along_axis(wide, slots, axis=2), slots, cell != before)


def _cell_of(cells: Window, keys: Int32[Array, "b c k"]) -> Int32[Array, "b c k"]:
    """The cell of each key; `output_sites` for padding."""
    inside = (keys >= 0) & (keys < cells.input_sites)
    position = unravel(keys, cells.input_shape)
    cell = ravel([p // w for p, w in zip(position, cells.strides, strict=True)], cells.output_shape)
    return jnp.where(inside, cell, cells.output_sites)


def _segment_sums(by_cell: _ByCell) -> Float32[Array, "b c k"]:
    """At each entry the sum over its cell."""
    segment = jnp.cumsum(by_cell.first, axis=2) - 1

    sums = lambda s, v: jax.ops.segment_sum(v, s, v.size)[s]  # noqa: E731
    return jax.vmap(jax.vmap(sums))(segment, by_cell.values)


def _sites_of(cells: Window, cell: Int32[Array, "b c k"]) -> Float32[Array, "b c k"]:
    """The number of sites of each cell inside the grid, float32."""
    count = jnp.ones(cell.shape, jnp.float32)
    position = unravel(cell, cells.output_shape)
    for p, size, width in zip(position, cells.input_shape, cells.strides, strict=True):
        count *= jnp.clip(size - p * width, 1, width)
    return count
