"""ModelNet40, and whatever else has its layout: a folder for each class, with meshes to train and to test."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.meshes import MAPPED, MeshSet, load_mesh, load_mesh_set
from experiments.frame import named

SPLITS = ("train", "test")
VERSION = 2  # of what a cache holds
CACHE = "ilajax-cache"

Progress = Callable[[int, int], None]


def load_modelnet40(
    directory: str | Path,
    *,
    cache_dir: str | Path | None = None,
    skip_broken: bool = False,
    progress: Progress = lambda done, count: None,
) -> tuple[MeshSet, MeshSet]:
    """Loads the meshes `CLASS/train/*.off` and `CLASS/test/*.off`; ModelNet10 has the same layout.

    The first use reads the text of all files, which takes minutes, and keeps arrays as files, which later
    uses map into memory. They appear when they are complete. A file that is new, gone, or has another size
    or time makes others; those that are out of date stay, as another process may use them, and may be deleted
    by hand, as may what a killed run leaves, `unfinished-...`.

    Args:
      directory: the folder of the classes. Their order is that of their names.
      cache_dir: where the arrays are kept, in a folder `ilajax-cache`; by default in `directory`.
      skip_broken: leaves out the files that cannot be read; `MeshSet.left_out` names them.
      progress: is told after each file how many are read, and of how many.

    Raises:
      FileNotFoundError: if the folder is missing or has another layout: what was looked for.
      ValueError: naming the files that cannot be read.
      OSError: if the cache cannot be written, as on a full disk: how to put it elsewhere.
    """
    directory = Path(directory)
    files = _found(directory)
    # In a folder of its own, so that no part of the cache passes for a class.
    kept = Path(cache_dir or directory).absolute() / CACHE / _cache_name(directory, files)
    if not kept.is_dir():
        _make(kept, files, progress)
    training, test = (load_mesh_set(kept / split) for split in SPLITS)
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


def _found(directory: Path) -> dict[str, list[Path]]:
    """The files of each split, in the order of the names of their classes."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no folder {directory.absolute()}. Give the folder of ModelNet40 that holds the classes."
        )
    classes = sorted({path.parent for split in SPLITS for path in directory.glob(f"*/{split}/")})
    if not classes:
        raise FileNotFoundError(
            f"no classes in {directory.absolute()}: looked for CLASS/train/*.off and CLASS/test/*.off. Give "
            f"the folder that holds airplane, bathtub and so on."
        )
    return {
        split: [path for each in classes for path in _off_files(each / split)] for split in SPLITS
    }


def _off_files(folder: Path) -> list[Path]:
    # A name that starts with a dot is what macOS puts beside a file.
    found = sorted(path for path in folder.glob("*.off") if not path.name.startswith("."))
    if not found:
        raise FileNotFoundError(
            f"no meshes in {folder.absolute()}: looked for *.off. Each class has a folder for each of "
            f"{' and '.join(SPLITS)}: was all of the archive unpacked?"
        )
    return found


def _cache_name(directory: Path, files: dict[str, list[Path]]) -> str:
    """A name for the directory, then one for the state of all its files."""
    state: list[Any] = [VERSION]
    for path in (path for paths in files.values() for path in paths):
        status = path.stat()
        state.append((path.parts[-3:], status.st_size, status.st_mtime_ns))
    return f"meshes-{_digest(str(directory.resolve()))}-{_digest(json.dumps(state))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(kept: Path, files: dict[str, list[Path]], progress: Progress) -> None:
    """Converts into a folder of another name, which gets its own name when it is complete."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="unfinished-") as folder:
            complete = Path(folder) / "complete"
            complete.mkdir()
            _convert(complete, files, progress)
            if not kept.is_dir():  # else another process was faster, with the same arrays
                os.replace(complete, kept)
    except OSError as error:
        raise OSError(
            f"the meshes cannot be read, or not be kept in {kept.parent}: {error}. Give another folder by "
            f"--cache-dir (cache_dir)."
        ) from error


def _convert(folder: Path, files: dict[str, list[Path]], progress: Progress) -> None:
    """Writes a folder for each split; files that cannot be read are left out and named."""
    count, done = sum(map(len, files.values())), 0
    for split, paths in files.items():
        class_names = list(dict.fromkeys(path.parts[-3] for path in paths))
        target = folder / split
        target.mkdir()
        label, model_names, left_out = [], [], []
        offsets: dict[str, list[int]] = {name: [0] for name in MAPPED}
        for path in paths:
            try:
                mesh = load_mesh(path)
            except ValueError as error:
                left_out.append(str(error))
            else:
                for name, rows in mesh._asdict().items():
                    # All meshes together need not fit into memory.
                    with named(target / name), (target / name).open("ab") as file:
                        file.write(rows.tobytes())
                    offsets[name].append(offsets[name][-1] + len(rows))
                label.append(class_names.index(path.parts[-3]))
                model_names.append(path.stem)
            done += 1
            progress(done, count)
        with named(target / "index.npz"):
            np.savez(
                target / "index.npz",
                vertex_offsets=np.array(offsets["vertices"], np.int64),
                face_offsets=np.array(offsets["faces"], np.int64),
                label=np.array(label, np.int32),
                class_names=np.array(class_names, np.str_),
                model_names=np.array(model_names, np.str_),
                left_out=np.array(left_out, np.str_),
            )
