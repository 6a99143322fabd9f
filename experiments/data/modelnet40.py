"""ModelNet40, and whatever else has its layout: a folder for each class, with meshes to train and to test."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.meshes import MeshSet, load_mesh, load_mesh_set, read_mesh_set
from experiments.frame import named

SPLITS = ("train", "test")
VERSION = 1  # of what a cache holds
CACHE = "ilajax-cache"
DAY = 24 * 60 * 60  # seconds; no conversion takes as long

Progress = Callable[[int, int], None]


def load_modelnet40(
    directory: str | Path,
    *,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> tuple[MeshSet, MeshSet]:
    """Loads the meshes `CLASS/train/*.off` and `CLASS/test/*.off`; ModelNet10 has the same layout.

    The first use reads the text of all files, which takes minutes, and keeps arrays as files, which later
    uses map into memory. A file that is new, gone, or has another size or time makes others; those that are
    out of date stay, as another process may use them, and may be deleted by hand. Arrays appear when they are
    complete. Where they are damaged all the same, a printed line says so, and they are made anew. What a
    killed run leaves is called `unfinished-...`; it is never read, and the next conversion removes it after
    a day.

    Args:
      directory: the folder of the classes. Their order is that of their names.
      cache: False reads all meshes into memory and keeps nothing.
      cache_dir: where the arrays are kept, in a folder `ilajax-cache`; by default in `directory`.
      skip_broken: leaves out the files that cannot be read; `MeshSet.left_out` names them.
      progress: is told after each file how many are read, and of how many.

    Returns:
      The meshes to train with and those to test with.

    Raises:
      FileNotFoundError: if the folder is missing or has another layout: what was looked for.
      ValueError: naming the files that cannot be read.
      OSError: if the cache cannot be written, as on a full disk: how to put it elsewhere.
    """
    directory = Path(directory)
    layout = _layout(directory)
    if cache:
        # In a folder of its own, so that no part of the cache passes for a class.
        kept = Path(cache_dir or directory).absolute() / CACHE / _cache_name(layout)
        training, test = _load(kept) or _make(kept, layout, progress)
    else:
        with tempfile.TemporaryDirectory(prefix="ilajax-") as folder:
            _convert(Path(folder), layout, progress)
            training, test = (read_mesh_set(Path(folder) / split) for split in SPLITS)
    broken = [*training.left_out.tolist(), *test.left_out.tolist()]
    if broken and not (skip_broken and len(training) and len(test)):
        raise ValueError(
            f"{len(broken)} of {len(broken) + len(training) + len(test)} files of {directory} cannot be "
            f"read. Fetch them again, or leave them out by --skip-broken (skip_broken=True), which needs "
            f"sound ones of both {' and '.join(SPLITS)}.\n{listed(broken)}"
        )
    return training, test


def listed(broken: list[str], shown: int = 10) -> str:
    """The first lines, and how many there are more."""
    more = [f"and {len(broken) - shown} more"] if len(broken) > shown else []
    return "\n".join(broken[:shown] + more)


class _Layout(NamedTuple):
    """The folder of the classes, their names, and the files of each split in the order of the classes."""

    directory: Path
    class_names: list[str]
    files: dict[str, list[Path]]


def _layout(directory: Path) -> _Layout:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no folder {directory.absolute()}. Give the folder of ModelNet40 that holds the classes."
        )
    class_names = sorted(
        folder.name
        for folder in directory.iterdir()
        if any((folder / split).is_dir() for split in SPLITS)
    )
    if not class_names:
        raise FileNotFoundError(
            f"no classes in {directory.absolute()}: looked for CLASS/train/*.off and CLASS/test/*.off. Give "
            f"the folder that holds airplane, bathtub and so on."
        )
    files = {
        split: [path for name in class_names for path in _off_files(directory / name / split)]
        for split in SPLITS
    }
    return _Layout(directory, class_names, files)


def _off_files(folder: Path) -> list[Path]:
    # A name that starts with a dot is what macOS puts beside a file.
    found = sorted(path for path in folder.glob("*.off") if not path.name.startswith("."))
    if not found:
        raise FileNotFoundError(
            f"no meshes in {folder.absolute()}: looked for *.off. Each class has a folder for each of "
            f"{' and '.join(SPLITS)}: was all of the archive unpacked?"
        )
    return found


def _cache_name(layout: _Layout) -> str:
    """A name for the directory, then one for the state of all its files."""
    state: list[Any] = [VERSION]
    for path in (path for paths in layout.files.values() for path in paths):
        status = path.stat()
        state.append((path.parts[-3:], status.st_size, status.st_mtime_ns))
    return f"meshes-{_digest(str(layout.directory.resolve()))}-{_digest(json.dumps(state))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load(kept: Path) -> tuple[MeshSet, MeshSet] | None:
    """The sets of a cache; None where there is none, or a damaged one, of which a line is printed."""
    if not kept.is_dir():
        return None
    try:
        training, test = (load_mesh_set(kept / split) for split in SPLITS)
    except (FileNotFoundError, ValueError, EOFError) as error:
        print(f"the arrays in {kept} are damaged, and made anew: {error}", flush=True)
        return None
    return training, test


def _make(kept: Path, layout: _Layout, progress: Progress | None) -> tuple[MeshSet, MeshSet]:
    """Converts into a folder of another name, which gets its own name when it is complete."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(dir=kept.parent, prefix="unfinished-")
    except OSError as error:
        raise _cannot_be_kept(kept.parent, error) from None
    _tidy(kept.parent)
    with unfinished as folder:
        complete = Path(folder) / "complete"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.replace(kept, Path(folder) / "damaged")
            complete.mkdir()
            _convert(complete, layout, progress)
        except OSError as error:
            if not Path(error.filename or "").is_relative_to(folder):  # a mesh
                raise
            raise _cannot_be_kept(kept.parent, error) from error
        try:
            os.replace(complete, kept)
        except OSError:
            if not kept.is_dir():  # else another process was faster, with the same arrays
                raise
    training, test = (load_mesh_set(kept / split) for split in SPLITS)
    return training, test


