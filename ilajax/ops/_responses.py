"""Responses on the whole output grid, as references see them."""

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Window
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops.weights import dense_weights, sum_products


def responses_on_grid(
    window: Window,
    keys: Int32[Array, "b ck k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    out_channels: int,
) -> Float32[Array, "b {out_channels} {window.output_sites}"]:
    """The sums of products at every output site, without a bias, one tap at a time."""
    x = on_grid(keys, values.astype(jnp.float32), window.input_sites)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, 1)])  # what a tap reads outside the grid
    w = dense_weights(kernel_keys, weights, window.taps, x.shape[1], out_channels)
    every_site = jnp.arange(window.output_sites, dtype=jnp.int32)

    def add_tap(total, tap):
        seen = x[:, :, window.input_keys(every_site, tap)]  # [B, Cin, output_sites]
        return total + sum_products(seen[:, None], w[:, :, tap, None], axis=2), None

    total = jnp.zeros((x.shape[0], out_channels, window.output_sites), jnp.float32)
    total = ffi.vary_together(total, x, w)[0]
    return jax.lax.scan(add_tap, total, jnp.arange(window.taps))[0]


def on_grid(
    keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"], sites: int
) -> Float[Array, "b c {sites}"]:
    """Stored values on the grid; keys outside it are dropped."""
    keys = jnp.broadcast_to(jnp.where(keys < 0, sites, keys), values.shape)
    scatter = jax.vmap(jax.vmap(lambda k, v: jnp.zeros(sites, v.dtype).at[k].set(v, mode="drop")))
    return scatter(keys, values)
