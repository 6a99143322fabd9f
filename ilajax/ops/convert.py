"""Between dense arrays, point sets and sparse tensors."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilajax import ffi
from ilajax.geometry import check_spatial_shape, sites
from ilajax.ops import _plans, _plans_cuda_ops
from ilajax.ops.k_select import Selected, check_capacity, check_select, pad_slots, select_reference
from ilajax.sparse_tensor import VALUE_DTYPES, SparseTensor, check_sparse

REDUCTIONS = ("mean", "sum", "max")


def to_dense(x: SparseTensor) -> jax.Array:
    """The dense array [B, *S, C] of a sparse tensor; its gradient is gathered at the stored keys.

    Raises:
      TypeError: if x is not a SparseTensor.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> ilajax.to_dense(x).shape
      (1, 3, 3, 1)
    """
    check_sparse("x", x)
    planes = _to_dense(x.sites, *ffi.vary_together(x.keys, x.values))
    return jnp.moveaxis(planes, 1, 2).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_dense(sites: int, keys: jax.Array, values: jax.Array) -> jax.Array:
    """[B, C, sites]."""
    return _scatter(sites, keys, values)


def _scatter(sites: int, keys: jax.Array, values: jax.Array) -> jax.Array:
    def native(platform, groups, keys, values):
        outputs = (jax.ShapeDtypeStruct((*values.shape[:2], sites), values.dtype),)
        return ffi.call("ilajax_to_dense_fwd", outputs, keys, values)

    def reference(keys, values):
        keys = jnp.broadcast_to(_drop_outside(keys, sites), values.shape)
        # Mapped over segments, not indexed by them: a sharded batch stays where it is.
        segment = lambda k, v: jnp.zeros(sites, v.dtype).at[k].set(v, mode="drop")  # noqa: E731
        return (jax.vmap(jax.vmap(segment))(keys, values),)

    return ffi.dispatch("ilajax_to_dense_fwd", native, reference, (keys, values), (True, True))[0]


def _gather(sites: int, keys: jax.Array, planes: jax.Array) -> jax.Array:
    def native(platform, groups, keys, planes):
        shape = (*planes.shape[:2], keys.shape[2])
        outputs = (jax.ShapeDtypeStruct(shape, planes.dtype),)
        return ffi.call("ilajax_to_dense_bwd", outputs, keys, planes)

    def reference(keys, planes):
        keys = jnp.broadcast_to(_drop_outside(keys, sites), (*planes.shape[:2], keys.shape[2]))
        return (jnp.take_along_axis(planes, keys, axis=2, mode="fill", fill_value=0),)

    return ffi.dispatch("ilajax_to_dense_bwd", native, reference, (keys, planes), (True, True))[0]


def _drop_outside(keys: jax.Array, sites: int) -> jax.Array:
    # Negative indices would wrap around.
    return jnp.where(keys < 0, sites, keys)


def _to_dense_forward(sites, keys, values):
    return _to_dense(sites, keys, values), keys


def _to_dense_backward(sites, keys, cotangent):
    return None, _gather(sites, keys, cotangent)


_to_dense.defvjp(_to_dense_forward, _to_dense_backward)


def from_dense(x: jax.Array, capacity: int, *, select: str = "magnitude") -> SparseTensor:
    """The non-zeros of a dense array, at most the `capacity` strongest of each sample and channel.

    Its gradient is scattered to the kept sites.

    Args:
      x: float32, bfloat16 or float16 [B, *S, C]; NaN counts as a non-zero.
      capacity: slots of the result.
      select: what is kept where there are more non-zeros than slots, see `k_select`; "positive" keeps
        values above 0 only.

    Returns:
      A SparseTensor that gives each channel its own support. For one support for all channels see
      `from_points`.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, rank or value.

    Example:
      >>> ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3).keys
      Array([[[0, 4, 8]]], dtype=int32)
    """
    if isinstance(x, SparseTensor) or not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"x must be an array [B, *S, C], got {type(x).__name__}.")
    if len(x.shape) < 3:
        raise ValueError(
            f"x must have the axes [B, *S, C] with at least one spatial axis, got shape {x.shape}."
        )
    if x.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"x must be float32, bfloat16 or float16, got {x.dtype}. Cast it, as in x.astype(jnp.float32)."
        )
    spatial_shape = check_spatial_shape(x.shape[1:-1])
    capacity = check_capacity(capacity)
    check_select(select)
    flat = jnp.asarray(x).reshape(x.shape[0], -1, x.shape[-1])
    keys, values = _from_dense(_Config(sites(spatial_shape), capacity, select), flat)
    return SparseTensor(keys, values, spatial_shape)


@dataclasses.dataclass(frozen=True)
class _Config:
    sites: int
    capacity: int
    select: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_dense(config: _Config, x: jax.Array) -> Selected:
    """From [B, sites, C]."""

    def native(platform, groups, x):
        shape = (x.shape[0], x.shape[2], config.capacity)
        if platform == "cuda":
            plan = _plans_cuda_ops.select(x.shape[0] * x.shape[2], x.shape[1])
        else:
            plan = _plans.from_dense(x.shape[0], x.shape[2], config.capacity, x.dtype.itemsize)
        outputs = (
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, x.dtype),
            jax.ShapeDtypeStruct((plan.workspace,), jnp.uint8),
        )
        attributes = {"select": config.select, **plan.attributes}
        return ffi.call("ilajax_from_dense_fwd", outputs, x, **attributes)[:2]

    def reference(x):
        values = jnp.moveaxis(x, 2, 1)
        keys = jnp.broadcast_to(jnp.arange(config.sites, dtype=jnp.int32), values.shape)
        return tuple(
            select_reference(
                keys, values, values != 0, config.sites, config.capacity, config.select
            )
        )

    return Selected(*ffi.dispatch("ilajax_from_dense_fwd", native, reference, (x,), (True,)))


def _from_dense_forward(config, x):
    selected = _from_dense(config, x)
    return selected, selected.keys


def _from_dense_backward(config, keys, cotangents):
    planes = _scatter(config.sites, keys, cotangents.values)
    return (jnp.moveaxis(planes, 1, 2),)


_from_dense.defvjp(_from_dense_forward, _from_dense_backward)


def from_points(
    coordinates: jax.Array,
    features: jax.Array,
    batch_index: jax.Array,
    *,
    spatial_shape: Sequence[int],
    batch_size: int,
    capacity: int,
    reduce: str = "mean",
) -> SparseTensor:
    """Voxelises points with features: one shared support for all channels.

    Plain jax.numpy on every platform: a sort dominates it, XLA has one, and it runs once a batch.

    Args:
      coordinates: int[N, d], the voxel of each point.
      features: float32, bfloat16 or float16 [N, C].
      batch_index: int[N], the sample of each point.
      spatial_shape: the grid, d axes.
      batch_size: number of samples.
      capacity: slots of each sample. Past it the lowest keys stay; concrete input raises instead.
      reduce: "mean", "sum" or "max" over the points of one voxel, channel by channel.

    Returns:
      A SparseTensor with a shared support. Its gradient with respect to the features is that of the
      reduction.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, shape or value; and, where the arrays are
        concrete, for coordinates or batch indices out of range, NaN features, or more occupied voxels than
        slots. Inside `jit` such points are dropped.

    Example:
      >>> x = ilajax.from_points(jnp.array([[0, 1], [0, 1], [2, 2]]), jnp.array([[1.0], [3.0], [5.0]]),
      ...                        jnp.array([0, 0, 0]), spatial_shape=(3, 3), batch_size=1, capacity=4)
      >>> x.values
      Array([[[2., 5., 0., 0.]]], dtype=float32)
    """
    spatial_shape = check_spatial_shape(spatial_shape)
    capacity = check_capacity(capacity)
    # Checked as they come: JAX would wrap 64-bit integers around before anybody has seen them.
    coordinates, batch_index = _as_array(coordinates), _as_array(batch_index)
    features = jnp.asarray(features)
    _check_points(coordinates, features, batch_index, spatial_shape, batch_size, reduce)
    coordinates, batch_index = (
        jnp.asarray(a.astype(jnp.int32)) for a in (coordinates, batch_index)
    )
    features = jnp.asarray(features)
    grid = sites(spatial_shape)
    extent = jnp.array(spatial_shape, jnp.int32)
    dropped = jnp.any((coordinates < 0) | (coordinates >= extent), axis=1)
    dropped |= (batch_index < 0) | (batch_index >= batch_size)
    dropped |= jnp.any(jnp.isnan(features), axis=1)
    keys = jnp.zeros(batch_index.shape, jnp.int32)
    for axis, size in enumerate(spatial_shape):
        keys = keys * size + jnp.clip(coordinates[:, axis], 0, size - 1).astype(jnp.int32)
    keys = jnp.where(dropped, grid, keys)
    batch = jnp.where(dropped, batch_size, batch_index).astype(jnp.int32)
    # Points of one voxel stand together, and in their order of arrival: sums are repeatable.
    batch, keys, order = jax.lax.sort((batch, keys, jnp.arange(keys.size)), num_keys=2)
    first = jnp.concatenate(
        [jnp.ones(1, bool), (batch[1:] != batch[:-1]) | (keys[1:] != keys[:-1])]
    )
    first = first[: keys.size]
    voxel = jnp.cumsum(first) - 1
    # Slot of each voxel in its sample: voxels so far less those of the samples before.
    occupied = jax.ops.segment_sum(first.astype(jnp.int32), batch, batch_size + 1)
    slot = voxel - (jnp.cumsum(occupied) - occupied)[batch]
    if not isinstance(occupied, jax.core.Tracer) and occupied[:batch_size].size:
        _raise_if_full(np.asarray(occupied[:batch_size]), capacity)
    inside = (batch < batch_size) & (slot < capacity)
    target = jnp.where(inside, batch * capacity + slot, batch_size * capacity)
    reduced = _reduce(features[order], target, batch_size * capacity, reduce)
    table = jnp.full(batch_size * capacity, grid, jnp.int32).at[target].set(keys, mode="drop")
    shape = (batch_size, capacity, features.shape[1])
    return SparseTensor(
        table.reshape(batch_size, 1, capacity),
        jnp.moveaxis(reduced.reshape(shape), 1, 2).astype(features.dtype),
        spatial_shape,
    )


def _as_array(a: Any) -> Any:
    return a if isinstance(a, jax.Array) else np.asarray(a)


def _reduce(features: jax.Array, target: jax.Array, slots: int, reduce: str) -> jax.Array:
    """Reduces the rows of `features` [N, C] by slot; rows whose target is `slots` are dropped."""
    wide = features.astype(jnp.float32)
    count = jax.ops.segment_sum(jnp.ones(target.shape), target, slots + 1)[:slots, None]
    if reduce == "max":
        # Differentiable: the gradient goes to the first of the largest, as in max_pool.
        largest = jax.ops.segment_max(jax.lax.stop_gradient(wide), target, slots + 1)
        rows = jnp.arange(target.size)[:, None]
        at_largest = jnp.where(jax.lax.stop_gradient(wide) == largest[target], rows, target.size)
        winner = jax.ops.segment_min(at_largest, target, slots + 1)
        wide = jnp.where(winner[target] == rows, wide, 0)
    total = jax.ops.segment_sum(wide, target, slots + 1)[:slots]
    return total / jnp.maximum(count, 1) if reduce == "mean" else total


def _check_points(
    coordinates: jax.Array,
    features: jax.Array,
    batch_index: jax.Array,
    spatial_shape: tuple[int, ...],
    batch_size: int,
    reduce: str,
) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {REDUCTIONS}, got {reduce!r}.")
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    for name, array in (("coordinates", coordinates), ("batch_index", batch_index)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"{name} must be integers, got {array.dtype}. Round or floor them first."
            )
    if features.dtype not in VALUE_DTYPES:
        raise TypeError(f"features must be float32, bfloat16 or float16, got {features.dtype}.")
    if coordinates.ndim != 2 or coordinates.shape[1] != len(spatial_shape):
        raise ValueError(
            f"coordinates must have shape [N, {len(spatial_shape)}] for the grid {spatial_shape}, got "
            f"{coordinates.shape}."
        )
    if features.ndim != 2 or features.shape[0] != coordinates.shape[0] or features.shape[1] < 1:
        raise ValueError(
            f"features must have shape [N, C] with N = {coordinates.shape[0]} as coordinates and C at least "
            f"1, got {features.shape}."
        )
    if batch_index.shape != coordinates.shape[:1]:
        raise ValueError(
            f"batch_index must have shape [{coordinates.shape[0]}], one sample for each point, got "
            f"{batch_index.shape}."
        )
    if any(isinstance(a, jax.core.Tracer) for a in (coordinates, features, batch_index)):
        return
    place, sample = np.asarray(coordinates), np.asarray(batch_index)
    outside = ((place < 0) | (place >= np.array(spatial_shape))).any(axis=1)
    if outside.any():
        point = int(np.argmax(outside))
        raise ValueError(
            f"coordinates of point {point}, {place[point].tolist()}, lie outside the grid {spatial_shape} "
            f"({int(outside.sum())} such points). Shift, scale or drop them first."
        )
    wrong = (sample < 0) | (sample >= batch_size)
    if wrong.any():
        point = int(np.argmax(wrong))
        raise ValueError(
            f"batch_index of point {point} is {int(sample[point])}, but must lie in [0, {batch_size})."
        )
    nan = np.isnan(np.asarray(features, np.float32)).any(axis=1)
    if nan.any():
        raise ValueError(
            f"features of point {int(np.argmax(nan))} are NaN ({int(nan.sum())} such points). "
            "Drop them first."
        )


def _raise_if_full(occupied: np.ndarray, capacity: int) -> None:
    if occupied.max() > capacity:
        sample = int(occupied.argmax())
        raise ValueError(
            f"capacity is {capacity}, but sample {sample} occupies {int(occupied[sample])} voxels. Raise the "
            f"capacity, use a coarser grid, or call from_points inside jit to keep the lowest keys only."
        )


def concatenate(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """Joins tensors along their channels; the capacity is the largest of theirs.

    Tensors that carry the very same shared keys array keep it, else each channel gets keys of its own.

    Raises:
      TypeError, ValueError: if there is none, or batch sizes, grids or dtypes differ.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> ilajax.concatenate([x, x]).channels
      2
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("tensors must hold at least one SparseTensor, got none.")
    head = tensors[0]
    for i, x in enumerate(tensors):
        check_sparse(f"tensors[{i}]", x)
        for name in ("batch_size", "spatial_shape", "dtype"):
            if getattr(x, name) != getattr(head, name):
                raise ValueError(
                    f"tensors must agree in {name}, got {getattr(head, name)} in tensors[0] and "
                    f"{getattr(x, name)} in tensors[{i}]."
                )
    if all(x.shared and x.keys is head.keys for x in tensors):
        values = [pad_slots(x, x.capacity).values for x in tensors]
        return head.with_values(jnp.concatenate(values, axis=1))
    slots = max(x.capacity for x in tensors)
    padded = [pad_slots(x.unshare(), slots) for x in tensors]
    return SparseTensor(
        jnp.concatenate([x.keys for x in padded], axis=1),
        jnp.concatenate([x.values for x in padded], axis=1),
        head.spatial_shape,
    )
