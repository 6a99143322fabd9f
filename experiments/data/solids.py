"""Eight classes of solids, made on the spot: their surfaces as voxels of a cubic grid, turned at random."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from benchmarks import workloads

Surface = Callable[[int, np.random.Generator], np.ndarray]

# As shares of the grid's edge: a solid's radius, and how far it is moved from the middle along each axis.
RADIUS = (0.22, 0.31)
SHIFT = 0.08
# Each axis is shrunk by up to this; then a solid turns about the vertical, and leans over by up to so much.
STRETCH = 0.7
LEAN = math.radians(20)
POINTS_PER_VOXEL = 8


@dataclasses.dataclass(frozen=True)
class Solids:
    """Some solids, in a grid of `resolution` voxels along each of the three axes, r."""

    keys: np.ndarray  # int32[N, slots], the voxels that each meets, ascending; then padding, r^3
    labels: np.ndarray  # int32[N], which of `CLASSES` each is
    resolution: int

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> np.ndarray:
        """int[N], how many voxels each surface meets."""
        return (self.keys < self.resolution**3).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class SparseInput:
    """Keys, int32[B, slots], as a sparse tensor of one channel that holds 1; hashable, for jit."""

    resolution: int

    def __call__(self, keys: jax.Array) -> ilajax.SparseTensor:
        shape = (self.resolution,) * 3
        stored = (keys < self.resolution**3).astype(jnp.float32)
        return ilajax.SparseTensor(keys[:, None], stored[:, None], shape)


def slots(resolution: int) -> int:
    """Slots that every solid fits in: 2.9 % of 64^3 sites; a surface's density goes with 1 / resolution."""
    return ilajax.capacity(min(1.0, 1.88 / resolution), (resolution,) * 3)


def make_solids(count: int, resolution: int, *, seed: int) -> Solids:
    """Random solids, equally many of each class.

    A sampled surface is stretched by up to two, turned, scaled and moved. There are about eight points for
    a voxel, so that hardly one is missed. The classes take turns; the first solids of a longer list are those
    of a shorter one.
    """
    keys = np.full((count, slots(resolution)), resolution**3, np.int32)
    labels = np.arange(count, dtype=np.int32) % len(CLASSES)
    for number, label in enumerate(labels):
        rng = np.random.default_rng([seed, number])
        found = _voxels(SURFACES[CLASSES[label]], resolution, rng)
        keys[number, : len(found)] = found
    return Solids(keys, labels, resolution)


def _voxels(surface: Surface, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """Keys of the voxels that a surface's points lie in, ascending."""
    radius = rng.uniform(*RADIUS) * resolution
    # A ball's surface meets 6 pi radius^2 voxels, and no other solid's in the ball meets more.
    points = surface(int(POINTS_PER_VOXEL * 6 * math.pi * radius**2), rng)
    turned = points * rng.uniform(STRETCH, 1, 3) @ _turn(rng)
    scaled = turned * (radius / np.linalg.norm(turned, axis=1).max())
    moved = scaled + resolution * (0.5 + rng.uniform(-SHIFT, SHIFT, 3))
    x, y, z = np.floor(moved).astype(np.int64).clip(0, resolution - 1).T
    met = np.zeros(resolution**3, bool)
    met[(x * resolution + y) * resolution + z] = True
    return np.flatnonzero(met)


def _turn(rng: np.random.Generator) -> np.ndarray:
    """A rotation about the vertical, then one by at most `LEAN` about a horizontal axis, and one more."""

    def about(axis: int, angle: float) -> np.ndarray:
        matrix = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
        return matrix

    first, lean, last = (rng.uniform(0, most) for most in (2 * math.pi, LEAN, 2 * math.pi))
    return about(2, first) @ about(0, lean) @ about(2, last)


def _pyramid(count: int, rng: np.random.Generator) -> np.ndarray:
    """Over a square of edge 2, height 2: the sides have sqrt(5) times the area of the base."""
    side = rng.random(count) < math.sqrt(5) / (1 + math.sqrt(5))
    out = np.where(side, np.sqrt(rng.random(count)), rng.uniform(-1, 1, count))
    along = rng.uniform(-1, 1, count) * np.where(side, out, 1)
    quarter = rng.integers(4, size=count) * (np.pi / 2)
    x, y = np.cos(quarter), np.sin(quarter)
    height = np.where(side, 1 - 2 * out, -1)
    return np.stack([x * out - y * along, y * out + x * along, height], axis=1)


def _helix(
    count: int, rng: np.random.Generator, tube: float = 0.2, turns: float = 2.0
) -> np.ndarray:
    """A tube around the last axis, without lids."""
    t, angle = rng.uniform(-np.pi * turns, np.pi * turns, count), rng.uniform(0, 2 * np.pi, count)
    rise = 1.3 / (np.pi * turns)
    outward = np.stack([np.cos(t), np.sin(t), np.zeros(count)], axis=1)
    upward = np.stack([-rise * np.sin(t), rise * np.cos(t), -np.ones(count)], axis=1)
    upward /= math.hypot(rise, 1)
    centre = outward + np.outer(rise * t, (0, 0, 1))
    return centre + tube * (np.cos(angle)[:, None] * outward + np.sin(angle)[:, None] * upward)


def _cross(count: int, rng: np.random.Generator, half: float = 0.25) -> np.ndarray:
    """Three bars along the axes, from -1 to 1; what lies inside of another bar is left out."""
    total = 2 * count
    is_side = rng.random(total) < 2 / (2 + half)
    along = np.where(is_side, rng.uniform(-1, 1, total), rng.choice([-1.0, 1.0], total))
    across = rng.uniform(-half, half, (total, 2))
    rim = rng.integers(2, size=total)
    chosen = np.flatnonzero(is_side)
    across[chosen, rim[chosen]] = rng.choice([-half, half], len(chosen))
    points = np.column_stack([along, across])
    turned = (np.arange(3) + rng.integers(3, size=(total, 1))) % 3
    points = np.take_along_axis(points, turned, axis=1)
    inside = (np.abs(points) < half * (1 - 1e-9)).sum(axis=1) == 2
    return np.resize(points[~inside], (count, 3))


SURFACES: dict[str, Surface] = {
    **workloads.SOLIDS,
    "pyramid": _pyramid,
    "helix": _helix,
    "cross": _cross,
}
CLASSES = list(SURFACES)
