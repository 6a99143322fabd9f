"""Points with features to a sparse tensor: voxels, and what becomes of the points that share one."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from ilajax.geometry import check_spatial_shape, ravel, sites
from ilajax.ops._points import (
    as_array,
    as_batch_index,
    as_int32,
    by_sample,
    check_batch_index,
    check_not_split,
    first,
)
from ilajax.ops.k_select import check_capacity
from ilajax.sparse_tensor import VALUE_DTYPES, SparseTensor

REDUCTIONS = ("mean", "sum", "max")
OVERFLOWS = ("raise", "drop")


@overload
def from_points(
    coordinates: Any,
    features: Any,
    batch_index: Any = None,
    *,
    spatial_shape: Sequence[int],
    batch_size: int | None = None,
    capacity: int,
    reduce: str = "mean",
    overflow: str = "raise",
    return_overflow: Literal[False] = False,
    return_slots: Literal[False] = False,
) -> SparseTensor: ...


@overload
def from_points(
    coordinates: Any,
    features: Any,
    batch_index: Any = None,
    *,
    spatial_shape: Sequence[int],
    batch_size: int | None = None,
    capacity: int,
    reduce: str = "mean",
    overflow: str = "raise",
    return_overflow: bool = False,
    return_slots: bool = False,
) -> Any: ...


def from_points(
    coordinates: Any,
    features: Any,
    batch_index: Any = None,
    *,
    spatial_shape: Sequence[int],
    batch_size: int | None = None,
    capacity: int,
    reduce: str = "mean",
    overflow: str = "raise",
    return_overflow: bool = False,
    return_slots: bool = False,
) -> Any:
    """Voxelises points with features: one shared support for all channels.

    NumPy in, NumPy out: where all three are NumPy arrays or lists, nothing here touches JAX, and the result
    has NumPy arrays, which every operation takes. It takes milliseconds and may run in the worker processes
    of a data loader, forked ones too. `ilajax.data.voxelize` starts from a list of clouds.

    With a JAX array among them, JAX computes, and compiles once for each number of points: pad the points
    to one number, with a `batch_index` of -1. Keys, and on the CPU values too, are those of NumPy to the
    last bit: the points of a voxel are added in float32, in their order of arrival.

    Points come in one list, or, with a batch axis in front, in a list for each sample. The second form is the
    one for several devices: where the batch is sharded, each device voxelises the points that it holds, and
    nothing is gathered. One list does not say which device needs which point: under plain `jit` XLA gathers a
    list that is sharded, and where types say so it is an error.

    Args:
      coordinates: int[N, d], the voxel of each point; or int[B, N, d].
      features: float32, bfloat16 or float16 [N, C] or [B, N, C]; NumPy's float64 becomes float32.
      batch_index: int[N], the sample of each point; -1 marks padding, a point that does not count and may
        hold anything. With a batch axis int[B, N], -1 or the row's own number, which is the default.
      spatial_shape: the grid, d axes.
      batch_size: number of samples; with a batch axis its length, which is the default.
      capacity: slots of each sample.
      reduce: "mean", "sum" or "max" over the points of one voxel, channel by channel.
      overflow: what happens where a sample occupies more voxels than it has slots: "raise", or "drop",
        which keeps the lowest keys. Inside `jit` it is always "drop".
      return_overflow: also return int32[B], the voxels of each sample that did not fit.
      return_slots: also return int32[N] or int32[B, N], the slot of each point in its sample, -1 where it was
        dropped. For the others `x.values[batch_index, :, slots]` are the features of the point's voxel.

    Returns:
      A SparseTensor with a shared support; or a tuple of it, the overflow and the slots, in this order, as
      far as they are asked for. Its gradient with respect to the features is that of the reduction.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, shape or value; and, as far as the arrays are
        concrete, for coordinates or batch indices out of range, NaN features, or more occupied voxels than
        slots. Of traced arrays, as inside `jit`, such points are dropped.

    Example:
      >>> x, slots = ilajax.from_points(
      ...     np.array([[2, 2], [0, 1], [0, 1]]), np.array([[5.0], [1.0], [3.0]]), np.array([0, 0, 0]),
      ...     spatial_shape=(3, 3), batch_size=1, capacity=4, return_slots=True)
      >>> x.values
      array([[[2., 5., 0., 0.]]], dtype=float32)
      >>> slots
      array([1, 0, 0], dtype=int32)
    """
    given = (coordinates, features, batch_index)
    # Checked as they come: JAX would wrap 64-bit integers around before anybody has seen them.
    coordinates, features = as_array(coordinates), as_array(features)
    if features.dtype == np.float64 and isinstance(features, np.ndarray):
        features = features.astype(np.float32)
    points = (coordinates, features, as_batch_index(batch_index, coordinates))
    if batch_size is None and coordinates.ndim == 3:
        batch_size = coordinates.shape[0]
    spatial_shape, capacity = check_spatial_shape(spatial_shape), check_capacity(capacity)
    config = _Config(spatial_shape, batch_size, capacity, reduce)  # type: ignore[arg-type]
    _check_arguments(config, overflow, *points)
    concrete = (None if isinstance(a, jax.core.Tracer) else np.asarray(a) for a in points)
    _check_points(config, *concrete)
    run: Any = _with_numpy
    if any(isinstance(a, jax.Array) for a in given):
        coordinates, features, batch_index = points
        points = (as_int32(coordinates), features, as_int32(batch_index))
        run = _with_jax_by_sample if coordinates.ndim == 3 else _with_jax
    x, excess, slots = run(config, *points)
    if overflow == "raise" and not isinstance(excess, jax.core.Tracer) and np.any(excess):
        sample, most = int(np.argmax(excess)), capacity + int(np.max(excess))
        raise ValueError(
            f"capacity is {capacity}, but sample {sample} occupies {most} voxels. Raise the capacity, use a "
            f'coarser grid, or keep the lowest keys only by overflow="drop".'
        )
    extras = [a for a, asked in ((excess, return_overflow), (slots, return_slots)) if asked]
    return (x, *extras) if extras else x


class _Config(NamedTuple):
    spatial_shape: tuple[int, ...]
    batch_size: int
    capacity: int
    reduce: str


# --- NumPy -----------------------------------------------------------------------------------------


def _with_numpy(
    config: _Config, coordinates: np.ndarray, features: np.ndarray, batch_index: np.ndarray
) -> tuple[SparseTensor, np.ndarray, np.ndarray]:
    """The tensor, int32[B] of voxels that did not fit, the slots of the points, which were checked."""
    if coordinates.ndim == 3:
        one_list = (a.reshape(-1, *a.shape[2:]) for a in (coordinates, features, batch_index))
        x, excess, slots = _with_numpy(config, *one_list)
        return x, excess, slots.reshape(batch_index.shape)
    grid, batch, capacity = sites(config.spatial_shape), config.batch_size, config.capacity
    real: Any = batch_index != -1
    real = slice(None) if real.all() else np.flatnonzero(real)  # mostly all: no copies
    # One number orders samples and keys: with int64 there is room for both.
    place = tuple(axis[real].astype(np.int64) for axis in coordinates.T)
    keys = np.ravel_multi_index(place, config.spatial_shape)
    keys += batch_index[real].astype(np.int64) * grid
    voxels, voxel = _distinct(keys, batch * grid)
    start = np.searchsorted(voxels, np.arange(batch + 1, dtype=np.int64) * grid)
    occupied = np.diff(start)
    sample = np.repeat(np.arange(batch), occupied)
    slot = np.arange(voxels.size) - start[sample]
    fits = slot < capacity
    row, column = sample[fits], slot[fits]
    table = np.full((batch, 1, capacity), grid, np.int32)
    table[row, 0, column] = (voxels - sample * grid)[fits]
    values = np.zeros((batch, features.shape[1], capacity), features.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities, as silent as in JAX
        for channel, feature in enumerate(features.T):
            reduced = _reduce_with_numpy(feature[real], voxel, voxels.size, config.reduce)
            values[row, channel, column] = reduced[fits]
    slots = np.full(batch_index.shape, -1, np.int32)
    slots[real] = np.where(fits, slot, -1)[voxel]
    excess = np.maximum(occupied - capacity, 0).astype(np.int32)
    return SparseTensor(table, values, config.spatial_shape), excess, slots  # type: ignore[arg-type]


def _distinct(keys: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of keys in [0, bound), ascending, and for each key which of them it is."""
    # A table of all keys is several times as quick as a sort, unless it is mostly empty, or huge.
    if bound > min(128 * keys.size, 2**27):
        return np.unique(keys, return_inverse=True)
    met = np.zeros(bound, bool)
    met[keys] = True
    distinct = np.flatnonzero(met)
    rank = np.empty(bound, np.int32)
    rank[distinct] = np.arange(distinct.size, dtype=np.int32)
    return distinct, rank[keys]


