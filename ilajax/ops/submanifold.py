"""Submanifold convolution: responses at the input's own sites, `conv` with support="input"."""

import jax

from ilajax import ffi
from ilajax.geometry import Window
from ilajax.ops.conv_at import at_sites

_TARGETS = ffi.declare("submanifold")


def submanifold_conv(
    window: Window,
    keys: jax.Array,
    values: jax.Array,
    kernel_keys: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
) -> ffi.Outputs:
    """Responses [B, Cout, K] of shared keys [B, 1, K], and how many are not zero, int32[B, Cout].

    See `ilajax.conv` for the semantics, and ops/conv_at.py for the gradient and the reference. The source is
    Graham et al., "Submanifold sparse convolutional networks"; the paper cites it as [11].
    """
    return at_sites(_TARGETS, window, keys, values, kernel_keys, weights, bias)
