"""What the benchmarks work on: random grids, thin surfaces, generated solids, real parts, random filters.

Everything is a function of its seed, and nothing is cut: a capacity that is too small is an error.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import ilajax

FEW = 4  # distinct samples of a large batch: drawing takes longer than timing


def random_sites(
    resolution: int,
    channels: int = 1,
    *,
    batch: int = 1,
    density: float | None = None,
    disjoint: bool = False,
    capacity: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> ilajax.SparseTensor:
    """Uniformly random sites of a cubic grid, others for each sample and channel; values in [0.1, 1.1).

    Args:
      batch: number of samples; from the fifth on they repeat.
      density: share of the sites that each channel stores; by default 1 / resolution, a surface's.
      disjoint: whether no site is stored by two channels.
      capacity: slots; by default as many as are stored.
    """
    rng = np.random.default_rng(seed)
    sites = resolution**3
    stored = ilajax.capacity(1 / resolution if density is None else density, (resolution,) * 3)
    samples = []
    for _ in range(min(batch, FEW)):
        if disjoint:
            chosen = rng.choice(sites, stored * channels, replace=False, shuffle=True)
            samples.append(list(np.sort(chosen.reshape(channels, stored), axis=1)))
        else:
            samples.append([np.sort(_some(sites, stored, rng)) for _ in range(channels)])
    return _pack(samples, batch, channels, resolution, rng, capacity, dtype)


def shell(
    resolution: int,
    channels: int = 1,
    *,
    batch: int = 1,
    subset: float | None = 0.6,
    radius: float | None = None,
    capacity: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> ilajax.SparseTensor:
    """The voxels that a sphere's surface meets, 6 pi radius^2 of them, which is a thin surface's density.

    The centre is random, as far as the grid allows. What is not said here is as in `random_sites`.

    Args:
      subset: share of the shell that each channel stores, chosen at random; None: all of it, as a support
        that the channels share.
      radius: in voxels; by default 0.45 * resolution.
    """
    rng = np.random.default_rng(seed)
    radius = 0.45 * resolution if radius is None else radius
    samples = []
    for _ in range(min(batch, FEW)):
        centre = rng.uniform(radius, resolution - radius, 3)
        keys = sphere(resolution, radius, centre)
        if subset is None:
            samples.append([keys])
        else:
            samples.append([keys[rng.random(keys.size) < subset] for _ in range(channels)])
    return _pack(samples, batch, channels, resolution, rng, capacity, dtype)


def near_shell(
    resolution: int,
    channels: int,
    *,
    batch: int = 1,
    density: float,
    subset: float = 0.6,
    seed: int = 0,
) -> ilajax.SparseTensor:
    """What layers make of a shell: each channel stores sites of their own near it, as many as `density` says.

    They are chosen at random among the sites nearest to the sphere, of which they are the share `subset`.
    """
    rng = np.random.default_rng(seed)
    stored = ilajax.capacity(density, (resolution,) * 3)
    near = min(resolution**3, math.ceil(stored / subset))
    samples = []
    for _ in range(min(batch, FEW)):
        radius = 0.45 * resolution
        axes = (
            np.arange(resolution) + 0.5 - c for c in rng.uniform(radius, resolution - radius, 3)
        )
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        distance = np.abs(np.sqrt(x**2 + y**2 + z**2) - radius).ravel()
        keys = np.argpartition(distance, near - 1)[:near]
        samples.append([np.sort(rng.permutation(keys)[:stored]) for _ in range(channels)])
    return _pack(samples, batch, channels, resolution, rng)


def fitting_radius(resolution: int, slots: int) -> float:
    """The radius of a shell that fills nine tenths of `slots`, or the largest that the grid holds."""
    return min(0.45 * resolution, math.sqrt(0.9 * slots / (6 * math.pi)))


def sphere(resolution: int, radius: float, centre: Sequence[float]) -> np.ndarray:
    """Keys of the voxels that a sphere's surface meets, int64 in ascending order."""
    x, y = np.divmod(np.arange(resolution**2), resolution)
    (near_x, far_x), (near_y, far_y) = _reach(x, centre[0]), _reach(y, centre[1])
    near2, far2 = near_x**2 + near_y**2, far_x**2 + far_y**2
    # The part of the upper half that a column of voxels cuts out spans the heights from `low` to `high`;
    # the lower half is its mirror image.
    met = near2 < radius**2
    column = np.flatnonzero(met)
    high = np.sqrt(radius**2 - near2[met])
    low = np.sqrt(np.maximum(0, radius**2 - far2[met]))
    keys = []
    for start, end in ((centre[2] + low, centre[2] + high), (centre[2] - high, centre[2] - low)):
        first = np.floor(start).astype(np.int64).clip(0, resolution - 1)
        count = np.floor(end).astype(np.int64).clip(0, resolution - 1) - first + 1
        before = np.cumsum(count) - count
        height = np.arange(count.sum()) - np.repeat(before - first, count)
        keys.append(np.repeat(column, count) * resolution + height)
    return np.unique(np.concatenate(keys))


