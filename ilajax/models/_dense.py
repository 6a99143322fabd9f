"""What the blocks after the sparse ones compute: convolution and max pooling of dense arrays [B, *S, C].

Both are Flax's, in forms that take less time on a CPU.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ilajax.ffi import routes
from ilajax.geometry import conv_window
from ilajax.ops.submanifold import submanifold_conv


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` as `flax.nnx.Conv` calls it for its default arguments.

    lhs [B, *S, Cin] * rhs [*window, Cin, Cout] -> [B, *S, Cout], with padding "SAME". On a CPU that
    of volumes runs on ilajax's kernel, where it is installed; that of planes is as quick by XLA.
    """

    def by_xla(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)

    volume_on_cpu = lhs.ndim == 5 and routes.default_platform() == "cpu"
    if not volume_on_cpu or routes.route("submanifold", "cpu").runs != "kernel":
        return by_xla(lhs, rhs)
    return lax.platform_dependent(lhs, rhs, cpu=_by_kernel, default=by_xla)


def _by_kernel(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A submanifold convolution whose input stores every site.

    As there, a factor of 0 adds nothing, not even against inf or NaN.
    """
    batch, *shape, cin = lhs.shape
    window = conv_window(tuple(shape), rhs.shape[:-2])
    keys = jnp.arange(window.input_sites, dtype=jnp.int32)
    values = lhs.reshape(batch, keys.size, cin).swapaxes(1, 2)
    weights = rhs.reshape(window.taps, cin, -1).transpose(2, 1, 0).astype(jnp.float32)
    y, _ = submanifold_conv(
        window,
        jnp.broadcast_to(keys, (batch, 1, keys.size)),
        values,
        jnp.arange(weights.size, dtype=jnp.int32),
        weights.reshape(-1),
        jnp.zeros(weights.shape[:1], jnp.float32),
    )
    return y.swapaxes(1, 2).reshape(*lhs.shape[:-1], rhs.shape[-1])


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """[B, *S, C] -> [B, *(S // 2), C]: `flax.nnx.max_pool` with a window and strides of 2.

    The gradient goes to the first of a window's largest values, as XLA has it, but without the indices and
    the scatter that XLA makes of it on the CPU.
    """
    window = (1, *(2,) * (x.ndim - 2), 1)
    return lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, window, window, "VALID")


def _max_pool_backward(operands: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    x, y = operands
    halves = y.shape[1:-1]
    taps = tuple(itertools.product((0, 1), repeat=len(halves)))
    taken = jnp.zeros(y.shape, bool)
    gradients = []
    for tap in taps:
        ends = (t + 2 * half - 1 for t, half in zip(tap, halves, strict=True))
        strides = (1, *(2,) * len(halves), 1)
        there = lax.slice(x, (0, *tap, 0), (x.shape[0], *ends, x.shape[-1]), strides)
        first = ((there == y) | jnp.isnan(there)) & ~taken
        taken |= first
        gradients.append(jnp.where(first, g, 0))
    # [*taps, B, *halves, C] with each axis of taps behind that of its halves.
    stacked = jnp.stack(gradients).reshape(*(2,) * len(halves), *y.shape)
    rank = len(halves)
    order = [
        rank,
        *itertools.chain(*((rank + 1 + axis, axis) for axis in range(rank))),
        2 * rank + 1,
    ]
    even = stacked.transpose(order).reshape(x.shape[0], *(2 * half for half in halves), x.shape[-1])
    odd = ((0, size - 2 * half) for size, half in zip(x.shape[1:-1], halves, strict=True))
    return (jnp.pad(even, ((0, 0), *odd, (0, 0))),)


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool(x)
    return y, (x, y)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
