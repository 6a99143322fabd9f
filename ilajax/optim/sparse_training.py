"""The training recipe: regulariser, optimizer and pruning in the right order and in the right places."""

from typing import Any

import jax
import optax
from flax import nnx

from ilajax.nn.conv import iter_convs
from ilajax.optim.density_biased_l2 import density_biased_l2
from ilajax.optim.filters import filters
from ilajax.optim.one_warning_shot_pruning import one_warning_shot_pruning


def sparse_training(
    model: Any,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    scale: float = 0.003,
    offset: float = 0.1,
    b1: float = 0.1,
    b2: float = 0.1,
    threshold: float = 0.03,
    momentum: float = 0.0,
    wrt: Any = nnx.Param,
) -> optax.GradientTransformationExtraArgs:
    """The whole recipe for training sparse layers, around any Optax optimizer.

    One chain, whose order matters:

      1. `density_biased_l2` adds scale * (w + b) to the gradients of each `ilajax.nn.Conv`, its bias too,
         where b depends on how far the densities are above or below their bounds.
      2. `optimizer` turns gradients into updates.
      3. `one_warning_shot_pruning` sets weights to 0 for good that are below `threshold` at the ends of two
         epochs in a row, **only in the filters of `ilajax.nn.Conv`**. Elsewhere it would do harm: a wide
         dense layer starts with all its weights below the threshold, and biases start at 0.

    Each step passes the measured densities and whether an epoch ends. Once an epoch, `ilajax.optim.compact`
    takes pruned weights out of storage:

      >>> model = ilajax.nn.Conv(1, 8, (3,), density_bound=0.25, rngs=nnx.Rngs(0))
      >>> recipe = ilajax.optim.sparse_training(model, optax.adagrad(0.01))
      >>> optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, epoch_end):
      ...     grads = nnx.grad(lambda model: model(x).values.sum())(model)
      ...     excess = ilajax.optim.excess_density(model)
      ...     optimizer.update(model, grads, excess_density=excess, epoch_end=epoch_end)
      >>> x, steps = ilajax.from_dense(jnp.ones((1, 8, 1)), capacity=8), 10
      >>> for epoch in range(2):
      ...     for step in range(steps):
      ...         train_step(model, optimizer, x, step == steps - 1)
      ...     ilajax.optim.compact(model, optimizer)

    Args:
      model: the NNX module to be trained, with an `ilajax.nn.Conv` anywhere in it. Only its structure is
        read, so it may be restored or compacted afterwards.
      optimizer: any Optax optimizer; if it is an `optax.MultiSteps`, epochs may end at any step.
      scale: strength of the regularisation, lambda, 0 (none) or more.
      offset: additional bias where a bound is exceeded, o, 0 or more.
      b1: bias for each unit of density above the bound, 0 or more.
      b2: bias for each unit of density below it, 0 or more.
      threshold: magnitude below which a filter's weight counts as small, 0 (nothing is pruned) or more.
      momentum: share of the regulariser's old bias that is kept at each step, in [0, 1).
      wrt: the filter that the `nnx.Optimizer` is made with.

    Returns:
      A transformation `update(updates, state, params, *, excess_density, epoch_end, **extra_args)`, which
      passes all extra arguments to `optimizer` too.

    Raises:
      TypeError: if `optimizer` is not an Optax transformation.
      ValueError: if `model` has no `ilajax.nn.Conv` whose filter `wrt` selects, or a number is out of range.

    Source: Hackel et al., section 3, "Adaptive density regularisation" and "Parameter pruning".
    """
    if isinstance(optimizer, optax.MultiSteps):
        # Its own gradient_transformation() would keep extra arguments from what it wraps.
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an Optax transformation, as optax.adagrad(0.01) makes one, got "
            f"{type(optimizer).__name__}. The nnx.Optimizer goes around the result: "
            f"nnx.Optimizer(model, sparse_training(model, optax.adagrad(0.01)), wrt=nnx.Param)."
        )
    mask = filters(model, wrt)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"model must have an ilajax.nn.Conv whose filter wrt selects, but this {type(model).__name__} "
            f"has none: there is nothing to prune. Give the module that holds the sparse layers, or train "
            f"with optimizer alone."
        )
    regulariser = density_biased_l2(scale, offset=offset, b1=b1, b2=b2, momentum=momentum)
    return optax.chain(
        # No state for parameters without a bound: a wide dense layer's would be as large as all the rest.
        optax.masked(regulariser, _bounded(model, wrt)),
        optimizer,
        optax.masked(one_warning_shot_pruning(threshold), mask),
    )


def _bounded(model: Any, wrt: Any) -> nnx.State:
    """A mask of the parameters whose density has a bound, see `filters`."""
    layers = {path for path, conv in iter_convs(model) if conv.density_bound is not None}
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
    return nnx.from_flat_state([(path, path[:-1] in layers) for path in paths])
