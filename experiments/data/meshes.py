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
from experiments.data.voxels import unit_grid


class Mesh(NamedTuple):
    """A surface of triangles."""

    vertices: np.ndarray  # float32[V, 3], x, y and z, each used by a face
    faces: np.ndarray  # int32[F, 3], the vertices of each triangle


@dataclasses.dataclass(frozen=True)
class MeshSet:
    """Some meshes, one behind the other, as files in a folder.

    A pickle holds the folder alone, and worker processes map the files anew: an array mapped from a file
    would be pickled with all its bytes.
    """

    vertices: np.ndarray  # float32[sum of V, 3], x, y and z, upwards
    faces: np.ndarray  # int32[sum of F, 3], counted from each mesh's own first vertex
    vertex_offsets: (
        np.ndarray
    )  # int64[N + 1]; mesh i has the vertices from offset i to offset i + 1
    face_offsets: np.ndarray  # int64[N + 1], as well
    label: np.ndarray  # int[N], index into `class_names`
    class_names: np.ndarray  # str[C]
    model_names: np.ndarray  # str[N]
    left_out: np.ndarray  # str[L], files that could not be read, each with the reason
    folder: Path

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Mesh:
        vertices = slice(*self.vertex_offsets[index : index + 2])
        faces = slice(*self.face_offsets[index : index + 2])
        return Mesh(self.vertices[vertices], self.faces[faces])

    def positions(self, index: int, stands: Pose, resolution: int) -> np.ndarray:
        """Positions in a grid, [N, 3] in voxels: the middles of the voxels that a surface meets."""
        vertices, faces = self[index]
        placed = stands.placed(vertices, resolution)
        return ilajax.data.mesh_voxels(placed, faces, **unit_grid(resolution)) + 0.5

    def fingerprint(self) -> str:
        """A short hash to tell data sets apart: of names, labels and sizes, not of gigabytes of vertices."""
        small = (
            *(self.vertex_offsets, self.face_offsets, self.label),
            *(self.class_names, self.model_names),
        )
        return hashlib.sha256(json.dumps([a.tolist() for a in small]).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return load_mesh_set, (self.folder,)


MAPPED = {"vertices": np.float32, "faces": np.int32}  # the large files, by name


@functools.lru_cache(maxsize=8)
def load_mesh_set(folder: Path) -> MeshSet:
    """Maps a set from the folder's files: the bytes of each name in `MAPPED`, and all else in an .npz."""
    with np.load(folder / "index.npz") as index:
        arrays = dict(index)
    for name, kind in MAPPED.items():
        arrays[name] = np.empty((0, 3), kind)
        if len(arrays["label"]):  # an empty file cannot be mapped
            arrays[name] = np.memmap(folder / name, kind, mode="r").reshape(-1, 3)
    return MeshSet(**arrays, folder=folder)


def load_mesh(path: Path) -> Mesh:
    """Loads a mesh from an OFF file.

    Trimesh takes a file that ends early for a smaller mesh, and needs several times as long. A header may be
    glued to the counts, as in some files of ModelNet40. Faces of more than three corners become fans of
    triangles; vertices that no face uses are left out, so that the box is that of the surface. A ValueError
    names the file and what is wrong with it.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return _checked(*_read_off(text))
    except (ValueError, IndexError, OverflowError) as error:
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
