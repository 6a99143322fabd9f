"""Filters in the references: live weights on a dense grid, and products that keep to the sparse rules."""

import jax
import jax.numpy as jnp

from ilajax.geometry import not_negative
from ilajax.ops._shapes import Array, Float32, Int32

# Which operands lead with the batch axis: keys and values do; kernel keys, weights and bias do not.
BATCHED = (True, True, False, False, False)


def dense_weights(
    keys: Int32[Array, " n"], values: Float32[Array, " n"], taps: int, cin: int, cout: int
) -> Float32[Array, "{cout} {cin} {taps}"]:
    """Live weights; padding is dropped, whatever its value is."""
    size = cout * cin * taps
    flat = jnp.zeros_like(values, shape=size)
    return flat.at[not_negative(keys, size)].set(values, mode="drop").reshape(cout, cin, taps)


def at_live_weights(
    keys: Int32[Array, " n"], dense: Float32[Array, "t i o"]
) -> Float32[Array, " n"]:
    """The entries of dense weights at the keys of live weights, 0 at padding."""
    flat = jnp.transpose(dense, (2, 1, 0)).reshape(-1)
    live = (keys >= 0) & (keys < flat.size)
    return jnp.where(live, flat[jnp.where(live, keys, 0)], 0)


def sum_products(a: jax.Array, b: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Sums a * b over `axis`; a zero factor adds nothing, not even against inf or NaN."""
    return jnp.sum(jnp.where((a != 0) & (b != 0), a * b, 0), axis=axis)
