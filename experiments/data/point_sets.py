"""Labelled point clouds: from a file of the kicad set's format, or made on the spot; and as voxels."""

import dataclasses
import hashlib
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.augment import Pose
from experiments.data.solids import CLASSES, LEAN, STRETCH, SURFACES

SCALE = 65535  # of a stored coordinate: 1
# What a file holds, by name: the kind of number, the axes.
FORMAT: dict[str, tuple[Any, str]] = {
    "points": (np.uint16, "[N, P, 3]"),
    "label": (np.integer, "[N]"),
    "class_names": (np.str_, "[C]"),
    "model_names": (np.str_, "[N]"),
}


@dataclasses.dataclass(frozen=True)
class MadePoints:
    """The points of clouds on the surfaces of solids, uint16[count, size, 3], as `make_point_sets` has them.

    A cloud is made whenever it is asked for, so that a set takes no memory and no time before its first
    batch, however fine its grid: 800 clouds for 256^3 would be 7.5 GB, and so much again in each worker.
    A cloud depends on the seed, its own number and its size alone.
    """

    count: int
    size: int
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.size, 3

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> np.ndarray:
        """A cloud, uint16[size, 3]; of several indices the clouds, uint16[M, size, 3]."""
        if np.ndim(index):
            return np.stack([self[number] for number in index])
        number = range(self.count)[index]
        rng = np.random.default_rng([self.seed, number])
        surface = SURFACES[CLASSES[number % len(CLASSES)]](self.size, rng)
        return _into_the_cube(surface * rng.uniform(STRETCH, 1, 3) @ _leaning(rng))


@dataclasses.dataclass(frozen=True)
class PointSets:
    """Some clouds of equally many points; divided by `SCALE` they lie in the unit cube."""

    points: np.ndarray | MadePoints  # uint16[N, P, 3], x, y and z, upwards
    label: np.ndarray  # int[N], index into `class_names`
    class_names: np.ndarray  # str[C]
    model_names: np.ndarray  # str[N]

    def __len__(self) -> int:
        return len(self.label)

    def positions(self, index: int, stands: Pose, resolution: int) -> np.ndarray:
        """The points of a cloud as positions in a grid, [N, 3] in voxels."""
        points = (self.points[index].T / SCALE).T  # axes first in memory, as `placed` works
        return stands.placed(points, resolution)

    def fingerprint(self) -> str:
        """A short hash of points and labels, to tell data sets apart; of made points it is of their seed."""
        made = isinstance(self.points, MadePoints)
        found = hashlib.sha256(repr(self.points).encode() if made else self.points.tobytes())
        found.update(self.label.astype(np.int64).tobytes())
        return found.hexdigest()[:16]


def load_point_sets(path: str | Path) -> PointSets:
    """Loads a file with the arrays of `FORMAT`; an error names the one that is missing, broken or unfit."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}. Give an .npz file of point sets.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file, or is truncated. Fetch it again.")
    with np.load(path) as file:
        sets = PointSets(**{name: _array(path, file, name) for name in FORMAT})
    for name in ("points", "model_names"):
        count = len(getattr(sets, name))
        if count != len(sets):
            raise ValueError(f"{path}: {name} holds {count} clouds, but label {len(sets)}.")
    if len(sets) and not 0 <= sets.label.min() <= sets.label.max() < len(sets.class_names):
        raise ValueError(
            f"{path}: label holds {sets.label.min()} to {sets.label.max()}, but class_names has "
            f"{len(sets.class_names)} classes."
        )
    if not sets.points.shape[1]:
        raise ValueError(f"{path}: points must hold at least one point a cloud, got none.")
    return sets


def _array(path: Path, file: Any, name: str) -> np.ndarray:
    kind, axes = FORMAT[name]
    if name not in file:
        raise ValueError(f"{path} has no array {name}, only {', '.join(file.files) or 'none'}.")
    try:
        array = file[name]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: the array {name} cannot be read: {error}") from None
    fits = array.ndim == axes.count(",") + 1 and (array.ndim == 1 or array.shape[-1] == 3)
    if not fits or not np.issubdtype(array.dtype, kind):
        raise ValueError(
            f"{path}: {name} must be {kind.__name__}{axes}, got {array.dtype}{list(array.shape)}."
        )
    return array


def make_point_sets(count: int, points: int, *, seed: int, stored: bool = True) -> PointSets:
    """Clouds on the surfaces of solids: stretched, turned and leant over at random; the classes take turns.

    The first clouds of a longer list are those of a shorter one. Points that are not `stored` are
    `MadePoints`, the same ones, made when they are asked for.
    """
    label = np.arange(count, dtype=np.int32) % len(CLASSES)
    names = np.array([f"{CLASSES[at]}-{number}" for number, at in enumerate(label)], dtype=np.str_)
    made = MadePoints(count, points, seed)
    return PointSets(made[range(count)] if stored else made, label, np.array(CLASSES), names)


def _leaning(rng: np.random.Generator) -> np.ndarray:
    """A turn about the vertical, one by at most `LEAN` about a horizontal axis, and one more."""
    first, last = (
        Pose(angle).turned(np.eye(3)) for angle in rng.uniform(0, 2 * math.pi, 2).tolist()
    )
    upright = Pose(rng.uniform(0, LEAN)).turned(np.eye(3))
    return first @ np.roll(upright, 1, axis=(0, 1)) @ last


def _into_the_cube(cloud: np.ndarray) -> np.ndarray:
    axes = np.ascontiguousarray(cloud.T)  # axes first, so that NumPy runs along the points
    low, high = axes.min(axis=1, keepdims=True), axes.max(axis=1, keepdims=True)
    unit = (axes - (low + high) / 2) / (high - low).max() + 0.5
    return np.rint(SCALE * unit).T.astype(np.uint16, order="C")