def _cannot_be_kept(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"the arrays cannot be kept in {folder}: {error}. Give another folder by --cache-dir (cache_dir), "
        f"or cache=False."
    )


def _tidy(folder: Path) -> None:
    """Removes what runs left that were killed more than a day ago."""
    for left in folder.glob("unfinished-*"):
        with contextlib.suppress(OSError):  # another process may be removing it
            if left.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(left)


def _convert(folder: Path, layout: _Layout, progress: Progress | None) -> None:
    """Writes a folder for each split; files that cannot be read are left out and named."""
    count, done = sum(len(paths) for paths in layout.files.values()), 0
    for split, paths in layout.files.items():
        target = folder / split
        target.mkdir()
        label, model_names, left_out = [], [], []
        with (
            _Rows(target / "vertices.npy", np.float32) as vertices,
            _Rows(target / "faces.npy", np.int32) as faces,
        ):
            for path in paths:
                try:
                    mesh = load_mesh(path)
                except ValueError as error:
                    left_out.append(str(error))
                else:
                    vertices.append(mesh.vertices)
                    faces.append(mesh.faces)
                    label.append(layout.class_names.index(path.parts[-3]))
                    model_names.append(path.stem)
                done += 1
                if progress is not None:
                    progress(done, count)
        for name, array in {
            "vertex_offsets": np.array(vertices.offsets, np.int64),
            "face_offsets": np.array(faces.offsets, np.int64),
            "label": np.array(label, np.int32),
            "class_names": np.array(layout.class_names, np.str_),
            "model_names": np.array(model_names, np.str_),
            "left_out": np.array(left_out, np.str_),
        }.items():
            _save(target / f"{name}.npy", array)


def _save(path: Path, array: np.ndarray) -> None:
    """Saves a small array; an `OSError` names the file."""
    # NumPy writes to a file by a buffer of its own, and says nothing where that does not fit on the disk.
    content = io.BytesIO()
    np.save(content, array)
    with named(path):
        path.write_bytes(content.getbuffer())


class _Rows:
    """An .npy file of rows of 3, which grows: all meshes together need not fit into memory.

    An `OSError` of its methods names the file.

    Attributes:
      offsets: rows before each array that was appended, and at last of all.
    """

    def __init__(self, path: Path, dtype: Any):
        self.offsets = [0]
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._write_header()

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        with named(self._path), self._file:
            self._file.seek(0)
            self._write_header()

    def append(self, rows: np.ndarray) -> None:
        with named(self._path):
            self._file.write(rows.astype(self._dtype, order="C").tobytes())
        self.offsets.append(self.offsets[-1] + len(rows))

    def _write_header(self) -> None:
        # NumPy leaves room in it for any number of rows, so that it can be written again.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.offsets[-1], 3),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
