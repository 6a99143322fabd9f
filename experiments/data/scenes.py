"""Rooms with furniture, made on the spot, as the points that a few scanners see: a label for each point.

A scene depends on its seed and number alone, and takes about 20 ms, so that it is made whenever it is asked
for, by whichever process makes the batch. Nothing here touches JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import ilajax
from experiments.data.loader import Batch
from ilajax.ops.k_select import check_capacity

CLASSES = ("floor", "ceiling", "wall", "table", "chair", "sofa", "cabinet", "lamp")
EXTENT = (6.4, 6.4, 3.2)  # metres of the grid, which holds every room
FEATURES = 5  # of a point: 1, its height above the floor, and its normal
# Rays are normals of this mean and deviation: most go sideways and somewhat down, where the furniture is.
AIM, SPREAD = (0, 0, -0.2), (1, 1, 0.6)
RANGE_NOISE = 0.01  # metres along the ray, a standard deviation
NORMAL_NOISE = 0.2  # of each coordinate of a unit normal
DROPPED = 0.3  # the largest share of rays that come back with nothing
TRIES = 40  # places tried for a piece before it is left out


class Part(NamedTuple):
    """A solid in a scene."""

    shape: str  # of `SHAPES`
    label: int
    centre: np.ndarray  # float[3], metres
    half: np.ndarray  # float[3], half its size along its own axes
    angle: float  # radians that its axes are turned about the vertical


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
    scanners, parts = _furnished(size, rng)
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
    turn = _turn(-part.angle)
    # In units of half its size each box is a cube from -1 to 1, each ball of radius 1, and so on.
    o, d = (a[near] @ turn.T / part.half for a in (offset, ray))
    into, out, normal = SHAPES[part.shape](o, d)
    hit = (into <= out) & (into > 0) & (into < far[near])
    chosen = near[hit]
    far[chosen] = into[hit]
    normals[chosen] = _unit(normal(o[hit] + into[hit, None] * d[hit]) / part.half) @ turn
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


# ---- Furniture. Solids of a piece stand around x = y = 0 on z = 0; the back of a piece is at its lowest y.

Solid = tuple[str, Sequence[float], Sequence[float]]  # shape, lower corner, upper corner of its box


def _table(rng: np.random.Generator) -> list[Solid]:
    """A dining or a low table, on four legs or round on a column."""
    height = rng.uniform(0.68, 0.78) if rng.random() < 0.6 else rng.uniform(0.35, 0.5)
    top = height - rng.uniform(0.03, 0.06)
    if rng.random() < 0.4:
        radius = rng.uniform(0.35, 0.65)
        return [
            _upright(radius, top, height),
            _upright(rng.uniform(0.03, 0.08), 0, top),
            _upright(0.6 * radius, 0, 0.04),
        ]
    x, y = rng.uniform(0.45, 0.85), rng.uniform(0.3, 0.5)
    return [("box", (-x, -y, top), (x, y, height)), *_legs(x, y, top, rng.uniform(0.04, 0.07))]


def _chair(rng: np.random.Generator) -> list[Solid]:
    """On four legs or on a column, always with a back."""
    half, seat, top = rng.uniform(0.2, 0.25), rng.uniform(0.42, 0.5), rng.uniform(0.8, 1.05)
    under = seat - rng.uniform(0.03, 0.08)
    if rng.random() < 0.3:
        stand = [_upright(0.04, 0.05, under), _upright(half, 0, 0.06)]
    else:
        stand = _legs(half, half, under, 0.04)
    back = rng.uniform(0.03, 0.06)
    return [
        ("box", (-half, -half, under), (half, half, seat)),
        ("box", (-half, -half, seat), (half, back - half, top)),
        *stand,
    ]


def _sofa(rng: np.random.Generator) -> list[Solid]:
    """From an armchair to one for three, with arms or without."""
    x, y = rng.uniform(0.4, 1.1), rng.uniform(0.38, 0.5)
    seat, back = rng.uniform(0.35, 0.45), rng.uniform(0.18, 0.28)
    solids: list[Solid] = [
        ("box", (-x, -y, 0), (x, y, seat)),
        ("box", (-x, -y, seat), (x, back - y, rng.uniform(0.7, 0.95))),
    ]
    if rng.random() < 0.8:
        arm, top = rng.uniform(0.12, 0.22), seat + rng.uniform(0.12, 0.25)
        solids += [
            ("box", (-x, back - y, seat), (arm - x, y, top)),
            ("box", (x - arm, back - y, seat), (x, y, top)),
        ]
    return solids


def _cabinet(rng: np.random.Generator) -> list[Solid]:
    """Closed, or open shelves with a back."""
    x, y, top = rng.uniform(0.25, 0.8), rng.uniform(0.15, 0.3), rng.uniform(0.6, 2.1)
    if rng.random() < 0.5:
        return [("box", (-x, -y, 0), (x, y, top))]
    wood = 0.03
    boards = np.linspace(0, top - wood, 2 + int(top / 0.4))
    return [
        ("box", (-x, -y, 0), (x, wood - y, top)),
        ("box", (-x, -y, 0), (wood - x, y, top)),
        ("box", (x - wood, -y, 0), (x, y, top)),
        *(("box", (-x, -y, z), (x, y, z + wood)) for z in boards.tolist()),
    ]


def _standing_lamp(rng: np.random.Generator) -> list[Solid]:
    top, radius = rng.uniform(1.3, 1.8), rng.uniform(0.12, 0.25)
    below = top - rng.uniform(0.2, 0.4)
    return [_shade(radius, below, top, rng), _upright(0.02, 0, below), _upright(0.15, 0, 0.03)]


def _hanging_lamp(rng: np.random.Generator, ceiling: float) -> list[Solid]:
    top, radius = ceiling - rng.uniform(0.2, 0.6), rng.uniform(0.12, 0.3)
    below = top - rng.uniform(0.15, 0.35)
    return [_shade(radius, below, top, rng), _upright(0.015, top, ceiling)]


def _pillar(rng: np.random.Generator, ceiling: float) -> list[Solid]:
    """A piece of wall that stands out as a cabinet does."""
    x, y = rng.uniform(0.12, 0.4), rng.uniform(0.1, 0.25)
    return [("box", (-x, -y, 0), (x, y, ceiling))]


def _shade(radius: float, below: float, top: float, rng: np.random.Generator) -> Solid:
    shape, _, _ = upright = _upright(radius, below, top)
    return ("ball" if rng.random() < 0.4 else shape, *upright[1:])


def _upright(radius: float, below: float, top: float) -> Solid:
    return "cylinder", (-radius, -radius, below), (radius, radius, top)


def _legs(x: float, y: float, top: float, thick: float) -> list[Solid]:
    corners = [(a, b) for a in (-x, x - thick) for b in (-y, y - thick)]
    return [("box", (a, b, 0), (a + thick, b + thick, top)) for a, b in corners]


# ---- Where the furniture stands, in a room whose lower corner is 0.


class _Room:
    """Takes one piece after the other, at places where it meets no other."""

    def __init__(self, size: np.ndarray, rng: np.random.Generator):
        self.size, self.rng = size, rng
        self.parts: list[Part] = []
        self._taken: list[tuple[np.ndarray, float, float]] = []  # corners, lowest and highest z

    def add(
        self, label: str | None, solids: list[Solid], *, at_wall: bool = False
    ) -> np.ndarray | None:
        """The middle of a piece on the floor, [2], or None where there is no place for it.

        Without a label it takes its place and leaves it empty.
        """
        corners = np.array([corner for _, *both in solids for corner in both])
        half = np.abs(corners[:, :2]).max(axis=0)
        low, high = corners[:, 2].min(), corners[:, 2].max()
        for _ in range(TRIES):
            place = self._at_wall(half) if at_wall else self._anywhere(half)
            if place is None:
                continue
            middle, angle = place
            signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
            base = middle + (signs * half) @ _turn(angle)[:2, :2].T
            if any(low < h and high > l and _overlap(base, b) for b, l, h in self._taken):
                continue
            self._taken.append((base, low, high))
            if label is not None:
                self.parts += [self._part(label, solid, middle, angle) for solid in solids]
            return middle
        return None

    def _part(self, label: str, solid: Solid, middle: np.ndarray, angle: float) -> Part:
        shape, *corners = solid
        below, above = np.array(corners)
        centre = _turn(angle) @ ((below + above) / 2) + (*middle, 0)
        return Part(shape, CLASSES.index(label), centre, (above - below) / 2, angle)

    def _anywhere(self, half: np.ndarray) -> tuple[np.ndarray, float] | None:
        angle = self.rng.uniform(0, 2 * math.pi)
        reach = np.abs(_turn(angle)[:2, :2]) @ half
        if (2 * reach > self.size[:2]).any():
            return None
        return self.rng.uniform(reach, self.size[:2] - reach), angle

    def _at_wall(self, half: np.ndarray) -> tuple[np.ndarray, float] | None:
        """With its back a few centimetres before one of the four walls."""
        side = int(self.rng.integers(4))
        across = 1 - side % 2  # the axis that the wall stands on
        length, depth = self.size[1 - across], half[1] + self.rng.uniform(0.01, 0.06)
        if 2 * half[0] > length:
            return None
        middle = np.empty(2)
        middle[1 - across] = self.rng.uniform(half[0], length - half[0])
        middle[across] = depth if side in (0, 3) else self.size[across] - depth
        return middle, side * math.pi / 2


def _furnished(size: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[Part]]:
    """The scanners' places, float[S, 3], and the solids."""
    room, ceiling = _Room(size, rng), float(size[2])
    # Scanners come first, so that there is always a place for them: nothing stands within 30 cm.
    free: list[Solid] = [_upright(0.3, 0, 2.2)]
    places = [room.add(None, free) for _ in range(rng.integers(2, 4))]
    scanners = [(*place, rng.uniform(1.1, 1.8)) for place in places if place is not None]

    def some(fewest: int, most: int) -> range:
        return range(rng.integers(fewest, most + 1))

    room.add("sofa", _sofa(rng), at_wall=rng.random() < 0.7)
    room.add("table", _table(rng))
    room.add("lamp", _standing_lamp(rng))
    room.add("lamp", _hanging_lamp(rng, ceiling))
    for _ in some(1, 3):
        room.add("cabinet", _cabinet(rng), at_wall=True)
    for _ in some(0, 2):
        room.add("wall", _pillar(rng, ceiling), at_wall=True)
    for _ in some(2, 5):
        room.add("chair", _chair(rng))
    for _ in some(0, 1):
        room.add("sofa", _sofa(rng), at_wall=True)
    for _ in some(0, 1):
        room.add("table", _table(rng))
    for _ in some(0, 1):
        room.add("lamp", _standing_lamp(rng))
    return np.array(scanners), room.parts


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two rectangles, float[4, 2], meet: they do unless a side of one parts them."""
    for corners in (one, other):
        for side in (corners[1] - corners[0], corners[2] - corners[1]):
            a, b = one @ side, other @ side
            if a.max() <= b.min() or b.max() <= a.min():
                return False
    return True


def _turn(angle: float) -> np.ndarray:
    """A rotation about the vertical, [3, 3]."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([(cos, -sin, 0), (sin, cos, 0), (0, 0, 1)])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
