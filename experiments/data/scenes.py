"""Rooms with furniture, made on the spot, as the points that a few scanners see: a label for each point.

A scene depends on its seed and number alone, and takes about 20 ms, so that it is made whenever it is asked
for, by whichever process makes the batch. Nothing here touches JAX.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import ilajax
from experiments.data.loader import Batch
from experiments.data.rooms import CLASSES, Part, furnished, turn
from ilajax.ops.k_select import check_capacity

EXTENT = (6.4, 6.4, 3.2)  # metres of the grid, which holds every room
FEATURES = 5  # of a point: 1, its height above the floor, and its normal
# Rays are normals of this mean and deviation: most go sideways and somewhat down, where the furniture is.
AIM, SPREAD = (0, 0, -0.2), (1, 1, 0.6)
RANGE_NOISE = 0.01  # metres along the ray, a standard deviation
NORMAL_NOISE = 0.2  # of each coordinate of a unit normal
DROPPED = 0.3  # the largest share of rays that come back with nothing


class Scene(NamedTuple):
    """What the scanners see of a room, in metres; the solids and all else are for tests and pictures."""

    points: np.ndarray  # float32[N, 3], N at most the rays
    normals: np.ndarray  # float32[N, 3], of length 1, noisy, towards the scanner
    labels: np.ndarray  # int32[N], index into `CLASSES`
    scanner: np.ndarray  # int[N], which scanner saw the point
    scanners: np.ndarray  # float[S, 3]
    low: np.ndarray  # float[3], the room's lower corner
    high: np.ndarray  # float[3]
    parts: list[Part]

    def features(self) -> np.ndarray:
        """float32[N, FEATURES]: 1, the height above the floor, the normal."""
        height = self.points[:, 2:] - np.float32(self.low[2])
        return np.concatenate([np.ones_like(height), height, self.normals], axis=1)


class Clouds(NamedTuple):
    """A batch of scenes as a network takes it."""

    voxels: Any  # SparseTensor [B, R, R, R / 2, FEATURES], a shared support
    points: np.ndarray  # float32[B, P, 3], in voxels; 0 in padding
    present: np.ndarray  # bool[B, P], False in padding


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """A source of training batches of scenes on a grid; unless it `repeats`, each epoch has new ones."""

    count: int  # scenes of an epoch
    rays: int  # of a scene, and slots for its points
    resolution: int  # of the two horizontal axes; the vertical one has half of it
    capacity: int  # voxels of a scene that are kept
    seed: int
    repeats: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 2 or self.resolution % 2:
            raise ValueError(f"resolution must be an even number, got {self.resolution}.")
        check_capacity(self.capacity)

    def __len__(self) -> int:
        return self.count

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        return (self.resolution, self.resolution, self.resolution // 2)

    def scene(self, index: int, epoch: int = 1) -> Scene:
        """A scene of an epoch, the first by default."""
        number = index if self.repeats else (epoch - 1) * self.count + index
        return make_scene(self.seed, number, self.rays)

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        """Inputs are `Clouds`, labels int32[B, P] with -1 in padding."""
        scenes = [self.scene(index, epoch) for index in chosen.tolist()]
        edge = EXTENT[0] / self.resolution
        voxels = ilajax.data.voxelize(
            [scene.points for scene in scenes],
            [scene.features() for scene in scenes],
            spatial_shape=self.spatial_shape,
            capacity=self.capacity,
            voxel_size=edge,
            origin=(0.0, 0.0, 0.0),
        )
        points = np.zeros((len(scenes), self.rays, 3), np.float32)
        labels = np.full((len(scenes), self.rays), -1, np.int32)
        for row, scene in enumerate(scenes):
            points[row, : len(scene.points)] = scene.points / edge
            labels[row, : len(scene.labels)] = scene.labels
        return Batch(Clouds(voxels.tensor, points, labels >= 0), labels, voxels.overflow)


def make_scene(seed: int, number: int, rays: int) -> Scene:
    """A room of 4 to 6 by 3 to 5 metres, furnished, and what two or three scanners see of it.

    Each ray brings back the point where it first meets a solid, so that what stands behind another thing is
    missing, and far surfaces have fewer points.
    """
    rng = np.random.default_rng([seed, number])
    size = rng.uniform((4, 3, 2.4), (6, 5, 3))
    low = rng.uniform(0.1, np.array(EXTENT) - size - 0.1)
    scanners, parts = furnished(size, rng)
    scanners = scanners + low
    parts = [part._replace(centre=part.centre + low) for part in parts]

    scanner = rng.integers(len(scanners), size=rays)
    start = scanners[scanner]
    ray = _unit(rng.normal(AIM, SPREAD, (rays, 3)))
    far, normals, labels = _walls(start, ray, low, low + size)
    for part in parts:
        _meet(part, start, ray, far, normals, labels)
    points = start + (far + rng.normal(scale=RANGE_NOISE, size=rays))[:, None] * ray
    normals = _unit(normals + rng.normal(scale=NORMAL_NOISE, size=(rays, 3)))
    kept = rng.random(rays) >= rng.uniform(0, DROPPED)
    return Scene(
        points[kept].astype(np.float32),
        normals[kept].astype(np.float32),
        labels[kept].astype(np.int32),
        scanner[kept],
        scanners,
        low,
        low + size,
        parts,
    )


# ---- What the rays meet.


def _walls(
    start: np.ndarray, ray: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays from inside of the room leave it: distances, normals, labels."""
    out = np.maximum((low - start) / ray, (high - start) / ray)
    axis = out.argmin(axis=1)
    each = np.arange(len(ray))
    normals = np.zeros_like(ray)
    normals[each, axis] = -np.sign(ray[each, axis])
    flat = np.where(ray[:, 2] < 0, CLASSES.index("floor"), CLASSES.index("ceiling"))
    return out[each, axis], normals, np.where(axis == 2, flat, CLASSES.index("wall"))


