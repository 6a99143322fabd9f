"""Clouds and meshes as sources of training batches: each sample is scaled into a grid."""

import dataclasses
from typing import Any

import numpy as np

import ilajax
from experiments.data.augment import pose
from experiments.data.loader import Batch
from ilajax.geometry import check_spatial_shape
from ilajax.ops.k_select import check_capacity


@dataclasses.dataclass(frozen=True)
class VoxelSource:
    """A source of training batches: the samples of a set, each scaled into a grid, see `Pose.placed`.

    With a seed each sample is turned about the vertical and moved, another way in each epoch.
    """

    sets: Any  # the samples, with a `label` and `positions` that mark the voxels of one in a pose
    resolution: int  # of each of the three axes of the grid
    capacity: int  # voxels of a sample that are kept
    seed: int | None = None
    jitter: float = 0.0  # voxels that a sample is moved by at most; as many stay free on each side

    def __post_init__(self) -> None:
        check_grid(self.resolution, self.capacity, self.jitter)

    def __len__(self) -> int:
        return len(self.sets)

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        positions = [
            self.sets.positions(index, pose(self.seed, epoch, index, self.jitter), self.resolution)
            for index in chosen.tolist()
        ]
        grid = unit_grid(self.resolution)
        voxels = ilajax.data.voxelize(positions, capacity=self.capacity, **grid)
        return Batch(voxels.tensor, self.sets.label[chosen], voxels.overflow)


def unit_grid(resolution: int) -> dict[str, Any]:
    """The grid of positions in voxels."""
    return {"spatial_shape": (resolution,) * 3, "voxel_size": 1.0, "origin": (0.0, 0.0, 0.0)}


def check_grid(resolution: int, capacity: int, jitter: float) -> None:
    """Raises TypeError or ValueError unless samples can be placed in a grid, and be packed."""
    check_spatial_shape((resolution,) * 3)
    check_capacity(capacity)
    if not 0 <= jitter < resolution / 2:
        raise ValueError(
            f"jitter must be in [0, {resolution / 2:g}), less than half the {resolution} voxels of an axis, "
            f"got {jitter!r}."
        )
