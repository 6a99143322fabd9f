"""Convolution with attention to whole sites: `conv` and `conv_transpose` with select_by="site"."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window
from ilajax.ops._responses import responses_on_grid
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops._supports import over_one_support
from ilajax.ops.conv_at import gradients_at
from ilajax.ops.k_select import passed, select_sites_reference
from ilajax.ops.weights import BATCHED
from ilajax.sparse_tensor import SparseTensor

_FORWARD, _ = ffi.declare("conv_by_site")


def conv_by_site(
    window: Window, capacity: int, select: str, x: SparseTensor, *weights: jax.Array
) -> tuple[SparseTensor, jax.Array]:
    """The strongest sites' responses, with one support for all channels, and the candidates, int32[B, 1].

    See `ilajax.conv` for the semantics; `weights` are kernel keys, weights and bias.
    """
    x = over_one_support(x)
    operands = ffi.place((x.keys, x.values, *weights), BATCHED)
    keys, values, responses = _conv(_Config(window, capacity, select), *operands)
    return SparseTensor(keys, values, window.output_shape), responses


@dataclasses.dataclass(frozen=True)
class _Config:
    window: Window
    capacity: int
    select: str


class _Outputs(NamedTuple):
    keys: Int32[Array, "b 1 q"]
    values: Float[Array, "b o q"]
    responses: Int32[Array, "b 1"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(config: _Config, *operands: jax.Array) -> _Outputs:
    return _forward(config, *operands)


def _forward(
    config: _Config,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    bias: Float32[Array, " o"],
) -> _Outputs:
    return _Outputs(
        *ffi.dispatch(
            _FORWARD,
            functools.partial(_forward_reference, config),
            (keys, values, kernel_keys, weights, bias),
            BATCHED,
            (
                ffi.result((1, config.capacity), jnp.int32),
                ffi.result((bias.size, config.capacity), values.dtype),
                ffi.result((1,), jnp.int32),
            ),
            window=config.window,
            select=config.select,
        )
    )


def _vjp_forward(config, keys, values, kernel_keys, weights, bias):
    outputs = _forward(config, keys, values, kernel_keys, weights, bias)
    return outputs, (keys, values, kernel_keys, weights, outputs.keys, outputs.values)


def _vjp_backward(config, residuals, cotangents):
    """That of `conv`, where the kept outputs are the kept sites and, under "positive", what passed there."""
    keys, values, kernel_keys, weights, out_keys, out_values = residuals
    g = cotangents.values
    if config.select == "positive":
        g = jnp.where(out_values == 0, 0, g)
    operands = (keys, values, out_keys, kernel_keys, weights, g)
    values_bar, weights_bar, bias_bar = gradients_at(config.window, *operands)
    return None, values_bar, None, weights_bar, bias_bar


_conv.defvjp(_vjp_forward, _vjp_backward)


# --- The reference: all responses on the grid, then the selection ------------------------------------------


def _forward_reference(
    config: _Config,
    keys: Int32[Array, "b 1 k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    bias: Float32[Array, " o"],
) -> tuple[Int32[Array, "b 1 q"], Float[Array, "b o q"], Int32[Array, "b 1"]]:
    response = responses_on_grid(config.window, keys, values, kernel_keys, weights, bias.size)
    with_bias = jnp.where(response != 0, response + bias[:, None], 0).astype(values.dtype)
    p = passed(with_bias, config.select)
    every_site = jnp.arange(config.window.output_sites, dtype=jnp.int32)[None, None]
    every_site = jnp.broadcast_to(every_site, (p.shape[0], 1, p.shape[2]))
    selected = select_sites_reference(every_site, p, config.window.output_sites, config.capacity)
    return *selected, jnp.sum(jnp.any(p != 0, axis=1, keepdims=True), axis=2, dtype=jnp.int32)