def _meet(
    part: Part,
    start: np.ndarray,
    ray: np.ndarray,
    far: np.ndarray,
    normals: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Stops those rays at a part that meet it before anything else: changes the last three arrays."""
    # Only rays that pass its bounding ball are looked at in detail.
    offset = start - part.centre
    along = np.einsum("na,na->n", offset, ray)
    miss = np.einsum("na,na->n", offset, offset) - along**2
    reach = part.half @ part.half
    near = np.flatnonzero((miss <= reach) & (along < math.sqrt(reach)))
    turned = turn(-part.angle)
    # In units of half its size each box is a cube from -1 to 1, each ball of radius 1, and so on.
    o, d = (a[near] @ turned.T / part.half for a in (offset, ray))
    into, out, normal = SHAPES[part.shape](o, d)
    hit = (into <= out) & (into > 0) & (into < far[near])
    chosen = near[hit]
    far[chosen] = into[hit]
    normals[chosen] = _unit(normal(o[hit] + into[hit, None] * d[hit]) / part.half) @ turned
    labels[chosen] = part.label


# Of rays o + t d: the t at which they enter and leave, and a function from points where they enter to the
# normals there. A ray that misses leaves before it enters.
Entered = tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]


def _box(o: np.ndarray, d: np.ndarray) -> Entered:
    near, far = _slab(o, d)

    def normal(point: np.ndarray) -> np.ndarray:
        face = np.abs(point).argmax(axis=1)[:, None] == np.arange(3)
        return np.sign(point) * face

    return near.max(axis=1), far.min(axis=1), normal


def _ball(o: np.ndarray, d: np.ndarray) -> Entered:
    near, far = _round(o, d)
    return near, far, lambda point: point


def _cylinder(o: np.ndarray, d: np.ndarray) -> Entered:
    """Upright, with lids."""
    near, far = _round(o[:, :2], d[:, :2])
    below, above = _slab(o[:, 2], d[:, 2])

    def normal(point: np.ndarray) -> np.ndarray:
        lid = np.abs(point[:, 2]) > np.hypot(point[:, 0], point[:, 1])
        return np.where(lid[:, None], (0, 0, 1), (1, 1, 0)) * point

    return np.maximum(near, below), np.minimum(far, above), normal


def _slab(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, other = (-1 - o) / d, (1 - o) / d
    return np.minimum(one, other), np.maximum(one, other)


def _round(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = np.einsum("na,na->n", d, d)
    b = np.einsum("na,na->n", o, d)
    c = np.einsum("na,na->n", o, o) - 1
    inner = b * b - a * c
    root = np.sqrt(np.maximum(inner, 0))
    return np.where(inner < 0, np.inf, (-b - root) / a), (-b + root) / a


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], Entered]] = {
    "box": _box,
    "cylinder": _cylinder,
    "ball": _ball,
}


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
