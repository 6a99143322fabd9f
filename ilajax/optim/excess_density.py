"""Reads off a model how far its densities stand above or below their bounds."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ilajax.geometry import sites
from ilajax.nn.conv import Conv, iter_convs


def excess_density(model: Any, wrt: Any = nnx.Param) -> Any:
    """The excess density e = rho - rho_up of every parameter's output channel.

    rho is what each `ilajax.nn.Conv` measured in its last call, rho_up its density bound; before the first
    call rho is 0. Each step of `ilajax.optim.sparse_training` asks for it. It works under `nnx.jit`.

    Args:
      model: an NNX module, sparse layers anywhere in it.
      wrt: the filter that the optimizer was made with.

    Returns:
      A tree like `nnx.state(model, wrt)`, of plain arrays: for the kernel of a bounded `Conv` float32[N], e
      of each stored weight's output channel (0 at padding), for its bias float32[Cout], and None for every
      parameter without a bound: dense layers, and `Conv` with support="input".

    Example:
      >>> model = ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0))
      >>> ilajax.optim.excess_density(model)['bias']
      Array([-0.5, -0.5], dtype=float32)

    Source: Hackel et al., section 3, "Adaptive density regularisation".
    """
    excess = {}
    for path, conv in iter_convs(model):
        if conv.density_bound is not None:
            of_channel = conv.density[...] - conv.density_bound
            excess[*path, "bias"] = of_channel
            excess[*path, "kernel"] = _of_weight(conv, of_channel)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
    return nnx.from_flat_state([(path, excess.get(path)) for path in paths])


def _of_weight(conv: Conv, of_channel: jax.Array) -> jax.Array:
    keys = conv.kernel_keys[...]
    weights_per_channel = sites(conv.kernel_shape[:-1])
    channel = jnp.clip(keys // weights_per_channel, 0, conv.out_features - 1)
    live = keys < sites(conv.kernel_shape)
    return jnp.where(live, jnp.take_along_axis(of_channel, channel, axis=-1), 0)
