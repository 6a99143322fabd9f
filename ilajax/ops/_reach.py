"""Sites that a filter of ones reaches: cells and unions, found by the kernels of the convolution."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ilajax.geometry import sites
from ilajax.ops.conv import ConvResult
from ilajax.sparse_kernel import SparseKernel
from ilajax.sparse_tensor import SparseTensor


def reached_keys(
    convolve: Callable[..., ConvResult],
    keys: jax.Array,
    spatial_shape: tuple[int, ...],
    window: Sequence[int],
    slots: int,
) -> jax.Array:
    """The sites that any of several lists reaches through any tap of a window, int32[B, C, slots].

    Args:
      convolve: `conv` or `conv_transpose` with its strides.
      keys: int32[B, C, L, K], for each sample and channel L lists on the grid `spatial_shape`.
      window: taps along each axis.
      slots: of the result, which must suffice.
    """
    ones = SparseKernel.from_dense(jnp.ones((*window, keys.shape[2], 1)))

    def of_sample(keys: jax.Array) -> jax.Array:
        """Its channels are samples of a batch; mapped, as a sharded axis stays where it is."""
        stored = (keys < sites(spatial_shape)).astype(jnp.float32)
        x = SparseTensor(keys, stored, spatial_shape)
        return convolve(x, ones, capacity=slots, select="magnitude").features.keys[:, 0]

    return jax.vmap(of_sample)(keys)
