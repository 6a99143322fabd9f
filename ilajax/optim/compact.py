"""Takes pruned weights out of filters and out of the optimizer's state."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ilajax.geometry import sites
from ilajax.nn.conv import Conv, iter_convs
from ilajax.optim.one_warning_shot_pruning import OneWarningShotPruningState

Path = tuple[Any, ...]


def compact(model: Any, optimizer: nnx.Optimizer, *, shrink: bool = False) -> None:
    """Removes pruned weights from every `ilajax.nn.Conv` of a model, and from the optimizer's state.

    In each filter, and in each slot that the optimizer keeps for it (moments, accumulators, gradients of
    `optax.MultiSteps`, low-passed biases, warnings), the live weights move to the front in their old order.
    Behind them stands padding: keys of padding, 0, and `pruned`. Slots are found by the parameter's path.

    By default shapes stay, so that nothing is compiled again and `compact` works inside `nnx.jit`; kernels
    stop at the padding. `shrink=True` cuts the arrays too, for memory and export: to the largest number of
    live weights, rounded up to a step of 1/8 of the power of two below it, at least 1. Each new length
    compiles a training step again, at most eight times while a filter shrinks to half.

    The network's outputs do not change by a bit. Neither does its training where the optimizer treats each
    weight by itself (Adagrad, Adam, momentum, ...); norms over all gradients lose the pruned weights' share.

    A filter that has padding at the start, say because `kernel` and `kernel_keys` were set by hand, gets it
    marked as pruned: call `compact` once before training. Without that, padding stays at 0 all the same (its
    gradient and its excess density are 0), and is pruned as any small weight is.

    Args:
      model: the NNX module, changed in place.
      optimizer: its `nnx.Optimizer`, made with `ilajax.optim.sparse_training` (or another chain that has
        `one_warning_shot_pruning` in it); changed in place.
      shrink: whether to shorten the arrays; not inside `nnx.jit`.

    Warns:
      UserWarning: if weights of anything but the filters are pruned, of dense layers or biases: they stay in
        place as zeros, and the network may no longer learn. `ilajax.optim.sparse_training` prunes filters
        alone. There is no warning inside `nnx.jit`, where values are not known yet.

    Raises:
      TypeError: if `optimizer` is not an `nnx.Optimizer`.
      ValueError: if it has no `one_warning_shot_pruning`, belongs to another model, keeps its state in a form
        that has no path (`optax.flatten`), or if `shrink` is asked for inside `nnx.jit`.

    Example:
      >>> model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      >>> recipe = ilajax.optim.sparse_training(model, optax.adam(1e-3), threshold=1e6)
      >>> optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
      >>> grads, excess = nnx.state(model, nnx.Param), ilajax.optim.excess_density(model)
      >>> for epoch in range(2):
      ...     _ = optimizer.update(model, grads, excess_density=excess, epoch_end=True)
      >>> ilajax.optim.compact(model, optimizer, shrink=True)
      >>> int(model.sparse_kernel.count), model.kernel.shape
      (0, (1,))

    Source: Hackel et al., section 3, "Parameter pruning".
    """
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(f"optimizer must be an nnx.Optimizer, got {type(optimizer).__name__}.")
    slots = list(_slots(optimizer))
    convs = list(iter_convs(model))
    _check_ties(convs)
    _warn_beyond_filters(slots, {(*path, "kernel") for path, _ in convs})
    for path, conv in convs:
        own = [slot for slot in slots if slot.path[: len(path) + 1] == (*path, "kernel")]
        _compact_kernel(conv, own, shrink)


class _Slot(NamedTuple):
    """One array of the optimizer's state that belongs to a parameter."""

    path: Path  # of the parameter, perhaps with more behind it
    variable: nnx.Variable
    is_pruned: bool


def _slots(optimizer: nnx.Optimizer) -> Iterator[_Slot]:
    """Every array in the optimizer's state that has a parameter's path."""
    pruning = _nodes(optimizer.opt_state, OneWarningShotPruningState)
    if not pruning:
        raise ValueError(
            "optimizer has no state of one_warning_shot_pruning, so nothing says which weights are "
            "pruned. Make its transformation with ilajax.optim.sparse_training(model, optimizer)."
        )
    pruned = {id(leaf) for state in pruning for leaf in _nodes(state.pruned, nnx.Variable)}
    # An Optax state holds trees like params where it has one array for each: in NNX these are nnx.State.
    for tree in _nodes(optimizer.opt_state, nnx.State):
        for path, variable in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
            # optax.masked puts an empty node into the variable of a parameter that it leaves out.
            if isinstance(variable.get_value(), optax.MaskedNode):
                continue
            yield _Slot(tuple(map(_plain_key, path)), variable, id(variable) in pruned)
    _check_no_flat_state(optimizer)


