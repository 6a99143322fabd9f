"""Checkpoints of a training run, by Orbax: everything that the next epoch depends on."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

Notes = dict[str, Any]

LOCK = ".lock"
TORN = "torn-"
# What `Checkpoints` leaves in its folder, apart from the lock. Orbax writes under a name that holds a suffix.
OURS = re.compile(rf"(?:{TORN})?\d+(?:-\d+)?|\d+{re.escape(ocp.utils.TMP_DIR_SUFFIX)}.*")
# What the machine or the user lacks at the moment: it tells nothing of the bytes.
NOT_TORN = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EIO)


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or gone on from: the message names it and says what to do."""


class _OtherBytes(ValueError):
    """A digest does not fit what it was made of."""


class Checkpoints:
    """The newest checkpoints of one run, in a folder of their own.

    A checkpoint holds all variables of some NNX modules (weights, kernel keys, optimizer slots, pruning
    marks, random state) and notes, a dictionary that JSON can hold. Orbax writes it under another name and
    moves it when it is complete, so that a killed run leaves only whole ones; what it left half-written is
    removed when the folder is opened again. A digest of everything is kept with it and compared when it is
    read. It finds what a move cannot prevent: Orbax does not flush all files to the disk before the move, so
    that a power cut may tear a checkpoint that seems whole.

    Args:
      directory: the folder, which is made where there is none.
      keep: how many checkpoints stay.
      read_only: whether nothing in the folder is changed. Else its lock is held until the end of the context,
        or of the process; of several processes of one run, by the first.

    Raises:
      CheckpointError: if another run holds the lock.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False):
        self.directory = directory.absolute()
        # Of several processes that write one checkpoint, the first makes and moves its folder.
        self._lock = None if read_only or jax.process_index() else _locked(self.directory)
        self._remove_leftovers()
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
        with _quiet():  # Orbax warns of each folder that it is to leave as it is
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
        if self._lock:
            self._lock.close()

    def numbers(self) -> list[int]:
        """The numbers of all checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def latest(self) -> int | None:
        """The number of the newest checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def path(self, number: int) -> Path:
        return self.directory / str(number)

    def save(self, number: int, modules: Any, notes: Notes) -> None:
        """Writes a checkpoint, and removes those that are too many.

        Args:
          number: above those of all checkpoints in the folder.
          modules: NNX modules, in any containers.
          notes: what JSON can hold.

        Raises:
          CheckpointError: if it cannot be written, as on a full disk. What was written of it is gone.
          ValueError: if `number` is not above the newest one's.
        """
        arrays = _arrays(modules)
        signatures = {name: _signature(array) for name, array in arrays.items()}
        content = {"notes": notes, "arrays": signatures, "digest": _digest(arrays)}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            notes=ocp.args.JsonSave({"content": content, "digest": _json_digest(content)}),
        )
        try:
            with _quiet():
                saved = self._manager.save(number, args=args)
        except (
            Exception
        ) as error:  # not only OSError: tensorstore reports a full disk in its own way
            raise self._unwritten(number, error) from error
        if not saved:
            raise ValueError(
                f"number must be above {self.latest()}, the newest one's, got {number}."
            )

    def notes(self, number: int) -> Notes:
        """The notes alone.

        Raises:
          CheckpointError: if they cannot be read.
        """
        return self._content(number)["notes"]

    def restore(self, number: int, modules: Any) -> None:
        """Gives the modules' variables the values of a checkpoint.

        Where it raises, the modules are as they were.

        Raises:
          CheckpointError: if it is torn.
          MemoryError, OSError: if memory, open files, a right or the disk fail.
          ValueError: naming the first variable that the checkpoint lacks, has too much, or holds in
            another shape or dtype.
        """
        content = self._content(number)
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(modules))
        stored = content["arrays"]
        for name in sorted(wanted.keys() | stored.keys()):
            have = stored.get(name, "nothing")
            want = _signature(wanted[name]) if name in wanted else "nothing"
            if have != want:
                raise ValueError(
                    f"the checkpoint {self.path(number)} was made for another network: for {name} it holds "
                    f"{have}, this one needs {want}. Give the options it was made with, or start anew "
                    f"without --resume."
                )
        _put(modules, self._arrays(number, content, wanted))

    def restore_newest(self, modules: Any, say: Callable[[str], None]) -> int | None:
        """Restores the newest checkpoint that can be read.

        Newer ones that are torn get another name, `torn-NUMBER`: the run is about to write them again.

        Args:
          modules: get the values.
          say: gets a line for each torn checkpoint.

        Returns:
          Its number, or None where there is no checkpoint.

        Raises:
          CheckpointError: if there are some, and all are torn.
          OSError, ValueError: as `restore` does.
        """
        torn: dict[int, CheckpointError] = {}
        for number in self.numbers():
            try:
                self.restore(number, modules)
            except CheckpointError as error:
                torn[number] = error
                continue
            for (_, error), aside in zip(torn.items(), self._set_aside(torn), strict=True):
                say(f"{error}; it is now {aside}; goes on from {self.path(number)}")
            return number
        if torn:
            raise _none_is_left(torn.values())
        return None

    def newest_notes(self) -> tuple[int, Notes] | None:
        """Number and notes of the newest checkpoint whose notes can be read, or None where there is none.

        Raises:
          CheckpointError: if there are some, and the notes of none can be read.
        """
        torn = []
        for number in self.numbers():
            try:
                return number, self.notes(number)
            except CheckpointError as error:
                torn.append(error)
        if torn:
            raise _none_is_left(torn)
        return None

    def arrays(self, number: int) -> dict[str, jax.Array]:
        """All arrays of a checkpoint by the names of the variables, without modules to put them into.

        Raises:
          CheckpointError: if it is torn.
        """
        return self._arrays(number, self._content(number))

    def _content(self, number: int) -> dict[str, Any]:
        with self._reading(number):
            args = ocp.args.Composite(notes=ocp.args.JsonRestore())
            stored = self._manager.restore(number, args=args).notes
            if _json_digest(stored["content"]) != stored["digest"]:
                raise _OtherBytes("its notes are not those that were saved")
        return stored["content"]

    def _arrays(self, number: int, content: dict[str, Any], wanted: Any = None) -> dict[str, Any]:
        with self._reading(number):
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
            arrays = self._manager.restore(number, args=args).arrays
            if _digest(arrays) != content["digest"]:
                raise _OtherBytes("its arrays are not those that were saved")
        return arrays

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Whatever a torn file makes Orbax or tensorstore raise becomes one kind of error."""
        try:
            with _quiet():
                yield
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            if (code := _errno(error)) in NOT_TORN:
                raise OSError(code, os.strerror(code), str(self.path(number))) from error
            raise CheckpointError(
                f"the checkpoint {self.path(number)} cannot be read ({_why(error)})"
            ) from error

    def _unwritten(self, number: int, error: Exception) -> CheckpointError:
        """Removes what was written, and says which checkpoint the run can go on from."""
        with _quiet():
            for _ in range(10):  # writes of other arrays still end, and make their folder anew
                self._remove_leftovers()
                time.sleep(0.02)
        latest = self.latest()
        if latest is None:
            todo = "There is none before it: mend this and start anew."
        else:
            todo = (
                f"The last one is {self.path(latest)}: mend this, and --resume goes on from there."
            )
        return CheckpointError(
            f"the checkpoint {self.path(number)} cannot be written ({_why(error)}). {todo}"
        )

    def _set_aside(self, numbers: Iterable[int]) -> list[Path]:
        """Gives torn checkpoints other names, which Orbax does not know, and returns them."""
        moves = {self.path(number): self._free(f"{TORN}{number}") for number in numbers}
        multihost_utils.sync_global_devices("torn checkpoints have new names")
        for path, aside in moves.items() if self._lock else ():
            path.rename(aside)
        multihost_utils.sync_global_devices("torn checkpoints are set aside")
        self._manager.reload()
        return list(moves.values())

    def _free(self, name: str) -> Path:
        names = itertools.chain([name], (f"{name}-{again}" for again in itertools.count(2)))
        return next(path for path in map(self.directory.joinpath, names) if not path.exists())

    def _remove_leftovers(self) -> None:
        if self._lock:
            for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)


