"""Pruning of weights that are small at the ends of two epochs in a row."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class OneWarningShotPruningState(NamedTuple):
    """State of `one_warning_shot_pruning`: two trees like params.

    Attributes:
      warned: bool, whether a weight was below the threshold at the last epoch's end.
      pruned: bool, whether a weight is gone for good.
    """

    warned: optax.Params
    pruned: optax.Params


def one_warning_shot_pruning(threshold: float) -> optax.GradientTransformationExtraArgs:
    """Sets weights to 0 for good that are below a threshold at the ends of two epochs in a row.

    This is a part of `ilajax.optim.sparse_training`. Train with that: it prunes only the filters of
    `ilajax.nn.Conv`. Alone, this prunes every parameter that it gets: wide dense layers, whose weights all
    start small, and biases, which start at 0, would be gone for good at the end of the second epoch. In a
    chain of your own, mask it:

      >>> model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      >>> pruning = ilajax.optim.one_warning_shot_pruning(1e-3)
      >>> pruning = optax.masked(pruning, ilajax.optim.filters(model))
      >>> optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-3), pruning), wrt=nnx.Param)

    At an epoch's end (`epoch_end=True`) each weight w is looked at as it is before this step's update:

      |w| < threshold and not warned:  it is warned
      |w| < threshold and warned:      it is pruned, its update is exactly -w
      otherwise:                       it loses its warning

    and from then on the update of a pruned weight is 0. One small value is not enough to prune: the weight
    may be passing through zero on its way to the other sign. NaN is never pruned.

    **It must come last in a chain.** An optimizer after it would scale the update -w, and its momentum or
    weight decay would move pruned weights away from 0 again. Before it, they do no harm. A pruned weight that
    is not 0 raises at an epoch's end, and in `ilajax.optim.compact`; under `jit`, where values are not known
    yet, only in `compact`.

    It works on any tree of parameters; weights of dense layers stay in place as zeros. `ilajax.optim.compact`
    takes the pruned weights of sparse layers out of storage.

    Args:
      threshold: magnitude below which a weight counts as small, 0 (nothing is pruned) or more.

    Returns:
      A transformation `update(updates, state, params, *, epoch_end)`. `epoch_end` is a bool and may be
      traced, so one compiled step serves all steps of an epoch. Inside `optax.MultiSteps`, state changes only
      in steps that emit an update, so `epoch_end` must be True in one of these.

    Raises:
      ValueError: if the threshold is negative or not finite; in an update, if params are missing, or at an
        epoch's end outside `jit` if weights that were pruned are not 0.
      TypeError: in an update, if `epoch_end` is not a bool.

    Example:
      >>> pruning = ilajax.optim.one_warning_shot_pruning(0.5)
      >>> params, updates = jnp.array([0.25, 1.0]), jnp.zeros(2)
      >>> state = pruning.init(params)
      >>> for epoch in range(2):
      ...     updates, state = pruning.update(updates, state, params, epoch_end=True)
      >>> optax.apply_updates(params, updates)
      Array([0., 1.], dtype=float32)

    Source: Hackel et al., section 3, "Parameter pruning".
    """
    # A threshold injected by optax.inject_hyperparams is an array, which is not checked.
    if isinstance(threshold, int | float) and not (0 <= threshold < math.inf):
        raise ValueError(f"threshold must be a finite number, 0 or more, got {threshold}.")

    def init(params: optax.Params) -> OneWarningShotPruningState:
        # Two sets of buffers, so that a jitted step may donate both.
        none_yet = (jax.tree.map(lambda w: jnp.zeros(w.shape, bool), params) for _ in range(2))
        return OneWarningShotPruningState(*none_yet)

    def update(
        updates: optax.Updates,
        state: OneWarningShotPruningState,
        params: optax.Params | None = None,
        *,
        epoch_end: bool | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OneWarningShotPruningState]:
        del extra_args
        if params is None:
            raise ValueError(
                "one_warning_shot_pruning needs params: call update(updates, state, params, ...)."
            )
        if epoch_end is None:
            raise TypeError(
                "epoch_end is missing: one_warning_shot_pruning needs it in each step, True in the last one "
                "of an epoch. Call optimizer.update(model, grads, "
                "excess_density=ilajax.optim.excess_density(model), epoch_end=...)."
            )
        ends = jnp.asarray(epoch_end)
        if ends.dtype != jnp.bool_ or ends.shape:
            raise TypeError(f"epoch_end must be a bool, got {ends.dtype} of shape {ends.shape}.")
        _check_nothing_moved(ends, state.pruned, params)

        small = jax.tree.map(lambda w: jnp.abs(w) < threshold, params)
        warned = jax.tree.map(lambda s, was: jnp.where(ends, s, was), small, state.warned)
        twice = jax.tree.map(lambda s, was: ends & s & was, small, state.warned)
        pruned = jax.tree.map(jnp.logical_or, state.pruned, twice)

        def held(now: jax.Array, before: jax.Array, u: Any, w: jax.Array) -> Any:
            if u is None:
                return None
            # -w of a float32 weight would not be exact in a bfloat16 update.
            u = u.astype(jnp.promote_types(u.dtype, w.dtype))
            return jnp.where(now, jnp.where(before, 0, -w.astype(u.dtype)), u)

        updates = jax.tree.map(held, pruned, state.pruned, updates, params)
        return updates, OneWarningShotPruningState(warned, pruned)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_nothing_moved(ends: jax.Array, pruned: optax.Params, params: optax.Params) -> None:
    """Raises if pruned weights are not 0; between epochs and under `jit` it neither looks nor waits."""
    arrays = jax.tree.leaves((ends, pruned, params))
    if any(isinstance(array, jax.core.Tracer) for array in arrays) or not ends:
        return
    # Inside a trace they may be concrete too: optax.apply_if_finite puts the chain into a jax.lax.cond.
    with jax.ensure_compile_time_eval():
        moved = jax.device_get(jax.tree.map(lambda p, w: jnp.sum(p & (w != 0)), pruned, params))
    named = [
        f"{jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')} ({count:,})"
        for path, count in jax.tree_util.tree_leaves_with_path(moved)
        if count
    ]
    if named:
        raise ValueError(
            f"weights that one_warning_shot_pruning has set to 0 for good are not 0: {', '.join(named)}. "
            f"What stands behind it in the chain (momentum, weight decay, a scaling) moves them: put "
            f"one_warning_shot_pruning last, as ilajax.optim.sparse_training does. Where weights were set "
            f"by hand, create the optimizer's state anew."
        )
