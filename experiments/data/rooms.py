"""Furniture made of solids, and where it stands in a room."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CLASSES = ("floor", "ceiling", "wall", "table", "chair", "sofa", "cabinet", "lamp")
TRIES = 40  # places tried for a piece before it is left out


class Part(NamedTuple):
    """A solid in a scene."""

    shape: str  # of `scenes.SHAPES`
    label: int
    centre: np.ndarray  # float[3], metres
    half: np.ndarray  # float[3], half its size along its own axes
    angle: float  # radians that its axes are turned about the vertical


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
            base = middle + (signs * half) @ turn(angle)[:2, :2].T
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
        centre = turn(angle) @ ((below + above) / 2) + (*middle, 0)
        return Part(shape, CLASSES.index(label), centre, (above - below) / 2, angle)

    def _anywhere(self, half: np.ndarray) -> tuple[np.ndarray, float] | None:
        angle = self.rng.uniform(0, 2 * math.pi)
        reach = np.abs(turn(angle)[:2, :2]) @ half
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


def furnished(size: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[Part]]:
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


def turn(angle: float) -> np.ndarray:
    """A rotation about the vertical, [3, 3]."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([(cos, -sin, 0), (sin, cos, 0), (0, 0, 1)])