def _nodes(tree: Any, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _plain_key(key: Any) -> Any:
    """What stands in a path of NNX: the attribute's name, the index."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise TypeError(f"unknown kind of path key {key!r}.")


def _check_no_flat_state(optimizer: nnx.Optimizer) -> None:
    trees = _nodes(optimizer.opt_state, OneWarningShotPruningState)[0].pruned
    size = sum(leaf.size for leaf in jax.tree.leaves(trees))
    for leaf in jax.tree.leaves(
        optimizer.opt_state, is_leaf=lambda node: isinstance(node, nnx.State)
    ):
        if isinstance(leaf, nnx.State):
            continue
        if jnp.issubdtype(leaf.dtype, jnp.floating) and size in leaf.shape:
            raise ValueError(
                f"optimizer keeps one array of shape {leaf.shape} for all parameters (optax.flatten?), in "
                f"which no weight can be found by its path. Use an optimizer that keeps them apart."
            )


def _check_ties(convs: list[tuple[Path, Conv]]) -> None:
    keys_of: dict[int, Any] = {}
    for path, conv in convs:
        if keys_of.setdefault(id(conv.kernel), conv.kernel_keys) is not conv.kernel_keys:
            raise ValueError(
                f"the Conv at {path} shares its kernel with another one, but not its kernel_keys. Tie "
                f"both, or call the same Conv twice."
            )


def _warn_beyond_filters(slots: list[_Slot], filters: set[Path]) -> None:
    """One warning that names all parameters outside of `filters` that have lost weights."""
    marks = {s.path: s.variable[...] for s in slots if s.is_pruned and s.path not in filters}
    if any(isinstance(mark, jax.core.Tracer) for mark in marks.values()):
        return
    counts = jax.device_get([mark.sum() for mark in marks.values()])  # one wait for all
    hit = [
        f"{'.'.join(map(str, path))} ({count:,} of {mark.size:,})"
        for (path, mark), count in zip(marks.items(), counts, strict=True)
        if count
    ]
    if hit:
        warnings.warn(
            f"one_warning_shot_pruning has set weights to 0 for good that are not in the filter of an "
            f"ilajax.nn.Conv: {', '.join(hit)}. Nothing is saved by that, and the network may no longer "
            f"learn. Make the optimizer's transformation with ilajax.optim.sparse_training, or mask the "
            f"pruning: optax.masked(ilajax.optim.one_warning_shot_pruning(threshold), "
            f"ilajax.optim.filters(model)).",
            stacklevel=3,
        )


def _compact_kernel(conv: Conv, slots: list[_Slot], shrink: bool) -> None:
    keys, values = conv.kernel_keys[...], conv.kernel[...]
    padding = sites(conv.kernel_shape)
    removed = keys >= padding
    slots = [slot for slot in slots if _follows(slot, values)]
    for slot in slots:
        if slot.is_pruned:
            removed |= slot.variable[...]
    order = jnp.argsort(removed, axis=-1, stable=True)
    kept = ~jnp.take_along_axis(removed, order, axis=-1)
    length = _coarse_length(kept) if shrink else values.shape[-1]

    def reordered(a: jax.Array, fill: Any) -> jax.Array:
        # Leading axes belong to stacked layers (which order has too) or to histories as in L-BFGS.
        moved = jnp.take_along_axis(a, jnp.broadcast_to(order, a.shape), axis=-1)
        return jnp.where(kept, moved, jnp.asarray(fill, a.dtype))[..., :length]

    conv.kernel_keys.set_value(reordered(keys, padding))
    conv.kernel.set_value(reordered(values, 0))
    for slot in slots:
        slot.variable.set_value(reordered(slot.variable[...], slot.is_pruned))


def _follows(slot: _Slot, values: jax.Array) -> bool:
    """Whether the slot has an entry for each weight, perhaps with leading axes."""
    shape = slot.variable.shape
    if shape[max(0, len(shape) - values.ndim) :] == values.shape:
        return True
    # Some optimizers put a scalar or one element where they keep nothing for a parameter.
    if slot.variable.size <= 1:
        return False
    raise ValueError(
        f"optimizer keeps an array of shape {shape} for the parameter {slot.path}, whose shape is "
        f"{values.shape}. Was it made for another model, or before nn.refill? Then create it anew."
    )


def _coarse_length(kept: jax.Array) -> int:
    """The largest number of live weights, rounded up to one of eight lengths between powers of two."""
    if isinstance(kept, jax.core.Tracer):
        raise ValueError(
            "shrink=True changes shapes, which nnx.jit fixes. Call compact outside of it."
        )
    count = max(1, int(kept.sum(axis=-1).max()))
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return min(kept.shape[-1], -(-count // step) * step)
