"""Checkpoints of a training run, by Orbax: everything that the next epoch depends on."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

Notes = dict[str, Any]

# What the machine or the user lacks at the moment: it tells nothing of the bytes.
NOT_TORN = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EIO)


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or gone on from: the message names it and says what to do."""


class Checkpoints:
    """The newest checkpoints of one run, in a folder of their own.

    A checkpoint holds all variables of some NNX modules (weights, kernel keys, optimizer slots, pruning
    marks, random state) and notes, a dictionary that JSON can hold. Orbax writes it under another name and
    moves it when it is complete, so that a killed run leaves only whole ones; what it left half-written is
    removed when the folder is opened again. Orbax does not flush all files to the disk before the move, so a
    power cut may tear a checkpoint that seems whole: a digest is compared when it is read.

    Unless it is read only, the folder is made where there is none, and locked until the end of the context,
    or of the process; of several processes of one run, by the first. `CheckpointError`: another run did.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False):
        self.directory = directory.absolute()
        # Of several processes that write one checkpoint, the first makes and moves its folder.
        self._lock = None if read_only or jax.process_index() else _locked(self.directory)
        if self._lock:
            for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)
        with _quiet():  # Orbax warns of each folder that it is to leave as it is
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    enable_async_checkpointing=False,
                    create=not read_only,
                    read_only=read_only,
                ),
                item_handlers={
                    "arrays": ocp.StandardCheckpointHandler(),
                    "notes": ocp.JsonCheckpointHandler(),
                },
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

    def path(self, number: int) -> Path:
        return self.directory / str(number)

    def save(self, number: int, modules: Any, notes: Notes) -> None:
        """Writes a checkpoint, numbered above all others, and removes those that are too many.

        Raises CheckpointError if it cannot be written, as on a full disk.
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
                self._manager.save(number, args=args, force=True)
        except Exception as error:  # not OSError alone: tensorstore has its own for a full disk
            before = [self.path(other) for other in self.numbers() if other != number]
            todo = "There is none before it: mend this and start anew."
            if before:
                todo = f"The last one is {before[0]}: mend this, and --resume goes on from there."
            raise CheckpointError(
                f"the checkpoint {self.path(number)} cannot be written ({_why(error)}). {todo}"
            ) from error

    def notes(self, number: int) -> Notes:
        """The notes alone; `CheckpointError`: they cannot be read."""
        return self._content(number)["notes"]

    def restore(self, number: int, modules: Any) -> None:
        """Gives the modules' variables the values of a checkpoint; where it raises, they are as they were.

        It raises CheckpointError if the checkpoint is torn; MemoryError or OSError if memory, open files, a
        right or the disk fail; ValueError, naming a variable, if it was made for another network.
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
        _put(modules, self._restored(number, content, wanted))

    def restore_newest(self, modules: Any, say: Callable[[str], None]) -> int | None:
        """Restores the newest checkpoint that can be read; returns its number, None where there is none.

        Newer ones that are torn get another name, `torn-NUMBER`, as the run is about to write them again;
        `say` gets a line for each. Raises CheckpointError if all are torn, else as `restore` does.
        """
        torn: dict[int, CheckpointError] = {}
        for number in self.numbers():
            try:
                self.restore(number, modules)
            except CheckpointError as error:
                torn[number] = error
                continue
            if torn:
                aside = self._set_aside(torn)
                for path, error in zip(aside, torn.values(), strict=True):
                    say(f"{error}; it is now {path}; goes on from {self.path(number)}")
            return number
        if torn:
            raise CheckpointError(
                f"no checkpoint is left to go on from: {'; '.join(map(str, torn.values()))}. Start anew "
                f"without --resume."
            )
        return None

    def arrays(self, number: int) -> dict[str, jax.Array]:
        """All arrays of a checkpoint by the names of the variables, without modules to put them into."""
        return self._restored(number, self._content(number))

    def _content(self, number: int) -> dict[str, Any]:
        with self._reading(number):
            args = ocp.args.Composite(notes=ocp.args.JsonRestore())
            stored = self._manager.restore(number, args=args).notes
            if _json_digest(stored["content"]) != stored["digest"]:
                raise ValueError("its notes are not those that were saved")
        return stored["content"]

    def _restored(self, number: int, content: Notes, wanted: Any = None) -> dict[str, Any]:
        with self._reading(number):
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
            arrays = self._manager.restore(number, args=args).arrays
            if _digest(arrays) != content["digest"]:
                raise ValueError("its arrays are not those that were saved")
        return arrays

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Whatever a torn file makes Orbax or tensorstore raise becomes one kind of error."""
        try:
            with _quiet():
                yield
        except Exception as error:
            for each in _chain(error):
                if isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED" in str(each):
                    raise
            if (code := _errno(error)) in NOT_TORN:
                raise OSError(code, os.strerror(code), str(self.path(number))) from error
            raise CheckpointError(
                f"the checkpoint {self.path(number)} cannot be read ({_why(error)})"
            ) from error

    def _set_aside(self, numbers: Iterable[int]) -> list[Path]:
        """Gives torn checkpoints other names, which Orbax does not know, and returns them."""
        aside = {number: self.directory / f"torn-{number}" for number in numbers}
        multihost_utils.sync_global_devices("all have tried to read the torn checkpoints")
        for number, path in aside.items() if self._lock else ():
            shutil.rmtree(path, ignore_errors=True)
            self.path(number).rename(path)
        multihost_utils.sync_global_devices("torn checkpoints are set aside")
        self._manager.reload()
        return list(aside.values())


def check_options(directory: Path, options: Notes) -> None:
    """Raises ValueError, naming the option, where the newest checkpoint in a folder was made with another."""
    if not directory.is_dir():
        return
    with Checkpoints(directory, read_only=True) as checkpoints:
        for number in checkpoints.numbers():
            try:
                made_with = checkpoints.notes(number)["options"]
            except CheckpointError:
                continue  # `restore_newest` tells of it
            for name, value in options.items():
                if made_with.get(name) != value:
                    raise ValueError(
                        f"--{name.replace('_', '-')} does not fit: it is {value!r} now, but the checkpoint "
                        f"{checkpoints.path(number)} was made with {made_with.get(name)!r}. Give the same, "
                        f"or start anew without --resume."
                    )
            return


def remove_checkpoints(directory: Path) -> None:
    """Removes the folder of `Checkpoints(directory)`; `CheckpointError`: another run writes to it."""
    if directory.is_dir():
        with _locked(directory):
            shutil.rmtree(directory)


def _locked(directory: Path) -> IO[bytes]:
    """The folder's lock, held until the file is closed, or until this process ends in whatever way."""
    directory.mkdir(parents=True, exist_ok=True)
    # Beside the folder: it may be removed while it is locked.
    file = directory.with_name(f".{directory.name}.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"another run writes to {directory}. Wait until it has ended, or give another --out."
        ) from None
    return file


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
        digest.update(f"{name} {_signature(array)} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
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
    code = _errno(error)
    return os.strerror(code) if code else textwrap.shorten(f"{type(error).__name__}: {error}", 300)