def _reduce_with_numpy(
    feature: np.ndarray, voxel: np.ndarray, voxels: int, reduce: str
) -> np.ndarray:
    """Reduces one feature of the points by voxel, float32[voxels]."""
    add, initial = (np.maximum, -np.inf) if reduce == "max" else (np.add, 0)
    total = np.full(voxels, initial, np.float32)
    add.at(total, voxel, feature.astype(np.float32))  # point by point, as XLA's scatter on the CPU
    if reduce == "mean":
        total /= np.bincount(voxel, minlength=voxels).astype(np.float32)
    return total


# --- JAX -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _with_jax(
    config: _Config, coordinates: jax.Array, features: jax.Array, batch_index: jax.Array
) -> tuple[SparseTensor, jax.Array, jax.Array]:
    """The same in jax.numpy; points outside the grid, outside the batch, or with NaN are dropped."""
    batch_size, capacity, grid = config.batch_size, config.capacity, sites(config.spatial_shape)
    keys = ravel(list(coordinates.T), config.spatial_shape)
    dropped = (keys == grid) | (batch_index < 0) | (batch_index >= batch_size)
    dropped |= jnp.any(jnp.isnan(features), axis=1)
    keys = jnp.where(dropped, grid, keys)
    batch = jnp.where(dropped, batch_size, batch_index)
    # Points of one voxel stand together, and in their order of arrival: sums are repeatable.
    batch, keys, order = jax.lax.sort((batch, keys, jnp.arange(keys.size)), num_keys=2)
    changes = (batch[1:] != batch[:-1]) | (keys[1:] != keys[:-1])
    first = jnp.concatenate([jnp.ones(1, bool), changes])[: keys.size]
    voxel = jnp.cumsum(first) - 1
    # Slot of each voxel in its sample: voxels so far less those of the samples before.
    occupied = jax.ops.segment_sum(first.astype(jnp.int32), batch, batch_size + 1)
    slot = voxel - (jnp.cumsum(occupied) - occupied)[batch]
    inside = (batch < batch_size) & (slot < capacity)
    target = jnp.where(inside, batch * capacity + slot, batch_size * capacity)
    reduced = _reduce_with_jax(features[order], target, batch_size * capacity, config.reduce)
    table = jnp.full(batch_size * capacity, grid, jnp.int32).at[target].set(keys, mode="drop")
    values = jnp.moveaxis(reduced.reshape(batch_size, capacity, -1), 1, 2).astype(features.dtype)
    x = SparseTensor(table.reshape(batch_size, 1, capacity), values, config.spatial_shape)
    slots = jnp.zeros_like(batch).at[order].set(jnp.where(inside, slot, -1).astype(jnp.int32))
    return x, jnp.maximum(occupied[:batch_size] - capacity, 0), slots


