"""Checkpoints of a training run, by Orbax: everything that the next epoch depends on."""

import shutil
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from flax import nnx

Notes = dict[str, Any]


class Checkpoints:
    """The newest checkpoints of one run, in a folder of their own.

    A checkpoint holds all variables of some NNX modules (weights, kernel keys, optimizer slots, pruning
    marks, random state) and notes, a dictionary that JSON can hold. Orbax writes it under another name and
    moves it when it is complete, so that a killed run leaves only whole ones.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The number of the newest checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def path(self, number: int) -> Path:
        return self.directory / str(number)

    def save(self, number: int, modules: Any, notes: Notes) -> None:
        arrays = ocp.args.StandardSave(_arrays(modules))
        self._manager.save(
            number, args=ocp.args.Composite(arrays=arrays, notes=ocp.args.JsonSave(notes))
        )

    def notes(self, number: int) -> Notes:
        """The notes alone."""
        restored = self._manager.restore(
            number, args=ocp.args.Composite(notes=ocp.args.JsonRestore())
        )
        return restored.notes

    def restore(self, number: int, modules: Any) -> None:
        """Gives the modules' variables the values of a checkpoint.

        Raises:
          ValueError: naming the first variable that the checkpoint lacks, has too much, or holds in
            another shape or dtype.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(modules))
        stored = self._manager.item_metadata(number).arrays
        for name in sorted(wanted.keys() | stored.keys()):
            have = _signature(stored[name]) if name in stored else "nothing"
            want = _signature(wanted[name]) if name in wanted else "nothing"
            if have != want:
                raise ValueError(
                    f"the checkpoint {self.path(number)} was made for another network: for {name} it holds "
                    f"{have}, this one needs {want}. Give the options it was made with, or start anew "
                    f"without --resume."
                )
        arrays = ocp.args.StandardRestore(wanted)
        restored = self._manager.restore(number, args=ocp.args.Composite(arrays=arrays))
        _put(modules, restored.arrays)


def check_options(directory: Path, options: Notes) -> None:
    """Compares options with those that the newest checkpoint in a folder was made with.

    Raises:
      ValueError: naming the first option that differs, with both values.
    """
    if not directory.is_dir():
        return
    with Checkpoints(directory) as checkpoints:
        number = checkpoints.latest()
        if number is None:
            return
        made_with = checkpoints.notes(number)["options"]
        for name, value in options.items():
            if made_with.get(name) != value:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} does not fit: it is {value!r} now, but the checkpoint "
                    f"{checkpoints.path(number)} was made with {made_with.get(name)!r}. Give the "
                    f"same, or start anew without --resume."
                )


def remove_checkpoints(directory: Path) -> None:
    """Removes what `Checkpoints(directory)` wrote."""
    shutil.rmtree(directory, ignore_errors=True)


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