def solids(
    resolution: int, *, batch: int = 1, seed: int = 0
) -> tuple[ilajax.SparseTensor, np.ndarray]:
    """Generated meshes: a random solid of `SOLIDS` each, stretched, turned and put into the grid.

    A voxel that the surface meets holds 1. The surface is sampled at about ten points a voxel, so hardly
    one is missed. A seed gives the same solids at every resolution.

    Returns:
      The voxels, [B, r, r, r, 1], and int32[B], which of `SOLIDS` each is.
    """
    rng, surface = np.random.default_rng(seed).spawn(2)
    samplers = list(SOLIDS.values())
    labels = rng.integers(len(samplers), size=batch).astype(np.int32)
    surfaces = (samplers[label](40 * resolution**2, surface) for label in labels)
    return _voxels([_placed(points, resolution, rng) for points in surfaces], resolution), labels


def parts(resolution: int, data_dir: Path, *, batch: int = 1, seed: int = 0) -> ilajax.SparseTensor:
    """Random parts, all different, as voxels that hold 1.

    `data_dir` has a train.npz with `points`, uint16[N, P, 3] over the unit cube.
    """
    with np.load(data_dir / "train.npz") as data:
        points = data["points"]
    chosen = np.random.default_rng(seed).choice(len(points), batch, replace=False)
    return _voxels(points[chosen] * (resolution / 65535), resolution)


