"""A mask for Optax that selects the filters of the sparse layers."""

from typing import Any

from flax import nnx

from ilajax.nn.conv import iter_convs


def filters(model: Any, wrt: Any = nnx.Param) -> nnx.State:
    """Marks the filters of a model's `ilajax.nn.Conv` among all its parameters, for `optax.masked`.

    Biases and dense layers are left out. Biases start at 0 and wide dense layers close to it, so a rule made
    for filters would prune them away.

    The mask depends only on the model's structure, never on its weights. It still fits after
    `ilajax.optim.compact(..., shrink=True)`, and after weights have been restored from a checkpoint.

    Args:
      model: an NNX module with sparse layers anywhere in it.
      wrt: the filter that the optimizer is made with.

    Returns:
      A tree like `nnx.state(model, wrt)` of bools: True for the `kernel` of each `ilajax.nn.Conv`, also of a
      shared or stacked one, and False for the rest. It is an `nnx.State`, like the parameters in an
      `nnx.Optimizer`: `optax.masked` compares the types of both trees and accepts no plain dict.

    Example:
      >>> model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      >>> mask = ilajax.optim.filters(model)
      >>> mask['kernel'], mask['bias']
      (True, False)
      >>> slow_filters = optax.chain(optax.adam(1e-3), optax.masked(optax.scale(0.1), mask))
    """
    kernels = {(*path, "kernel") for path, _ in iter_convs(model)}
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
    return nnx.from_flat_state([(path, path in kernels) for path in paths])
