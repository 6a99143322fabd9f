"""Submanifold convolution: responses at the input's own sites, `conv` with support="input"."""

import functools

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window
from ilajax.ops._shapes import Array, Bool, Float, Float32, Int32
from ilajax.ops.weights import BATCHED, at_live_weights, dense_weights, sum_products

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
    window: Window,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    bias: Float32[Array, " o"],
) -> tuple[Float[Array, "b o k"], Int32[Array, "b o"]]:
    x = _stored(window, keys, values)
    w = dense_weights(kernel_keys, weights, window.taps, x.shape[1], bias.size)

    def add_tap(total, tap):
        seen = _at_sites(keys, x, window.input_keys(keys, tap))  # [B, Cin, K]
        return total + sum_products(seen[:, None], w[:, :, tap, None], axis=2), None

    total = jnp.zeros((x.shape[0], bias.size, x.shape[2]), jnp.float32)
    total = ffi.vary_together(total, x, w)[0]
    response, _ = jax.lax.scan(add_tap, total, jnp.arange(window.taps))
    response = jnp.where(_inside(window, keys), response, 0)
    responses = jnp.sum(response != 0, axis=2, dtype=jnp.int32)
    features = jnp.where(response != 0, response + bias[:, None], 0).astype(values.dtype)
    return features, responses


def _backward_reference(
    window: Window,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    cotangent: Float[Array, "b o k"],
) -> tuple[Float[Array, "b i k"], Float32[Array, "1 n"], Float32[Array, "1 o"]]:
    x = _stored(window, keys, values)
    g = _stored(window, keys, cotangent)
    w = dense_weights(kernel_keys, weights, window.taps, x.shape[1], g.shape[1])

    def add_tap(x_bar, tap):
        seen = _at_sites(keys, g, window.output_keys(keys, tap))  # [B, Cout, K]
        x_bar += sum_products(seen[:, None], w[:, :, tap].T[..., None], axis=2)
        return x_bar, sum_products(x[:, :, None], seen[:, None], axis=(0, 3))

    start = ffi.vary_together(jnp.zeros_like(x), g, w)[0]
    x_bar, w_bar = jax.lax.scan(add_tap, start, jnp.arange(window.taps))
    x_bar = jnp.where(_inside(window, keys), x_bar, 0).astype(values.dtype)
    return x_bar, at_live_weights(kernel_keys, w_bar)[None], jnp.sum(g, axis=(0, 2))[None]


def _inside(window: Window, keys: Int32[Array, "b 1 k"]) -> Bool[Array, "b 1 k"]:
    return (keys >= 0) & (keys < window.input_sites)


def _stored(
    window: Window, keys: Int32[Array, "b 1 k"], values: Float[Array, "b c k"]
) -> Float32[Array, "b c k"]:
    """The values in float32, 0 at padding whatever stands there."""
    return jnp.where(_inside(window, keys), values.astype(jnp.float32), 0)


def _at_sites(
    keys: Int32[Array, "b 1 k"], values: Float[Array, "b c k"], sites: Int32[Array, "b 1 k"]
) -> Float[Array, "b c k"]:
    """The values at the slots whose shared keys equal `sites`, else 0."""
    search = jax.vmap(functools.partial(jnp.searchsorted, method="sort"))
    slot = jnp.minimum(search(keys[:, 0], sites[:, 0]), keys.shape[2] - 1)[:, None]
    found = jnp.take_along_axis(keys, slot, axis=2) == sites
    return jnp.where(found, jnp.take_along_axis(values, slot, axis=2), 0)
