"""The dense convolution of the blocks after the sparse ones.

On the CPU one matrix product over patches is faster than XLA's own convolution, and with few sites left the
patches are small. Everywhere else XLA's is used.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ilajax.geometry import sites

_MOST_PATCHES = 64 << 20  # bytes


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` as `flax.nnx.Conv` calls it for its default arguments.

    lhs [B, *S, Cin] * rhs [*window, Cin, Cout] -> [B, *S, Cout], by a window of 3 along each axis, with
    padding "SAME".
    """

    def by_xla(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)

    patches = lhs.shape[0] * sites(lhs.shape[1:-1]) * math.prod(rhs.shape[:-1])
    if patches * lhs.dtype.itemsize > _MOST_PATCHES:
        return by_xla(lhs, rhs)
    return lax.platform_dependent(lhs, rhs, cpu=_by_patches, default=by_xla)


def _by_patches(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    batch, *shape, channels = lhs.shape
    padded = jnp.pad(lhs, ((0, 0), *(((1, 1),) * len(shape)), (0, 0)))
    patches = jnp.concatenate(
        [
            lax.slice(
                padded, (0, *tap, 0), (batch, *map(sum, zip(tap, shape, strict=True)), channels)
            )
            for tap in itertools.product(*map(range, rhs.shape[:-2]))
        ],
        axis=-1,
    )
    rows = patches.reshape(batch * sites(tuple(shape)), -1)
    return (rows @ rhs.reshape(-1, rhs.shape[-1])).reshape(batch, *shape, rhs.shape[-1])
