"""Convolution at given sites: `conv` and `conv_transpose` with a support that the user gives."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops._supports import at_slots, over_one_support, shared_union
from ilajax.ops.weights import at_live_weights, dense_weights, sum_products
from ilajax.sparse_tensor import SparseTensor

_TARGETS = ffi.declare("conv_at")


def conv_at(
    window: Window,
    x: SparseTensor,
    support: SparseTensor,
    kernel_keys: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
) -> tuple[SparseTensor, jax.Array]:
    """Responses at the sites of a support, with its keys, and how many are not zero, int32[B, Cout].

    See `ilajax.conv` for the semantics. MinkowskiEngine calls it a generalised sparse convolution; with the
    support of an earlier layer, `conv_transpose` is spconv's inverse convolution.
    """
    x = over_one_support(x)
    if support.shared:
        operands = (x.keys, x.values, support.keys, kernel_keys, weights, bias)
        values, responses = at_sites(_TARGETS, window, *operands)
        return SparseTensor(support.keys, values, support.spatial_shape), responses
    # All channels at the sites of all, then each at its own. The bias comes last, since responses count
    # where they are not zero without it, and values are rounded once.
    keys, moves = shared_union(support)
    filter_ = (kernel_keys, weights, jnp.zeros_like(bias))
    onto_all, _ = at_sites(_TARGETS, window, x.keys, x.values.astype(jnp.float32), keys, *filter_)
    response = at_slots(onto_all, moves)
    values = jnp.where(response != 0, response + bias[:, None], 0).astype(x.dtype)
    responses = jnp.sum(response != 0, axis=2, dtype=jnp.int32)
    return SparseTensor(support.keys, values, support.spatial_shape), responses


def at_sites(targets: tuple[str, str], window: Window, *operands: jax.Array) -> ffi.Outputs:
    """Responses [B, Cout, K] at given sites, and how many are not zero, int32[B, Cout].

    Args:
      targets: the targets' names, forward and backward.
      window: the geometry.
      operands: shared keys, values, the output's shared keys, kernel keys, weights and bias. Without the
        output's keys, which such targets do not take, the sites are the input's own.
    """
    batched = (*(True,) * (len(operands) - 3), False, False, False)
    return _at_sites(targets, window, *ffi.place(operands, batched))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_sites(targets: tuple[str, str], window: Window, *operands: jax.Array) -> ffi.Outputs:
    return _forward(targets, window, *operands)


def _forward(targets, window, keys, values, *rest):
    *given, kernel_keys, weights, bias = rest
    slots = (*given, keys)[0].shape[2]
    return ffi.dispatch(
        targets[0],
        _reference(_forward_reference, window, own=not given),
        (keys, values, *given, kernel_keys, weights, bias),
        (True, True, *(True for _ in given), False, False, False),
        (ffi.result((bias.size, slots), values.dtype), ffi.result((bias.size,), jnp.int32)),
        window=window,
        mapped=ffi.SiteMap(window, 0, 2 if given else 0),
    )


def _vjp_forward(targets, window, *operands):
    return _forward(targets, window, *operands), operands[:-1]


def _vjp_backward(targets, window, residuals, cotangents):
    """That of `conv`, where the kept outputs are the given sites."""
    keys, values, *given, kernel_keys, weights = residuals
    operands = (keys, values, *given, kernel_keys, weights, cotangents[0])
    values_bar, weights_bar, bias_bar = _gradients(targets, window, *operands)
    return None, values_bar, *(None for _ in given), None, weights_bar, bias_bar


def gradients_at(window: Window, *operands: jax.Array) -> ffi.Outputs:
    """The gradients of values, weights and bias, from cotangents at given sites.

    Args:
      window: the geometry.
      operands: shared keys, values, the output's shared keys, kernel keys, weights and the cotangents.
    """
    return _gradients(_TARGETS, window, *operands)


def _gradients(targets, window, keys, values, *rest):
    *given, kernel_keys, weights, cotangent = rest
    values_bar, weights_bar, bias_bar = ffi.dispatch(
        targets[1],
        _reference(_backward_reference, window, own=not given),
        (keys, values, *given, kernel_keys, weights, cotangent),
        (True, True, *(True for _ in given), False, False, True),
        (ffi.result(values.shape[1:], values.dtype),),
        (ffi.result(weights.shape, jnp.float32), ffi.result(cotangent.shape[1:2], jnp.float32)),
        window=window,
        mapped=ffi.SiteMap(window.reversed(), 2 if given else 0, 0),
    )
    return values_bar, weights_bar[0], bias_bar[0]


_at_sites.defvjp(_vjp_forward, _vjp_backward)


# --- The reference: one tap at a time, with a search for the sites that it reads ---------------------------


def _reference(
    function: Callable[..., ffi.Outputs], window: Window, own: bool
) -> Callable[..., ffi.Outputs]:
    """A function of a target's operands: those at the input's own sites have no keys of the output."""
    if own:
        return lambda keys, values, *rest: function(window, keys, values, keys, *rest)
    return functools.partial(function, window)


def _forward_reference(
    window: Window,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    out_keys: Int32[Array, "b 1 q"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    bias: Float32[Array, " o"],
) -> tuple[Float[Array, "b o q"], Int32[Array, "b o"]]:
    x = _stored(keys, values, window.input_sites)
    w = dense_weights(kernel_keys, weights, window.taps, x.shape[1], bias.size)

    def add_tap(total, tap):
        seen = _values_at(keys, x, window.input_keys(out_keys, tap))  # [B, Cin, Q]
        return total + sum_products(seen[:, None], w[:, :, tap, None], axis=2), None

    total = jnp.zeros((x.shape[0], bias.size, out_keys.shape[2]), jnp.float32)
    total = ffi.vary_together(total, x, w, out_keys)[0]
    response, _ = jax.lax.scan(add_tap, total, jnp.arange(window.taps))
    response = _stored(out_keys, response, window.output_sites)
    responses = jnp.sum(response != 0, axis=2, dtype=jnp.int32)
    features = jnp.where(response != 0, response + bias[:, None], 0).astype(values.dtype)
    return features, responses


def _backward_reference(
    window: Window,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    out_keys: Int32[Array, "b 1 q"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    cotangent: Float[Array, "b o q"],
) -> tuple[Float[Array, "b i k"], Float32[Array, "1 n"], Float32[Array, "1 o"]]:
    x = _stored(keys, values, window.input_sites)
    g = _stored(out_keys, cotangent, window.output_sites)
    w = dense_weights(kernel_keys, weights, window.taps, x.shape[1], g.shape[1])

    def add_tap(x_bar, tap):
        seen = _values_at(out_keys, g, window.output_keys(keys, tap))  # [B, Cout, K]
        x_bar += sum_products(seen[:, None], w[:, :, tap].T[..., None], axis=2)
        return x_bar, sum_products(x[:, :, None], seen[:, None], axis=(0, 3))

    start = ffi.vary_together(jnp.zeros_like(x), g, w)[0]
    x_bar, w_bar = jax.lax.scan(add_tap, start, jnp.arange(window.taps))
    x_bar = _stored(keys, x_bar, window.input_sites).astype(values.dtype)
    return x_bar, at_live_weights(kernel_keys, w_bar)[None], jnp.sum(g, axis=(0, 2))[None]


def _stored(
    keys: Int32[Array, "b 1 k"], values: Float[Array, "b c k"], sites: int
) -> Float32[Array, "b c k"]:
    """The values in float32, 0 at padding whatever stands there."""
    return jnp.where((keys >= 0) & (keys < sites), values.astype(jnp.float32), 0)


def _values_at(
    keys: Int32[Array, "b 1 k"], values: Float[Array, "b c k"], sites: Int32[Array, "b 1 q"]
) -> Float[Array, "b c q"]:
    """The values at the slots whose keys equal `sites`, else 0."""
    search = jax.vmap(functools.partial(jnp.searchsorted, method="sort"))
    slot = jnp.minimum(search(keys[:, 0], sites[:, 0]), keys.shape[2] - 1)[:, None]
    found = jnp.take_along_axis(keys, slot, axis=2) == sites
    return jnp.where(found, jnp.take_along_axis(values, slot, axis=2), 0)
