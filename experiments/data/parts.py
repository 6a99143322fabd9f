"""Shapes as voxels that say where in them the surface lies, varied without being turned."""

import dataclasses
from typing import Any

import jax
import numpy as np

import ilajax
from experiments.data.augment import INWARD, Pose
from experiments.data.loader import Batch, Source
from experiments.data.voxels import unit_grid

FEATURES = 4
SHRINK = 0.15
AT_ONCE = 64  # samples that `whole` makes in one go


@dataclasses.dataclass(frozen=True)
class Parts:
    """The samples of a `VoxelSource`, with four features in each voxel.

    The first is 1. The others say where in the voxel its points lie: their mean less its centre, in voxels.
    That is the geometry which a coarse grid rounds away.

    With a seed, samples vary from epoch to epoch: each axis is shrunk by a factor of its own, the shape moved
    within what that leaves free, and x and y are mirrored with a chance of a half. None is turned: which way
    a part lies tells its class, as libraries draw pin headers along y and terminal blocks along x.
    """

    samples: Any  # a `VoxelSource`; how its samples stand is said here
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        positions = [self._positions(index, epoch) for index in chosen.tolist()]
        features = [_features(position) for position in positions]
        grid = unit_grid(self.samples.resolution)
        voxels = ilajax.data.voxelize(positions, features, capacity=self.samples.capacity, **grid)
        return Batch(voxels.tensor, self.samples.sets.label[chosen], voxels.overflow)

    def _positions(self, index: int, epoch: int) -> np.ndarray:
        resolution = self.samples.resolution
        position = self.samples.sets.positions(index, Pose(), resolution)
        if self.seed is None:
            return position
        rng = np.random.default_rng([self.seed, epoch, index])
        scale = rng.uniform(1 - SHRINK, 1, 3)
        position = position * scale + rng.uniform(0, resolution * (1 - scale))
        mirrored = np.append(rng.random(2) < 0.5, False)
        position = np.where(mirrored, resolution - position, position)
        # What was at 0 comes to the upper border when it is mirrored.
        return position.clip(0, resolution - INWARD)


def whole(source: Source) -> Batch:
    """All samples of a source; made in parts, as the points of all clouds may not fit into memory."""
    parts = -(-len(source) // AT_ONCE)
    batches = [source.batch(part, 0) for part in np.array_split(np.arange(len(source)), parts)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def _features(position: np.ndarray) -> np.ndarray:
    offset = position - np.floor(position) - 0.5
    return np.concatenate([np.ones((len(offset), 1)), offset], axis=1).astype(np.float32)
