"""Positions in units of voxels, for clouds and for meshes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Spacing(NamedTuple):
    """The place of a grid: the edge of a voxel and the lower corner, each float64[d, 1] or None.

    Without an edge, each set of points is scaled into the grid; without a corner, its minimum is used.
    """

    edge: np.ndarray | None
    corner: np.ndarray | None


def spacing(
    voxel_size: float | Sequence[float] | None, origin: Sequence[float] | None, rank: int
) -> Spacing:
    """Checks the arguments about the grid."""
    if voxel_size is None:
        if origin is not None:
            raise ValueError(
                "origin needs a voxel_size: without one each cloud is scaled into the grid. Give both."
            )
        return Spacing(None, None)
    edge = _per_axis("voxel_size", voxel_size, rank)
    if (edge <= 0).any():
        raise ValueError(f"voxel_size must be above 0, got {voxel_size!r}.")
    return Spacing(edge, None if origin is None else _per_axis("origin", origin, rank))


def axes_first(argument: str, positions: Any, rank: int) -> np.ndarray:
    """The positions [N, d] as float64[d, N]: axes first, so that NumPy runs along the points."""
    points = np.asarray(positions)
    if points.size == 0:
        return np.zeros((rank, 0))  # an empty list too
    if points.ndim != 2 or points.shape[1] != rank:
        raise ValueError(
            f"{argument} must have shape [N, {rank}], a position on each axis of the grid, got "
            f"{points.shape}."
        )
    try:
        axes = points.T.astype(np.float64, order="C", casting="same_kind")
    except TypeError:
        raise TypeError(f"{argument} must hold numbers, got {points.dtype}.") from None
    wrong = ~np.isfinite(axes).all(axis=0)
    if wrong.any():
        point = int(np.argmax(wrong))
        raise ValueError(
            f"{argument} has a position that is not finite, {points[point].tolist()}, at point {point} "
            f"({int(wrong.sum())} such points). Drop them first."
        )
    return axes


def in_voxels(points: np.ndarray, spatial_shape: tuple[int, ...], grid: Spacing) -> np.ndarray:
    """Positions float64[d, N] in units of voxels from the grid's lower corner.

    Points that are scaled into the grid lie in [0, extent]; those on the upper border belong to the last
    voxel.
    """
    if not points.size:
        return points
    low = points.min(axis=1, keepdims=True)
    if grid.edge is not None:
        return (points - (low if grid.corner is None else grid.corner)) / grid.edge
    extent = column(spatial_shape)
    box = points.max(axis=1, keepdims=True) - low
    edge = (box / extent).max() or 1.0  # if all points are in one place: the middle of the grid
    return ((points - low) / edge + (extent - box / edge) / 2).clip(0, extent)


def column(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers)[:, None]


def _per_axis(argument: str, value: Any, rank: int) -> np.ndarray:
    """float64[d, 1]."""
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), (rank,))
    except (TypeError, ValueError):
        numbers = np.array([np.nan])
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{argument} must be a finite number, or {rank} of them, one for each axis, got {value!r}."
        )
    return numbers[:, None]
