"""Takes pruned weights out of filters and out of the optimizer's state."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ilajax.geometry import sites
from ilajax.nn.conv import Conv, iter_convs
from ilajax.nn.slots import Path, dotted, iter_slots, tree_nodes
from ilajax.optim.one_warning_shot_pruning import OneWarningShotPruningState
from ilajax.sparse_kernel import check_kernel_keys


def compact(model: Any, optimizer: nnx.Optimizer, *, shrink: bool = False) -> None:
    """Removes pruned weights from every `ilajax.nn.Conv` of a model, and from the optimizer's state.

    In each filter, and in each slot that the optimizer keeps for it (moments, accumulators, gradients of
    `optax.MultiSteps`, low-passed biases, warnings), the live weights move to the front in their old order.
    Padding follows: keys of padding, 0, and `pruned`. Slots are found by the parameter's path.

    By default shapes stay, so nothing is recompiled and `compact` works inside `nnx.jit`; kernels stop at the
    padding. `shrink=True` also cuts the arrays, for memory and export: to the largest number of live weights,
    rounded up to a step of 1/8 of the power of two below it, at least 1. Each new length compiles the
    training step again, at most eight times while a filter shrinks to half.

    The network computes the same as before, up to the order in which its float32 sums are formed: a kernel
    chooses its form by the number of live weights. Sums that float32 represents exactly do not change by a
    bit. Others change in their last digits, and a response whose rank ties with the selection's cut to that
    accuracy may be replaced by another. The same holds for training if the optimizer treats each weight
    separately (Adagrad, Adam, momentum, ...); norms over all gradients lose the pruned weights' share.

    Only zeros are removed. A pruned weight that is not 0 was moved by something after the pruning in the
    chain (momentum, weight decay, a scaling) or by hand, which raises. Inside `nnx.jit`, where values are not
    known yet, such a weight stays stored and keeps its mark, so that the next call outside raises.

    If a filter has padding at the start, say because `kernel` and `kernel_keys` were set by hand, call
    `compact` once before training, which marks the padding as pruned. Without that, padding still stays at 0
    (its gradient and its excess density are 0), and is pruned like any small weight.

    Args:
      model: the NNX module, changed in place.
      optimizer: its `nnx.Optimizer`, made with `ilajax.optim.sparse_training` (or another chain that has
        `one_warning_shot_pruning` in it); changed in place.
      shrink: whether to shorten the arrays; not inside `nnx.jit`.

    Warns:
      UserWarning: if weights outside the filters are pruned, such as those of dense layers or biases. They
        stay in place as zeros, and the network may no longer learn. `ilajax.optim.sparse_training` prunes
        filters only. There is no warning inside `nnx.jit`, where values are not known yet.

    Raises:
      TypeError: if `optimizer` is not an `nnx.Optimizer`.
      ValueError: if it has no `one_warning_shot_pruning`, belongs to another model, keeps its state in a form
        that has no path (`optax.flatten`), if pruned weights are not 0, `kernel_keys` are out of order, or if
        `shrink` is asked for inside `nnx.jit`. Nothing is changed then.

    Example:
      >>> model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      >>> recipe = ilajax.optim.sparse_training(model, optax.adam(1e-3), threshold=1e6)
      >>> optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
      >>> _ = model(ilajax.from_dense(jnp.ones((1, 8, 1)), capacity=8))
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
    filters = [_Filter(path, conv, _own(path, conv, slots)) for path, conv in convs]
    _check_only_zeros(filters)
    for f in filters:
        _compact_kernel(f, shrink)


class _Slot(NamedTuple):
    """One array of the optimizer's state that belongs to a parameter."""

    path: Path  # of the parameter, perhaps with more after it
    variable: nnx.Variable
    is_pruned: bool


class _Filter(NamedTuple):
    """A layer, and the optimizer's arrays with an entry for each of its stored weights."""

    path: Path
    conv: Conv
    slots: list[_Slot]


