"""Reads from a model how far its densities are above or below their bounds."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ilajax.geometry import sites
from ilajax.nn.conv import Conv, iter_convs
from ilajax.nn.slots import dotted


def excess_density(model: Any, wrt: Any = nnx.Param) -> Any:
    """The excess density e = rho - rho_up of every parameter's output channel.

    rho is what each `ilajax.nn.Conv` measured in its last call in training, and rho_up is its density bound.
    Each step of `ilajax.optim.sparse_training` needs e. This works under `nnx.jit`. If a layer has measured
    nothing yet, that raises. Under `jit`, where values are not known, e is then 0, which pushes no weight up
    or down (`ilajax.optim.density_biased_l2` becomes plain L2).

    Args:
      model: an NNX module, sparse layers anywhere in it.
      wrt: the filter that the optimizer was made with.

    Returns:
      A tree like `nnx.state(model, wrt)`, of plain arrays: for the kernel of a bounded `Conv` float32[N], e
      of each stored weight's output channel (0 at padding), for its bias float32[Cout], and None for every
      parameter without a bound: dense layers, and `Conv` with support="input".

    Raises:
      ValueError: if a bounded `Conv` with parameters in `wrt` has measured nothing yet.

    Example:
      >>> options = {"density_bound": 0.5, "kernel_init": nnx.initializers.ones}
      >>> model = ilajax.nn.Conv(1, 2, (1,), **options, rngs=nnx.Rngs(0))
      >>> _ = model(ilajax.from_dense(jnp.ones((1, 8, 1)), capacity=8))
      >>> ilajax.optim.excess_density(model)['bias']
      Array([0.5, 0.5], dtype=float32)

    Source: Hackel et al., section 3, "Adaptive density regularisation".
    """
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
    of_parameters = {path[:-1] for path in paths}
    densities, excess = {}, {}
    for path, conv in iter_convs(model):
        if conv.density_bound is None or path not in of_parameters:
            continue
        densities[path] = density = conv.density[...]
        of_channel = jnp.where(density < 0, 0, density - conv.density_bound)
        excess[*path, "bias"] = of_channel
        excess[*path, "kernel"] = _of_weight(conv, of_channel)
    _check_measured(densities)
    return nnx.from_flat_state([(path, excess.get(path)) for path in paths])


def _check_measured(densities: dict[tuple[Any, ...], jax.Array]) -> None:
    """Checks what is concrete; under `jit` too, if the model is closed over."""
    concrete = {p: d for p, d in densities.items() if not isinstance(d, jax.core.Tracer)}
    values = jax.device_get(list(concrete.values()))  # one wait for all
    unknown = [
        dotted(("model", *path))
        for path, density in zip(concrete, values, strict=True)
        if (density < 0).any()
    ]
    if unknown:
        raise ValueError(
            f"model must have measured its densities, but these layers have not: {', '.join(unknown)}. Call "
            f"the model in training, not after model.eval(), before excess_density, and let the measurement "
            f"out: by nnx.grad or nnx.value_and_grad; with jax.grad, by nnx.merge(..., copy=True) and by "
            f"returning nnx.state(model, ilajax.nn.Density) with the loss."
        )


def _of_weight(conv: Conv, of_channel: jax.Array) -> jax.Array:
    keys = conv.kernel_keys[...]
    weights_per_channel = sites(conv.kernel_shape[:-1])
    channel = jnp.clip(keys // weights_per_channel, 0, conv.out_features - 1)
    live = keys < sites(conv.kernel_shape)
    return jnp.where(live, jnp.take_along_axis(of_channel, channel, axis=-1), 0)