def check_options(directory: Path, options: Notes) -> None:
    """Compares options with those that the newest checkpoint in a folder was made with.

    Raises:
      CheckpointError: if there are checkpoints, and none can be read.
      ValueError: naming the first option that differs, with both values.
    """
    if not directory.is_dir():
        return
    with Checkpoints(directory, read_only=True) as checkpoints:
        newest = checkpoints.newest_notes()
        if newest is None:
            return
        number, notes = newest
        for name, value in options.items():
            if notes["options"].get(name) != value:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} does not fit: it is {value!r} now, but the checkpoint "
                    f"{checkpoints.path(number)} was made with {notes['options'].get(name)!r}. Give the "
                    f"same, or start anew without --resume."
                )


def remove_checkpoints(directory: Path) -> None:
    """Removes what `Checkpoints(directory)` wrote, and the folder where nothing else is in it.

    Raises:
      CheckpointError: if another run writes to it.
    """
    if not directory.is_dir():
        return
    with _locked(directory) as lock:
        for path in directory.iterdir():
            if OURS.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path)
        Path(lock.name).unlink()
    if not any(directory.iterdir()):
        directory.rmdir()


def _locked(directory: Path) -> IO[bytes]:
    """The folder's lock, held until the file is closed, or until this process ends in whatever way."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CheckpointError(
                f"another run writes to {directory}. Wait until it has ended, or give another --out."
            ) from None
        # Whoever removes a folder's checkpoints removes the lock too, perhaps just before it was taken here.
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _arrays(modules: Any) -> dict[str, jax.Array]:
    """All variables by name, random keys as the integers they are made of."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(modules))
    return {_name(path): jax.random.key_data(v) if _is_key(v) else v for path, v in leaves}


