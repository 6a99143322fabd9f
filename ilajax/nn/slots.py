"""The arrays of an optimizer's state that belong to a parameter, found by the parameter's path."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax
from flax import nnx

Path = tuple[Any, ...]


def iter_slots(optimizer: nnx.Optimizer) -> Iterator[tuple[Path, nnx.Variable]]:
    """Every array in the optimizer's state that has a parameter's path, with that path.

    The path is the parameter's in the model, perhaps with more after it.
    """
    # An Optax state with an array for each parameter holds them in trees like params: in NNX an nnx.State.
    for tree in tree_nodes(optimizer.opt_state, nnx.State):
        for path, variable in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
            # optax.masked puts an empty node into the variable of a parameter that it leaves out.
            if not isinstance(variable.get_value(), optax.MaskedNode):
                yield tuple(map(plain_key, path)), variable


def tree_nodes(tree: Any, kind: type) -> list[Any]:
    """The outermost nodes of a kind in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def plain_key(key: Any) -> Any:
    """An element of an NNX path: the name of the attribute, or the index."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise TypeError(f"unknown kind of path key {key!r}.")


def dotted(path: Iterable[Any]) -> str:
    """A path in an error's words."""
    return ".".join(map(str, path))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