def _slots(optimizer: nnx.Optimizer) -> list[_Slot]:
    """Every array in the optimizer's state that has a parameter's path."""
    pruning = tree_nodes(optimizer.opt_state, OneWarningShotPruningState)
    if not pruning:
        raise ValueError(
            "optimizer has no state of one_warning_shot_pruning, so nothing says which weights are "
            "pruned. Make its transformation with ilajax.optim.sparse_training(model, optimizer)."
        )
    _check_no_flat_state(optimizer, pruning[0].pruned)
    pruned = {id(leaf) for state in pruning for leaf in tree_nodes(state.pruned, nnx.Variable)}
    return [
        _Slot(path, variable, id(variable) in pruned) for path, variable in iter_slots(optimizer)
    ]


def _check_no_flat_state(optimizer: nnx.Optimizer, pruned: Any) -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(pruned))
    for leaf in jax.tree.leaves(optimizer.opt_state, is_leaf=lambda n: isinstance(n, nnx.State)):
        one_for_all = not isinstance(leaf, nnx.State) and size in leaf.shape
        if one_for_all and jnp.issubdtype(leaf.dtype, jnp.floating):
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
    """Gives one warning that names all parameters outside `filters` that have lost weights."""
    marks = {s.path: s.variable[...] for s in slots if s.is_pruned and s.path not in filters}
    if any(isinstance(mark, jax.core.Tracer) for mark in marks.values()):
        return
    counts = jax.device_get([mark.sum() for mark in marks.values()])  # one wait for all
    hit = [
        f"{dotted(path)} ({count:,} of {mark.size:,})"
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


def _own(path: Path, conv: Conv, slots: list[_Slot]) -> list[_Slot]:
    """The slots of a layer's filter that have an entry for each weight."""
    name, values = (*path, "kernel"), conv.kernel[...]
    return [slot for slot in slots if slot.path[: len(name)] == name and _follows(slot, values)]


def _check_only_zeros(filters: list[_Filter]) -> None:
    """Raises if a pruned weight is not 0, or keys are out of order; does not look inside `nnx.jit`."""
    looked_at = [(f.conv.kernel_keys[...], _pruned(f), _moved(f)) for f in filters]
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(looked_at)):
        return
    # One wait for all.
    sums = jax.device_get([(pruned.sum(), moved.sum()) for _, pruned, moved in looked_at])
    moved = [
        f"{dotted((*f.path, 'kernel'))} ({count:,} of {pruned:,} pruned)"
        for f, (pruned, count) in zip(filters, sums, strict=True)
        if count
    ]
    if moved:
        raise ValueError(
            f"weights that one_warning_shot_pruning has set to 0 for good are not 0: {', '.join(moved)}. To "
            f"remove them would change the network. Something after the pruning in the chain (momentum, "
            f"weight decay, a scaling) moves them: put one_warning_shot_pruning last, as "
            f"ilajax.optim.sparse_training does. Where weights were set by hand, create the optimizer anew."
        )
    for f in filters:
        name = dotted((*f.path, "kernel_keys"))
        check_kernel_keys(name, f.conv.kernel_keys[...], f.conv.kernel_shape)


def _pruned(f: _Filter) -> jax.Array:
    """Which of the stored weights are pruned; padding is not stored."""
    pruned = jnp.zeros(f.conv.kernel.shape, bool)
    for slot in f.slots:
        if slot.is_pruned:
            pruned |= slot.variable[...]
    return pruned & (f.conv.kernel_keys[...] < sites(f.conv.kernel_shape))


def _moved(f: _Filter) -> jax.Array:
    """Which of the pruned weights are not 0 any more."""
    return _pruned(f) & (f.conv.kernel[...] != 0)


def _compact_kernel(f: _Filter, shrink: bool) -> None:
    conv, slots = f.conv, f.slots
    keys, values = conv.kernel_keys[...], conv.kernel[...]
    padding = sites(conv.kernel_shape)
    removed = (keys >= padding) | (_pruned(f) & ~_moved(f))
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
    # Some optimizers keep a scalar or one element for a parameter for which they need nothing.
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