def _with_jax_by_sample(
    config: _Config, coordinates: jax.Array, features: jax.Array, batch_index: jax.Array
) -> tuple[SparseTensor, jax.Array, jax.Array]:
    one_sample = functools.partial(_with_jax, config._replace(batch_size=1))
    x, excess, slots = by_sample(one_sample, (coordinates, features), batch_index)
    return SparseTensor(x.keys[:, 0], x.values[:, 0], x.spatial_shape), excess[:, 0], slots


def _reduce_with_jax(features: jax.Array, target: jax.Array, slots: int, reduce: str) -> jax.Array:
    """Reduces the rows of `features` [N, C] by slot; rows whose target is `slots` are dropped."""
    wide = features.astype(jnp.float32)
    if reduce == "max":
        # Differentiable: the gradient goes to the first of the largest, as in max_pool.
        largest = jax.ops.segment_max(jax.lax.stop_gradient(wide), target, slots + 1)
        rows = jnp.arange(target.size)[:, None]
        at_largest = jnp.where(jax.lax.stop_gradient(wide) == largest[target], rows, target.size)
        winner = jax.ops.segment_min(at_largest, target, slots + 1)
        wide = jnp.where(winner[target] == rows, wide, 0)
    total = jax.ops.segment_sum(wide, target, slots + 1)[:slots]
    if reduce == "mean":
        # XLA would multiply by 1 / count, and the mean of 41 ones would not be 1.
        count = jax.ops.segment_sum(jnp.ones(target.shape), target, slots + 1)[:slots, None]
        count = jnp.broadcast_to(jnp.maximum(count, 1), total.shape)
        total /= jax.lax.optimization_barrier(count)
    return total