def _put(modules: Any, arrays: dict[str, jax.Array]) -> None:
    def stored(path: Any, variable: jax.Array) -> jax.Array:
        array = arrays[_name(path)]
        if _is_key(variable):
            return jax.random.wrap_key_data(array, impl=jax.random.key_impl(variable))
        return array

    nnx.update(modules, jax.tree_util.tree_map_with_path(stored, nnx.state(modules)))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _is_key(array: jax.Array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _signature(array: Any) -> str:
    return f"{jax.numpy.dtype(array.dtype).name}{list(array.shape)}"


def _digest(arrays: Mapping[str, Any]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        host = np.ascontiguousarray(array)
        digest.update(f"{name} {_signature(array)} ".encode())
        digest.update(host.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _json_digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes what Orbax and tensorstore print from each of their threads: what fails is raised too."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from or amid."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: Exception) -> bool:
    return any(
        isinstance(each, MemoryError)
        or (isinstance(each, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(each))
        for each in _chain(error)
    )


def _errno(error: Exception) -> int | None:
    """The system's number, where the error or one it was raised from has one."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno:
            return each.errno
        if code := re.search(r"os_error_code='(\d+)'", str(each)):  # tensorstore's
            return int(code[1])
    return None


def _why(error: Exception) -> str:
    """What the system says where the error comes from it, else the error's own words, in one short line."""
    # The same befell the other arrays that were under way. asyncio would print each, in some kB.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if isinstance(error, _OtherBytes):
        return str(error)
    if code := _errno(error):
        named = isinstance(error, OSError) and error.filename
        return os.strerror(code) + (f": {error.filename}" if named else "")
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _none_is_left(torn: Iterable[CheckpointError]) -> CheckpointError:
    listed = "; ".join(map(str, torn))
    return CheckpointError(
        f"no checkpoint is left to go on from: {listed}. Start anew without --resume."
    )
