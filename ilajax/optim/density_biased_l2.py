"""L2 regularisation that pushes weights down if feature maps are too dense, and up if they are too sparse."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class DensityBiasedL2State(NamedTuple):
    """State of `density_biased_l2`.

    Attributes:
      bias: the low-passed bias b of each weight, float32 or wider; a tree like params.
    """

    bias: optax.Params


def density_biased_l2(
    scale: float, *, offset: float, b1: float, b2: float, momentum: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of scale / 2 * sum (w + b)^2, with b from the excess density, to the updates.

    This is a part of `ilajax.optim.sparse_training`. Train with that, and use this in chains of your own.

    With e = rho - rho_up, the density of a weight's output channel minus its bound,

      b_new = offset + b1 * e   if e > 0   (the channel exceeds its resources)
              b2 * e            else       (it leaves some unused)
      b <- momentum * b + (1 - momentum) * b_new, starting at 0
      update <- update + scale * (w + b)

    This pushes values, not magnitudes: the ReLU after a filter (`select="positive"`) turns lower weights into
    fewer responses. Put it first in a chain, so that the optimizer scales it like any gradient:

      >>> regulariser = ilajax.optim.density_biased_l2(0.1, offset=0.1, b1=0.1, b2=0.1)
      >>> tx = optax.chain(regulariser, optax.adagrad(1e-3))
      >>> model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> x = ilajax.from_dense(jnp.ones((1, 8, 1)), capacity=8)
      >>> grads = nnx.grad(lambda model: model(x).values.sum())(model)
      >>> excess = ilajax.optim.excess_density(model)
      >>> _ = optimizer.update(model, grads, excess_density=excess)

    Args:
      scale, offset, b1, b2: lambda, o, b1 and b2 of the paper, each 0 or more, see `sparse_training`.
      momentum: share of the old bias that is kept at each step, in [0, 1).

    Returns:
      A transformation `update(updates, state, params, *, excess_density)`. `excess_density` is a tree like
      params (or a prefix of one) whose leaves broadcast against the parameters, as
      `ilajax.optim.excess_density` returns it; None leaves the parameter alone.

    Raises:
      ValueError: if a number lies outside its range; in an update, if params are missing, or the trees or
        shapes do not fit together.

    Source: Hackel et al., section 3, "Adaptive density regularisation", equation 4. The low-pass is the
    authors' release's.
    """
    for name, value in {"scale": scale, "offset": offset, "b1": b1, "b2": b2}.items():
        # Hyperparameters injected by optax.inject_hyperparams are arrays: nothing to look at.
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number, 0 or more, got {value}.")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(
            f"momentum must lie in [0, 1), got {momentum}. 0 follows the densities at once."
        )
    tree_map = jax.tree_util.tree_map_with_path

    def init(params: optax.Params) -> DensityBiasedL2State:
        # A low-pass in bfloat16 would not move: its steps are below one part in 256.
        wide = lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))  # noqa: E731
        return DensityBiasedL2State(jax.tree.map(wide, params))

    def update(
        updates: optax.Updates,
        state: DensityBiasedL2State,
        params: optax.Params | None = None,
        *,
        excess_density: Any = _MISSING,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DensityBiasedL2State]:
        del extra_args
        if excess_density is _MISSING:
            raise TypeError(
                "excess_density is missing: density_biased_l2 needs it in each step. Call optimizer.update("
                "model, grads, excess_density=ilajax.optim.excess_density(model), epoch_end=...)."
            )
        if params is None:
            raise ValueError(
                "density_biased_l2 needs params: call update(updates, state, params, ...)."
            )
        tree_map(_check_made_for, state.bias, params)
        excess_at = _by_path(excess_density)

        def new_bias(path: Any, b: Any, g: Any, w: Any) -> Any:
            e = None if g is None else excess_at(path)
            if e is None:
                return b
            _check_broadcasts(path, e, w)
            e = jnp.asarray(e, b.dtype)
            target = jnp.where(e > 0, offset + b1 * e, b2 * e)
            return jnp.asarray(momentum * b + (1 - momentum) * target, b.dtype)

        def regularised(path: Any, b: Any, g: Any, w: Any) -> Any:
            if g is None or excess_at(path) is None:
                return g
            return jnp.asarray(g + scale * (w + b), g.dtype)

        bias = tree_map(new_bias, state.bias, updates, params)
        updates = tree_map(regularised, bias, updates, params)
        return updates, DensityBiasedL2State(bias)

    return optax.GradientTransformationExtraArgs(init, update)


# None would be a tree: no parameter has a bound.
_MISSING = object()


def _by_path(excess: Any) -> Callable[[Any], Any]:
    """Looks an excess density up by the path of a parameter or of a subtree that it is in.

    By path, not by structure: excess may be a dict where params are an nnx.State, and optax.masked takes
    leaves out of params but not out of excess.
    """
    leaves = dict(jax.tree_util.tree_leaves_with_path(excess, is_leaf=lambda leaf: leaf is None))

    def find(path: Any) -> Any:
        for depth in range(len(path), -1, -1):
            if path[:depth] in leaves:
                return leaves[path[:depth]]
        raise ValueError(
            f"excess_density must be a tree like params, but has no leaf for the parameter "
            f"{jax.tree_util.keystr(path)}. Read it off the model with ilajax.optim.excess_density, or give "
            f"None where there is no bound."
        )

    return find


def _check_made_for(path: Any, b: jax.Array, w: jax.Array) -> None:
    if b.shape != w.shape:
        raise ValueError(
            f"the optimizer's state for {jax.tree_util.keystr(path)} has shape {b.shape}, but the parameter "
            f"has shape {w.shape}. Was the model shortened, loaded or refilled alone? Create the "
            f"optimizer after that, or load both: ilajax.nn.load_state((model, optimizer), ...)."
        )


def _check_broadcasts(path: Any, e: Any, w: jax.Array) -> None:
    try:
        fits = jnp.broadcast_shapes(jnp.shape(e), w.shape) == w.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"excess_density of {jax.tree_util.keystr(path)} must broadcast against the parameter's shape "
            f"{w.shape}, got shape {jnp.shape(e)}. After ilajax.optim.compact(..., shrink=True) read it off "
            f"the model again."
        )