def kernel(
    in_channels: int,
    out_channels: int,
    *,
    density: float = 1.0,
    window: Sequence[int] = (3, 3, 3),
    cut: bool = True,
    seed: int = 0,
) -> ilajax.SparseKernel:
    """Normally distributed weights, of which a random share is live.

    With cut=False there are so few positive responses that an output with the input's capacity need not
    choose: all weights are below 0, but for the centre of each filter, which is above.
    """
    rng = np.random.default_rng(seed)
    shape = (*window, in_channels, out_channels)
    weights = rng.normal(size=shape).astype(np.float32)
    mask = rng.random(shape) < density
    if not cut:
        centre = tuple(size // 2 for size in window)
        weights = -np.abs(weights)
        mask[centre] = True
        weights[centre] *= -1
    return ilajax.SparseKernel.from_dense(jnp.asarray(weights), jnp.asarray(mask))


def _reach(voxel: np.ndarray, centre: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest distance of a voxel's points from `centre`, along one axis."""
    before, behind = voxel - centre, voxel + 1 - centre
    return np.maximum(0, np.maximum(before, -behind)), np.maximum(np.abs(before), np.abs(behind))


def _some(sites: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` different sites; of a large grid without a permutation of all of it."""
    if count > sites // 4:
        return rng.choice(sites, count, replace=False)
    chosen = np.unique(rng.integers(0, sites, count + count // 2 + 16))
    return rng.permutation(chosen)[:count]


def _box(count: int, rng: np.random.Generator) -> np.ndarray:
    points = rng.uniform(-1, 1, (count, 3))
    face = rng.integers(3, size=count)
    points[np.arange(count), face] = rng.choice([-1.0, 1.0], count)
    return points


def _ball(count: int, rng: np.random.Generator) -> np.ndarray:
    points = rng.normal(size=(count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _cylinder(count: int, rng: np.random.Generator) -> np.ndarray:
    """Radius 1, height 2: the side has twice the area of the two lids."""
    side = rng.random(count) < 2 / 3
    radius = np.where(side, 1, np.sqrt(rng.random(count)))
    height = np.where(side, rng.uniform(-1, 1, count), rng.choice([-1.0, 1.0], count))
    return _around(radius, height, rng)


def _cone(count: int, rng: np.random.Generator) -> np.ndarray:
    """Radius 1, height 2: the side has sqrt(5) times the area of the base."""
    side = rng.random(count) < math.sqrt(5) / (1 + math.sqrt(5))
    radius = np.sqrt(rng.random(count))
    return _around(radius, np.where(side, 1 - 2 * radius, -1), rng)


def _torus(count: int, rng: np.random.Generator, tube: float = 0.35) -> np.ndarray:
    """The area of a strip around the tube goes with its distance from the axis."""
    angle = rng.uniform(0, 2 * np.pi, 2 * count)
    kept = rng.random(2 * count) < (1 + tube * np.cos(angle)) / (1 + tube)
    angle = np.resize(angle[kept], count)
    return _around(1 + tube * np.cos(angle), tube * np.sin(angle), rng)


def _around(radius: np.ndarray, height: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points at random angles around the last axis."""
    angle = rng.uniform(0, 2 * np.pi, radius.size)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


# Name -> a sampler of its surface: (count, generator) -> points, float[count, 3], about the origin.
SOLIDS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "box": _box,
    "ball": _ball,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
}


def _placed(points: np.ndarray, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """Stretched by up to two, turned, and scaled to nine tenths of the grid or somewhat less."""
    stretched = points * rng.uniform(0.5, 1, 3)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turned = stretched @ rotation
    low, high = turned.min(axis=0), turned.max(axis=0)
    scale = rng.uniform(0.7, 0.9) / (high - low).max()
    return ((turned - (low + high) / 2) * scale + 0.5) * resolution


def _voxels(points: Iterable[np.ndarray], resolution: int) -> ilajax.SparseTensor:
    """The voxels, of one channel, that hold points; coordinates are in voxels."""
    keys = []
    for position in points:
        x, y, z = np.floor(position).astype(np.int64).clip(0, resolution - 1).T
        keys.append([np.unique((x * resolution + y) * resolution + z)])
    return _pack(keys, len(keys), 1, resolution, np.random.default_rng(0)).map(jnp.ones_like)


def _pack(
    samples: Sequence[Sequence[np.ndarray]],
    batch: int,
    channels: int,
    resolution: int,
    rng: np.random.Generator,
    capacity: int | None = None,
    dtype: str = "float32",
) -> ilajax.SparseTensor:
    """Random values at the keys of each (sample, channel), or (sample, all channels); samples repeat."""
    most = max(1, *(len(keys) for sample in samples for keys in sample))
    slots = most if capacity is None else capacity
    if slots < most:
        raise ValueError(f"capacity must be at least {most}, which is what is stored, got {slots}.")
    sites = resolution**3
    keys = np.full((len(samples), len(samples[0]), slots), sites, np.int32)
    for b, sample in enumerate(samples):
        for c, chosen in enumerate(sample):
            keys[b, c, : len(chosen)] = chosen
    values = rng.random((len(samples), channels, slots), np.float32) + np.float32(0.1)
    values *= keys < sites
    order = np.arange(batch) % len(samples)
    return ilajax.SparseTensor(
        jnp.asarray(keys[order]), jnp.asarray(values[order], dtype), (resolution,) * 3
    )
