"""How a sample stands in its grid: turned about the vertical, scaled, moved by a few voxels."""

import dataclasses
import math

import numpy as np

# Voxels that a point keeps off the grid's upper border. A surface on the border would lie in the voxel behind
# it. The float next to the border is too near: a test of triangles may round it back. In any grid with keys
# in int32 this is a thousand times a float's spacing, and no voxel changes by it.
INWARD = 2.0**-30


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where a shape stands in a cubic grid."""

    angle: float = 0.0  # radians about the vertical, the last axis; 0 leaves every bit as it is
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in voxels
    margin: float = 0.0  # voxels that stay free at each border, no less than any |shift|

    def __post_init__(self) -> None:
        if not max(map(abs, self.shift)) <= self.margin:
            raise ValueError(
                f"shift must be at most the margin along each axis, {self.margin} voxels, or parts leave the "
                f"grid, got {self.shift}."
            )

    def turned(self, points: np.ndarray) -> np.ndarray:
        """The points [N, 3], x, y and z, turned about the z axis: float64[N, 3]."""
        return self._turned(points).T

    def placed(self, points: np.ndarray, resolution: int) -> np.ndarray:
        """Positions in a grid of `resolution` voxels along each axis, in voxels.

        The points are turned. Then one scale for all axes, so that shapes keep their proportions, lets the
        longest edge of their box reach from border to border, less the margin on both sides. The box is
        centred and moved by the shift. Without a margin that is how `ilajax.data.voxelize` scales a cloud.
        The paper names no normalisation; this one is ours.

        A point on the upper border of the grid belongs to the last voxel, and is moved into it by `INWARD`.
        Points that are all in one place come to the middle of the grid.

        All are in [0, resolution - INWARD]: `floor` gives the voxel.
        """
        position = self._turned(points)
        if not position.size:
            return position.T
        low = position.min(axis=1, keepdims=True)
        box = position.max(axis=1, keepdims=True) - low
        edge = box.max() / (resolution - 2 * self.margin) or 1.0
        position -= low
        position /= edge
        position += (resolution - box / edge) / 2 + np.array(self.shift)[:, None]
        return position.clip(0, resolution - INWARD, out=position).T

    def _turned(self, points: np.ndarray) -> np.ndarray:
        """A new float64[3, N]: axes first, so that NumPy runs along the points."""
        if not self.angle:
            return points.T.astype(np.float64, order="C")
        x, y, z = points.T.astype(np.float64, copy=False)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        axes = np.stack([cos * x, sin * x, z])
        axes[0] -= sin * y
        axes[1] += cos * y
        return axes


def pose(seed: int | None, epoch: int, index: int, jitter: float = 0.0) -> Pose:
    """The pose of a sample in an epoch.

    It is drawn from the arguments alone, so that no worker's past and no resumed run makes a difference.
    Without a seed the sample is neither turned nor moved by its jitter, the most voxels along each axis. The
    margin stays, so that test samples are as large in their grid as training samples.
    """
    if seed is None:
        return Pose(margin=jitter)
    rng = np.random.default_rng([seed, epoch, index])
    angle = rng.uniform(0, 2 * math.pi)
    x, y, z = (rng.uniform(-1, 1, 3) * jitter).tolist()
    return Pose(angle, (x, y, z), jitter)
