"""Submanifold convolution: responses at the input's own sites, `conv` with support="input"."""

import functools

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window
from ilajax.ops import conv_at
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops.weights import BATCHED

_FORWARD, _BACKWARD = ffi.declare("submanifold")


def submanifold_conv(
    window: Window,
    keys: jax.Array,
    values: jax.Array,
    kernel_keys: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
) -> ffi.Outputs:
    """Responses [B, Cout, K] of shared keys [B, 1, K], and how many are not zero, int32[B, Cout].

    See `ilajax.conv` for the semantics. The source is Graham et al., "Submanifold sparse convolutional
    networks"; the paper cites it as [11].
    """
    operands = (keys, values, kernel_keys, weights, bias)
    return _submanifold(window, *ffi.place(operands, BATCHED))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _submanifold(window: Window, *operands: jax.Array) -> ffi.Outputs:
    return _forward(window, *operands)


def _forward(
    window: Window,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    bias: Float32[Array, " o"],
) -> ffi.Outputs:
    return ffi.dispatch(
        _FORWARD,
        functools.partial(_forward_reference, window),
        (keys, values, kernel_keys, weights, bias),
        BATCHED,
        (
            ffi.result((bias.size, values.shape[2]), values.dtype),
            ffi.result((bias.size,), jnp.int32),
        ),
        window=window,
    )


def _vjp_forward(window, keys, values, kernel_keys, weights, bias):
    outputs = _forward(window, keys, values, kernel_keys, weights, bias)
    return outputs, (keys, values, kernel_keys, weights)


def _vjp_backward(window, residuals, cotangents):
    """That of `conv`, where the kept outputs are the input's own sites."""
    keys, values, kernel_keys, weights = residuals
    values_bar, weights_bar, bias_bar = ffi.dispatch(
        _BACKWARD,
        functools.partial(_backward_reference, window),
        (keys, values, kernel_keys, weights, cotangents[0]),
        (True, True, False, False, True),
        (ffi.result(values.shape[1:], values.dtype),),
        (ffi.result(weights.shape, jnp.float32), ffi.result(cotangents[0].shape[1:2], jnp.float32)),
        window=window,
    )
    return None, values_bar, None, weights_bar[0], bias_bar[0]


_submanifold.defvjp(_vjp_forward, _vjp_backward)


def _forward_reference(
    window: Window, keys: jax.Array, values: jax.Array, *weights: jax.Array
) -> ffi.Outputs:
    return conv_at.forward_reference(window, keys, values, keys, *weights)


def _backward_reference(
    window: Window, keys: jax.Array, values: jax.Array, *rest: jax.Array
) -> ffi.Outputs:
    return conv_at.backward_reference(window, keys, values, keys, *rest)
