"""The way to a finer grid without weights: nearest neighbour."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window, check_spatial_shape, per_axis, pool_window
from ilajax.ops._reach import reached_keys
from ilajax.ops.conv_transpose import conv_transpose
from ilajax.ops.k_select import check_capacity, k_select
from ilajax.ops.pool import pool, spread
from ilajax.sparse_tensor import SparseTensor, check_sparse


def upsample(
    x: SparseTensor,
    factor: int | Sequence[int],
    *,
    support: SparseTensor | None = None,
    capacity: int | None = None,
) -> SparseTensor:
    """Each stored value at all sites of its cell, or at those of them that a support has.

      y[o] = x[floor(o / factor)], where that is stored

    A site of a given support whose cell is not stored gets 0. The gradient of a stored value is the sum over
    its cell, in float32. It is the gradient of `ilajax.sum_pool`, and `sum_pool` is that of this.

    Args:
      x: [B, *S, C].
      factor: sites of a cell along each axis; one integer for all.
      support: None for all sites of the cells, on the grid S * factor. Or a SparseTensor on any grid that
        cells of this size make x's grid of, such as the map that was pooled; the result gets its keys, shared
        or one list for each channel. Its values do not matter.
      capacity: slots of the result, without a support; by default min(K * sites of a cell, sites), which
        loses nothing. Any other is a k-selection by absolute value, see `k_select`; one that can cut gives
        each channel keys of its own.

    Returns:
      A SparseTensor on the finer grid.

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[1.0, 0.0, 2.0]])[..., None], capacity=2)
      >>> y = ilajax.upsample(x, 2)
      >>> y.keys, y.values
      (Array([[[0, 1, 4, 5]]], dtype=int32), Array([[[1., 1., 2., 2.]]], dtype=float32))
    """
    check_sparse("x", x)
    factor = per_axis("factor", factor, len(x.spatial_shape))
    if support is not None:
        _check_given(support, x, factor, capacity)
        keys, grid = support.keys, support.spatial_shape
    else:
        capacity = None if capacity is None else check_capacity(capacity)
        sizes = zip(x.spatial_shape, factor, strict=True)
        grid = check_spatial_shape([size * times for size, times in sizes])
        keys = _all_keys(x, factor, grid)
    y = SparseTensor(keys, _upsampled(pool_window(grid, factor), x, keys), grid)
    return y if capacity in (None, y.capacity) else k_select(y, capacity, select="magnitude")


def _check_given(
    support: SparseTensor, x: SparseTensor, factor: tuple[int, ...], capacity: int | None
) -> None:
    check_sparse("support", support)
    if capacity is not None:
        raise ValueError(
            f"capacity does not apply with a support, whose slots the result has; got {capacity!r}. Leave it "
            "out."
        )
    if support.batch_size != x.batch_size:
        raise ValueError(
            f"support must have as many samples as x, {x.batch_size}, got {support.batch_size}."
        )
    if not support.shared and support.channels != x.channels:
        raise ValueError(
            f"support must be shared, or have keys for each of x's {x.channels} channels, got keys of "
            f"{support.channels}."
        )
    if len(support.spatial_shape) != len(x.spatial_shape) or (
        pool_window(support.spatial_shape, factor).output_shape != x.spatial_shape
    ):
        raise ValueError(
            f"support must stand on a grid that cells of {factor} make x's grid {x.spatial_shape} of, got a "
            f"support on {support.spatial_shape}."
        )


def _all_keys(x: SparseTensor, factor: tuple[int, ...], grid: tuple[int, ...]) -> jax.Array:
    """The sites of all stored cells, int32[B, C or 1, K']."""
    slots = min(x.capacity * math.prod(factor), math.prod(grid))
    spread_apart = functools.partial(conv_transpose, strides=factor)
    return reached_keys(spread_apart, x.keys[:, :, None], x.spatial_shape, factor, slots)


def _upsampled(cells: Window, x: SparseTensor, keys: jax.Array) -> jax.Array:
    """The values at fine keys [B, C or 1, K']; a list for each channel if either side has one."""
    coarse = x.keys
    if coarse.shape[1] != keys.shape[1]:
        coarse, keys = (
            jnp.broadcast_to(k, (x.batch_size, x.channels, k.shape[2])) for k in (coarse, keys)
        )
    return _gathered(cells, *ffi.place((coarse, x.values, keys), (True,) * 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(cells: Window, coarse: jax.Array, values: jax.Array, keys: jax.Array) -> jax.Array:
    return _gather(cells, coarse, values, keys)


def _gather(cells, coarse, values, keys):
    return spread(cells, "sum", keys, values[..., :0], coarse, values)


def _vjp_forward(cells, coarse, values, keys):
    return _gather(cells, coarse, values, keys), (coarse, keys)


def _vjp_backward(cells, residuals, cotangent):
    """x_bar[p] = sum over the stored o of cell p of y_bar[o]."""
    coarse, keys = residuals
    if cells.taps == 1:
        return None, _gather(cells, keys, cotangent, coarse), None
    slots = min(keys.shape[2], cells.output_sites)
    cell_keys, sums = pool(cells, slots, "sum", keys, cotangent)
    # Of the cells that x has: each site of its grid is one.
    return None, _gather(pool_window(cells.output_shape, 1), cell_keys, sums, coarse), None


_gathered.defvjp(_vjp_forward, _vjp_backward)
