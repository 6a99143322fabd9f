"""Labelled triangle meshes: from files, in arrays that can stay on disk, and as voxels."""

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ilajax
from experiments.data.augment import Pose
from experiments.data.voxels import VoxelSource


class Mesh(NamedTuple):
    """A surface of triangles.

    Attributes:
      vertices: float32[V, 3], x, y and z, each used by a face.
      faces: int32[F, 3], the vertices of each triangle.
    """

    vertices: np.ndarray
    faces: np.ndarray


@dataclasses.dataclass(frozen=True)
class MeshSet:
    """Some meshes, one behind the other.

    Attributes:
      vertices: float32[sum of V, 3], x, y and z, upwards.
      faces: int32[sum of F, 3], counted from each mesh's own first vertex.
      vertex_offsets: int64[N + 1]; mesh i has the vertices from offset i to offset i + 1.
      face_offsets: int64[N + 1], as well.
      label: int[N], index into `class_names`.
      class_names: str[C].
      model_names: str[N].
      left_out: str[L], files that could not be read, each with the reason.
      folder: where the arrays lie as files. A pickle then holds the folder alone, and worker processes map
        the files anew: an array mapped from a file would be pickled with all its bytes.
    """

    vertices: np.ndarray
    faces: np.ndarray
    vertex_offsets: np.ndarray
    face_offsets: np.ndarray
    label: np.ndarray
    class_names: np.ndarray
    model_names: np.ndarray
    left_out: np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Mesh:
        vertices = slice(*self.vertex_offsets[index : index + 2])
        faces = slice(*self.face_offsets[index : index + 2])
        return Mesh(self.vertices[vertices], self.faces[faces])

    def fingerprint(self) -> str:
        """A short hash to tell data sets apart: of names, labels and sizes, not of gigabytes of vertices."""
        small = [
            getattr(self, name).tolist() for name in ARRAYS if name not in (*MAPPED, "left_out")
        ]
        return hashlib.sha256(json.dumps(small).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return load_mesh_set, (self.folder,)
        return MeshSet, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


ARRAYS = tuple(field.name for field in dataclasses.fields(MeshSet) if field.name != "folder")
MAPPED = ("vertices", "faces")  # the large ones


@functools.lru_cache(maxsize=8)
def load_mesh_set(folder: Path) -> MeshSet:
    """Maps a set from the folder's files, one .npy file for each name in `ARRAYS`."""
    return MeshSet(**_arrays(folder, "r"), folder=folder)


def read_mesh_set(folder: Path) -> MeshSet:
    """Reads a set into memory; the folder is needed no longer."""
    return MeshSet(**_arrays(folder, None))


def _arrays(folder: Path, mode: Any) -> dict[str, np.ndarray]:
    return {
        name: np.load(folder / f"{name}.npy", mmap_mode=mode if name in MAPPED else None)
        for name in ARRAYS
    }


class Meshes(VoxelSource):
    """The surfaces of a `MeshSet` as a source of training batches."""

    def _positions(self, index: int, stands: Pose) -> np.ndarray:
        vertices, faces = self.sets[index]
        placed = stands.placed(vertices, self.resolution)
        return ilajax.data.mesh_voxels(placed, faces, **self._grid()) + 0.5


def load_mesh(path: str | Path) -> Mesh:
    """Loads a mesh from a file of any format that trimesh reads; the meshes of a scene are joined.

    OFF is read here, as trimesh takes a file that ends early for a smaller mesh, and needs several times as
    long. A header may be glued to the counts, as in some files of ModelNet40. Faces of more than three
    corners become fans of triangles.

    Args:
      path: the file; its suffix names the format.

    Returns:
      The mesh, without vertices that no face uses: its box is that of the surface.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and what is wrong with it.
      ImportError: if trimesh needs a package for the file that is not installed.
    """
    # Imported where it is used: it takes a while, and only meshes need it.
    import trimesh

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}. Give a file with a mesh.")
    suffix = path.suffix.lower().removeprefix(".")
    known = trimesh.exchange.load.mesh_formats()
    if suffix not in known:
        raise ValueError(
            f"{path} has a suffix that names no format of meshes. Known are {', '.join(sorted(known))}."
        )
    try:
        if suffix == "off":
            vertices, faces = _read_off(path.read_text(encoding="utf-8", errors="replace"))
        else:
            loaded = trimesh.load_mesh(path, process=False)
            vertices, faces = np.asarray(loaded.vertices), np.asarray(loaded.faces)
        return _checked(vertices, faces)
    except (OSError, MemoryError, ImportError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # of every kind, as parsers of broken files have it
        raise ValueError(f"{path} cannot be read as a mesh: {error}") from error


def _read_off(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float64[V, 3] and triangles int64[F, 3] of an OFF file."""
    kind, header, body = re.sub(r"#.*", "", text).partition("OFF")
    if not header or not re.fullmatch(r"(ST)?C?N?", kind.strip()):
        raise ValueError("it does not begin with OFF.")
    lines = [line for line in body.splitlines() if line.strip()]
    counts = re.fullmatch(r"\s*(\d+)\s+(\d+)(\s+-?\d+)?\s*", lines[0] if lines else "")
    if counts is None:
        raise ValueError("after OFF there are no numbers of vertices and faces.")
    vertex_count, face_count = int(counts[1]), int(counts[2])
    if len(lines) - 1 != vertex_count + face_count:
        raise ValueError(
            f"its header announces {vertex_count} vertices and {face_count} faces, that is "
            f"{vertex_count + face_count} lines, but {len(lines) - 1} follow."
        )
    if not vertex_count or not face_count:
        raise ValueError("it has no faces.")
    vertices = np.loadtxt(lines[1 : vertex_count + 1], usecols=(0, 1, 2), ndmin=2)
    return vertices, _triangles(lines[vertex_count + 1 :])


def _triangles(lines: list[str]) -> np.ndarray:
    """The faces of an OFF file, cut into triangles."""
    from trimesh.geometry import triangulate_quads

    # Nearly all files hold triangles alone, and NumPy reads those thirty times as fast.
    try:
        table = np.loadtxt(lines, usecols=range(4), ndmin=2)
    except ValueError:
        pass
    else:
        if (table[:, 0] == 3).all() and (table == np.rint(table)).all():
            return table[:, 1:].astype(np.int64)
    return triangulate_quads([_polygon(face, line.split()) for face, line in enumerate(lines)])


def _polygon(face: int, words: list[str]) -> list[int]:
    """The corners of a face; what follows them is its colour."""
    corners = int(words[0])
    if corners < 3 or len(words) <= corners:
        raise ValueError(
            f"face {face} has {corners} corners and names {len(words) - 1}: {' '.join(words)[:80]!r}."
        )
    return [int(word) for word in words[1 : corners + 1]]


def _checked(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    if not len(faces):
        raise ValueError("it has no faces.")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"its faces name vertices {faces.min()} to {faces.max()}, but it has 0 to {len(vertices) - 1}."
        )
    used, corners = np.unique(faces, return_inverse=True)
    with np.errstate(over="ignore"):
        points = vertices[used].astype(np.float32)
    if not np.isfinite(points).all():
        wrong = used[~np.isfinite(points).all(axis=1)]
        raise ValueError(
            f"vertex {wrong[0]} is not finite in float32: {vertices[wrong[0]].tolist()}."
        )
    return Mesh(points, corners.reshape(faces.shape).astype(np.int32))
