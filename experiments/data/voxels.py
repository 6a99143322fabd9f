"""What clouds and meshes have in common as sources of training batches: each sample is scaled into a grid."""

import dataclasses
from typing import Any

import numpy as np

import ilajax
from experiments.data.augment import Pose, pose
from experiments.data.loader import Batch
from ilajax.geometry import check_spatial_shape
from ilajax.ops.k_select import check_capacity


@dataclasses.dataclass(frozen=True)
class VoxelSource:
    """A source of training batches: the samples of a set, each scaled into a grid, see `Pose.placed`.

    Attributes:
      sets: the samples, with a `label`.
      resolution: of each of the three axes of the grid.
      capacity: voxels of a sample that are kept.
      seed: each sample is turned about the vertical and moved, another way in each epoch; None: it stays as
        it is.
      jitter: voxels that a sample is moved by at most, along each axis; as many stay free on each side.
    """

    sets: Any
    resolution: int
    capacity: int
    seed: int | None = None
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_grid(self.resolution, self.capacity, self.jitter)

    def __len__(self) -> int:
        return len(self.sets)

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        positions = [
            self._positions(int(index), pose(self.seed, epoch, int(index), self.jitter))
            for index in chosen
        ]
        voxels = ilajax.data.voxelize(positions, capacity=self.capacity, **self._grid())
        return Batch(voxels.tensor, self.sets.label[chosen], voxels.overflow)

    def _positions(self, index: int, stands: Pose) -> np.ndarray:
        """Positions in the grid, [N, 3] in voxels, that mark the voxels of a sample."""
        raise NotImplementedError

    def _grid(self) -> dict[str, Any]:
        return {
            "spatial_shape": (self.resolution,) * 3,
            "voxel_size": 1.0,
            "origin": (0.0, 0.0, 0.0),
        }


def check_grid(resolution: int, capacity: int, jitter: float) -> None:
    """Raises TypeError or ValueError unless samples can be placed in a grid, and be packed."""
    if isinstance(resolution, int) and resolution < 1:
        raise ValueError(f"resolution must be at least 1 voxel along each axis, got {resolution}.")
    check_spatial_shape((resolution,) * 3)
    check_capacity(capacity)
    if not 0 <= jitter < resolution / 2:
        raise ValueError(
            f"jitter must be in [0, {resolution / 2:g}), less than half the {resolution} voxels of an axis, "
            f"got {jitter!r}."
        )