# --- Checks ----------------------------------------------------------------------------------------


def _check_arguments(
    config: _Config, overflow: str, coordinates: Any, features: Any, batch_index: Any
) -> None:
    """What is known of traced arrays too."""
    spatial_shape, batch_size = config.spatial_shape, config.batch_size
    if config.reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {REDUCTIONS}, got {config.reduce!r}.")
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {OVERFLOWS}, got {overflow!r}.")
    has_batch_axis = coordinates.ndim == 3  # whose length may be a symbol
    if not has_batch_axis and (not isinstance(batch_size, int | np.integer) or batch_size < 1):
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    for name, dtype in (("coordinates", coordinates.dtype), ("batch_index", batch_index.dtype)):
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {dtype}. Round or floor them first.")
    if features.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"features must be float32, bfloat16 or float16, got {features.dtype}. Cast them first; points "
            f"without features take a 1 each, np.ones((N, 1))."
        )
    *points, rank = coordinates.shape or (0,)
    if len(points) not in (1, 2) or rank != len(spatial_shape):
        raise ValueError(
            f"coordinates must have shape [N, {len(spatial_shape)}] or [B, N, {len(spatial_shape)}] for the "
            f"grid {spatial_shape}, got {coordinates.shape}."
        )
    if has_batch_axis and points[0] != batch_size:
        raise ValueError(
            f"batch_size must be the length {points[0]} of the batch axis of coordinates, got {batch_size}."
        )
    if features.shape[:-1] != (*points,) or features.shape[-1:] in ((), (0,)):
        raise ValueError(
            f"features must have shape [{', '.join(map(str, points))}, C], as coordinates, with C at least "
            f"1, got {features.shape}."
        )
    if batch_index.shape != (*points,):
        raise ValueError(
            f"batch_index must have shape {points}, one sample for each point, got {batch_index.shape}."
        )
    if len(points) == 1:
        check_not_split("coordinates", coordinates)


def _check_points(
    config: _Config,
    coordinates: np.ndarray | None,
    features: np.ndarray | None,
    batch_index: np.ndarray | None,
) -> None:
    """What concrete arrays tell, None for a traced one; padding points may hold anything."""
    if batch_index is None:
        return  # any point may be padding
    check_batch_index(batch_index, config.batch_size)
    wrong = np.zeros(batch_index.shape, bool)
    if coordinates is not None:
        for place, size in zip(np.moveaxis(coordinates, -1, 0), config.spatial_shape, strict=True):
            wrong |= (batch_index != -1) & ((place < 0) | (place >= size))
        if wrong.any():
            raise ValueError(
                f"coordinates of point {first(wrong)}, {coordinates[wrong][0].tolist()}, lie outside the "
                f"grid {config.spatial_shape} ({int(wrong.sum())} such points). Shift, scale or drop them "
                f"first; a batch_index of -1 drops a point."
            )
    if features is not None:
        for channel in np.moveaxis(features, -1, 0):
            wrong |= (batch_index != -1) & np.isnan(channel)
        if wrong.any():
            raise ValueError(
                f"features of point {first(wrong)} are NaN ({int(wrong.sum())} such points). "
                "Drop them first: a batch_index of -1 does."
            )
