"""Loads a checkpoint of a pruned model into a newly built one, whose filters are longer."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ilajax.geometry import sites
from ilajax.nn.conv import Conv, iter_convs
from ilajax.nn.slots import Path, dotted, iter_slots, plain_key
from ilajax.sparse_kernel import check_kernel_keys

Name = tuple[str, ...]  # a path as a checkpoint has it: of strings alone
Shape = tuple[int, ...]
Variables = dict[Path, nnx.Variable]


def load_state(node: Any, stored: Any) -> None:
    """Loads stored variables into a newly built model, even if the stored filters are shrunk.

    `ilajax.optim.compact(..., shrink=True)` shortens filters and the optimizer's state for them, so a
    checkpoint no longer has the shapes of a newly built model. Here each `ilajax.nn.Conv` takes `kernel` and
    `kernel_keys` in their stored length, and so do the optimizer's slots for them. Every other variable must
    have the shape and dtype that the model expects. Arrays are not moved: one that is sharded stays sharded.

    Save all variables, and those of the optimizer if training is to be resumed. Restore them without a
    target, because a target prescribes lengths:

      >>> def build():
      ...     model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      ...     recipe = ilajax.optim.sparse_training(model, optax.adam(1e-3))
      ...     return model, nnx.Optimizer(model, recipe, wrt=nnx.Param)
      >>> state = nnx.to_pure_dict(nnx.state(build()))
      >>> # With Orbax: checkpointer.save(path, state), and later state = checkpointer.restore(path)
      >>> model, optimizer = build()
      >>> ilajax.nn.load_state((model, optimizer), state)

    Args:
      node: what to load into, in place: an NNX module, or a tuple, list or dict of modules and optimizers.
      stored: what `nnx.state(node)` was when it was saved: an `nnx.State`, a nested dict of arrays
        (`nnx.to_pure_dict`), or what Orbax returns for either, with strings for indices.

    Raises:
      TypeError: if `stored` holds no concrete arrays: restore it first, and call this outside of `nnx.jit`.
      ValueError: naming the variables that are missing, unknown to `node`, or of another shape or dtype, and
        keys that are out of order. Nothing is changed then.
    """
    variables = {tuple(path): variable for path, variable in nnx.to_flat_state(nnx.state(node))}
    arrays = _matched(variables, _by_name(stored))
    shapes = {path: [variable.shape] for path, variable in variables.items()}
    filters = _stored_filters(node, variables, arrays)
    shapes |= {path: [shape] for path, shape in filters.items()}
    shapes |= _slots_of(filters, node, variables)
    raise_if(
        "do not fit, so that they were saved from another model or optimizer",
        [
            f"{dotted(path)} (stored as {_signature(arrays[path])}, expected "
            f"{' or '.join(_signature(variable, shape) for shape in shapes[path])})"
            for path, variable in variables.items()
            if jnp.shape(arrays[path]) not in shapes[path] or arrays[path].dtype != variable.dtype
        ],
    )
    for path, conv in _convs(node, variables):
        name = (*path, "kernel_keys")
        check_kernel_keys(dotted(name), arrays[name], conv.kernel_shape)
    for path, variable in variables.items():
        variable.set_value(jnp.asarray(arrays[path]))


def _by_name(stored: Any) -> dict[Name, Any]:
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(stored):
        name = tuple(str(plain_key(key)) for key in path)
        arrays[name] = array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"stored must hold concrete arrays, but {dotted(name)} is a {type(array).__name__}. Restore "
                f"the checkpoint first, and call load_state outside of nnx.jit."
            )
    return arrays


def _matched(variables: Variables, stored: dict[Name, Any]) -> dict[Path, Any]:
    """The stored array of each variable; raises for those that are missing, and those left over."""
    arrays, missing = {}, []
    for path in variables:
        name = tuple(map(str, path))
        # In an nnx.State a variable is a node, whose leaf is called "value".
        found = next((n for n in (name, (*name, "value")) if n in stored), None)
        if found is None:
            missing.append(dotted(path))
        else:
            arrays[path] = stored.pop(found)
    whole = "save nnx.state(...) whole: weights mean nothing without their kernel_keys"
    raise_if(f"are missing ({whole})", missing)
    unknown = "are of no use to this model or optimizer, which has none of that name"
    raise_if(unknown, map(dotted, stored))
    return arrays


def _convs(node: Any, variables: Variables) -> Iterator[tuple[Path, Conv]]:
    """The layers, with the paths that their variables are stored under; tied layers have the first one's."""
    path_of = {id(variable): path for path, variable in variables.items()}
    for _, conv in iter_convs(node):
        yield path_of[id(conv.kernel)][:-1], conv


def _stored_filters(node: Any, variables: Variables, arrays: dict[Path, Any]) -> dict[Path, Shape]:
    """The stored shape of each filter's kernel and kernel_keys, if it is a possible one."""
    shapes = {}
    for path, conv in _convs(node, variables):
        *stack, length = jnp.shape(arrays[*path, "kernel_keys"]) or (0,)
        if (*stack,) == conv.kernel.shape[:-1] and 0 < length <= sites(conv.kernel_shape):
            for name in ("kernel", "kernel_keys"):
                shapes[*path, name] = (*stack, length)
    return shapes


def _slots_of(
    filters: dict[Path, Shape], node: Any, variables: Variables
) -> dict[Path, list[Shape]]:
    """The shapes that the optimizers' slots for the filters may have."""
    path_of = {id(variable): path for path, variable in variables.items()}
    shapes: dict[Path, list[Shape]] = {}
    for _, optimizer in nnx.iter_graph(node):
        if not isinstance(optimizer, nnx.Optimizer):
            continue
        for parameter, slot in iter_slots(optimizer):
            for path, stored in filters.items():
                old = variables[path].shape
                lead = slot.ndim - len(old)
                # Histories as in L-BFGS have leading axes; the optimizer's model may lie anywhere in node.
                if lead >= 0 and slot.shape[lead:] == old and _is_within(parameter, path):
                    own = shapes.setdefault(path_of[id(slot)], [])
                    own.append((*slot.shape[:lead], *stored))
                    # Some optimizers keep one element for a parameter for which they need nothing.
                    own.extend([slot.shape] if slot.size == 1 else [])
    return shapes


def _is_within(parameter: Path, path: Path) -> bool:
    """Whether a path in a model, perhaps with more after it, is the end of a path in a tree around it."""
    return any(parameter[: len(path) - start] == path[start:] for start in range(len(path)))


def raise_if(problem: str, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        shown = ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(f"stored variables {problem}: {shown}.")


def _signature(array: Any, shape: Shape | None = None) -> str:
    return f"{array.dtype}{list(jnp.shape(array) if shape is None else shape)}"
