"""Point clouds to a batch of voxels. Nothing here touches JAX: any worker process may run it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ilajax.data._place import axes_first, column, in_voxels, spacing
from ilajax.geometry import check_spatial_shape
from ilajax.ops.points import from_points
from ilajax.sparse_tensor import SparseTensor


class Voxels(NamedTuple):
    """A batch of clouds on a grid, and what became of their points.

    Attributes:
      tensor: the features of each voxel, one shared support, NumPy arrays. Sample i is cloud i.
      slots: for each cloud an int32[N_i], the slot of each point's voxel; -1 if the point is outside the
        grid or its voxel did not fit. The features of the others are `tensor.values[i][:, slots[i]]`.
      labels: int32[B, K], the most frequent label of the points of a voxel, the lowest one in a tie; -1 in
        padding and if no point has a label. None if no labels were given.
      overflow: int32[B], voxels that did not fit into the capacity; those with the lowest keys stayed.
      outside: int32[B], points outside the grid.
    """

    tensor: SparseTensor
    slots: list[np.ndarray]
    labels: np.ndarray | None
    overflow: np.ndarray
    outside: np.ndarray


def voxelize(
    clouds: Sequence[Any],
    features: Sequence[Any] | None = None,
    *,
    spatial_shape: Sequence[int],
    capacity: int,
    voxel_size: float | Sequence[float] | None = None,
    origin: Sequence[float] | None = None,
    reduce: str = "mean",
    labels: Sequence[Any] | None = None,
) -> Voxels:
    """Puts clouds of any number of points on a grid, as one batch of fixed shape.

    A point p is in the voxel `floor((p - origin) / voxel_size)`, computed in float64. Without a `voxel_size`,
    each cloud has its own, the same on every axis: the smallest at which the cloud fits into the grid, with
    the cloud in the middle. Points on an upper border then belong to the last voxel, and none is outside.

    It needs only NumPy and takes milliseconds, so it can run in forked and in spawned workers. Look at
    `overflow` and `outside`: they count what the capacity and the grid cut off.

    Args:
      clouds: arrays float[N_i, d] of positions; a cloud without points is an empty sample.
      features: arrays float32, bfloat16 or float16 [N_i, C], one for each cloud; by default a 1 for each
        point, so every occupied voxel holds a 1 (with reduce="sum" its number of points).
      spatial_shape: the grid, d axes.
      capacity: slots of each sample.
      voxel_size: edge of a voxel, in the unit of the clouds: one number, or one for each axis.
      origin: lower corner of the grid, one number for each axis, the same for all clouds; by default each
        cloud's own minimum. Only with `voxel_size`. Points outside the grid are dropped.
      reduce: "mean", "sum" or "max" over the features of the points of one voxel.
      labels: arrays int[N_i] of classes, one for each cloud; -1 for a point without a label, which has no
        vote.

    Returns:
      Voxels: tensor, slots, labels, overflow, outside.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, shape or value, or a position is NaN or
        infinite.

    Example:
      >>> clouds = [np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([[5.0, 5.0]])]
      >>> batch = ilajax.data.voxelize(clouds, spatial_shape=(4, 4), capacity=3)
      >>> batch.tensor.coordinates()[0, 0]
      array([[1, 0],
             [3, 3],
             [4, 4]], dtype=int32)
      >>> batch.slots
      [array([0, 1], dtype=int32), array([0], dtype=int32)]
    """
    spatial_shape = check_spatial_shape(spatial_shape)
    rank = len(spatial_shape)
    positions = [axes_first(f"clouds[{i}]", cloud, rank) for i, cloud in enumerate(clouds)]
    if not positions:
        raise ValueError("clouds must hold at least one cloud, got none.")
    grid = spacing(voxel_size, origin, rank)
    sizes = [p.shape[1] for p in positions]
    sample = np.repeat(np.arange(len(sizes)), sizes)
    if features is None:
        channels = np.ones((len(sample), 1), np.float32)
    else:
        channels = _joined("features", features, sizes, "[N, C]")
        _check_features(channels, sample)
    # Cloud by cloud, so that what belongs to one stays in the cache.
    packed, outside = [], []
    for points, rows in zip(positions, np.split(channels, np.cumsum(sizes)[:-1]), strict=True):
        place = np.floor(in_voxels(points, spatial_shape, grid))
        if grid.edge is None:
            place = place.clip(0, column(spatial_shape) - 1)
        inside = ((place >= 0) & (place < column(spatial_shape))).all(axis=0)
        outside.append(np.count_nonzero(~inside))
        packed.append(
            from_points(
                np.where(inside, place, 0).astype(np.int32).T,
                rows,
                np.where(inside, 0, -1),
                spatial_shape=spatial_shape,
                batch_size=1,
                capacity=capacity,
                reduce=reduce,
                overflow="drop",
                return_overflow=True,
                return_slots=True,
            )
        )
    tensors, overflow, slots = zip(*packed, strict=True)
    keys: Any = np.concatenate([x.keys for x in tensors])
    values: Any = np.concatenate([x.values for x in tensors])
    majority = None
    if labels is not None:
        voters = _joined("labels", labels, sizes, "[N]")
        majority = _majority(voters, sample, np.concatenate(slots), (len(sizes), capacity))
    return Voxels(
        SparseTensor(keys, values, spatial_shape),
        list(slots),
        majority,
        np.concatenate(overflow),
        np.array(outside, np.int32),
    )


def _joined(argument: str, parts: Sequence[Any], sizes: list[int], axes: str) -> np.ndarray:
    """The parts, concatenated; each must have a row for each point of its cloud."""
    arrays = [np.asarray(part) for part in parts]
    if len(arrays) != len(sizes):
        raise ValueError(
            f"{argument} must hold one array for each cloud, {len(sizes)} in all, got {len(arrays)}."
        )
    rank = len(axes.split(","))
    for i, (array, size) in enumerate(zip(arrays, sizes, strict=True)):
        if array.ndim != rank or array.shape != (size, *arrays[0].shape[1:]):
            raise ValueError(
                f"{argument}[{i}] must have shape {axes}, N = {size} as in clouds[{i}], all else as in "
                f"{argument}[0], got {array.shape}."
            )
    # An empty cloud's list of labels has the dtype of floats.
    return np.concatenate([array for array in arrays if len(array)] or arrays)


def _check_features(features: np.ndarray, sample: np.ndarray) -> None:
    # Only NaN differs from itself; isnan fails on strings, which are rejected later.
    nan = (features != features).any(axis=1)
    if nan.any():
        row = int(np.argmax(nan))
        cloud = sample[row]
        raise ValueError(
            f"features[{cloud}] of point {row - int(np.argmax(sample == cloud))} are NaN "
            f"({int(nan.sum())} such points in all). Drop them first."
        )


def _majority(
    labels: np.ndarray, sample: np.ndarray, slots: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """The most frequent label of each slot, int32[B, K]."""
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if labels.size and (labels.min() < -1 or labels.max() >= 2**31 - 1):
        raise ValueError(
            f"labels must lie in [0, 2**31 - 2], or be -1 for a point without one, got "
            f"{labels.min()} to {labels.max()}."
        )
    voted = (labels >= 0) & (slots >= 0)
    voxel = sample[voted] * np.int64(shape[1]) + slots[voted]
    ballots, votes = np.unique(voxel << 31 | labels[voted].astype(np.int64), return_counts=True)
    voxel, label = ballots >> 31, ballots & (2**31 - 1)
    order = np.lexsort((-label, votes, voxel))
    majority = np.full(shape, -1, np.int32)
    majority.flat[voxel[order]] = label[order]  # where an index repeats, the last one stays
    return majority
