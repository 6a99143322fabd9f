"""Direct sparse convolution with attention: the paper's algorithms 1 and 2."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import Padding, Window, conv_window, spread_apart
from ilajax.ops._responses import on_grid, responses_on_grid
from ilajax.ops._shapes import Array, Float, Float32, Int32
from ilajax.ops.conv_at import conv_at
from ilajax.ops.conv_by_site import conv_by_site
from ilajax.ops.k_select import (
    check_capacity,
    check_select,
    check_select_by,
    select_reference,
)
from ilajax.ops.submanifold import submanifold_conv
from ilajax.ops.weights import BATCHED, at_live_weights, dense_weights, sum_products
from ilajax.sparse_kernel import SparseKernel
from ilajax.sparse_tensor import VALUE_DTYPES, SparseTensor, check_sparse

_FORWARD, _BACKWARD = ffi.declare("conv")


class ConvResult(NamedTuple):
    """What `conv` returns.

    Attributes:
      features: the output feature map.
      responses: int32[B, Cout], under select_by="site" int32[B, 1], the candidates before the selection:
        where it exceeds the capacity, the selection cut.
    """

    features: SparseTensor
    responses: jax.Array


def conv(
    x: SparseTensor,
    kernel: SparseKernel,
    bias: jax.Array | None = None,
    *,
    capacity: int | None = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    select: str | None = None,
    select_by: str = "channel",
    support: str | SparseTensor = "dilate",
) -> ConvResult:
    """Convolves stored entries with live weights and keeps the strongest responses.

    The response at output site o and output channel c is

      r[b, o, c] = sum over stored x[b, p, i] and live w[t, i, c] with p = o * stride + t * dilation - low,

    the cross-correlation of `jax.lax.conv_general_dilated`. Non-zero responses get the bias, zero ones do
    not. Of the candidates the `capacity` best of each sample and output channel are kept; of equal ranks the
    lower key. Sums are in float32, and a zero factor adds nothing, not even against inf or NaN. A response
    is rounded to the dtype of x once, after the bias; candidates and ranks are taken from that value.

    The gradient is the paper's equation 3: it flows from the kept outputs to the stored inputs, the live
    weights and the bias (the sum over kept outputs), and nowhere else, so that every cotangent has the shape
    of its primal.

    Args:
      x: [B, *S, Cin], own supports or a shared one.
      kernel: the filter, of shape (*window, Cin, Cout), used in float32.
      bias: float [Cout], or None.
      capacity: slots of the output, see `ilajax.capacity`; required under support="dilate".
      strides: steps between output sites; one integer or one for each axis.
      padding: "SAME", "VALID", or a (low, high) pair for each axis.
      kernel_dilation: steps between taps; one integer or one for each axis.
      select: what is a candidate, and how it ranks.
        "value": all non-zero responses, by value (the paper's version i).
        "positive" (the default): those above 0 after the bias, by value: version i with the ReLU fused in.
        "magnitude": all non-zero responses, by absolute value (version ii).
        NaN is a candidate in every mode and ranks first, so that a diverging network shows it.
      select_by: who selects.
        "channel": each output channel by itself; each has keys of its own.
        "site": all channels together, and the output has a shared support, so that networks of shared
        supports can stride and dilate under a hard bound. `select` is "positive" or "magnitude", and says
        what passes: under "positive" 0 for a response not above 0. Sites rank by the sum of squares, over
        the channels, of what passes; where nothing does there is no candidate. See `ilajax.k_select`.
      support: where responses are.
        "dilate": wherever a window finds a stored entry, the paper's convolution.
        "input": at the input's own sites, zeros too, with the input's keys: a submanifold convolution. It
        needs a shared support, stride 1 and padding "SAME".
        A SparseTensor on the output grid: at exactly its sites, zeros too, with its keys, shared or one list
        for each output channel; its values do not matter. So two layers write onto one support.
        The last two take neither capacity nor select and select_by.

    Returns:
      ConvResult(features, responses).

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> kernel = ilajax.SparseKernel.from_dense(jnp.ones((3, 3, 1, 4)))
      >>> features, responses = ilajax.conv(x, kernel, capacity=16)
      >>> features.shape, int(responses[0, 0])
      ((1, 8, 8, 4), 34)

    Source: Hackel et al., algorithms 1 and 2, "Preserving sparsity with attention", equation 3.
    """
    check_operands(x, kernel, bias)
    window = conv_window(
        x.spatial_shape,
        kernel.window_shape,
        strides=strides,
        padding=padding,
        dilation=kernel_dilation,
    )
    if isinstance(support, str) and support == "input":
        check_no_selection('support="input"', capacity, select, select_by)
        _check_submanifold(x, window, padding)
        values, responses = submanifold_conv(window, x.keys, x.values, *_weights(kernel, bias))
        return ConvResult(x.with_values(values), responses)
    return convolve(window, x, kernel, bias, capacity, select, select_by, support)


def convolve(
    window: Window,
    x: SparseTensor,
    kernel: SparseKernel,
    bias: jax.Array | None,
    capacity: int | None,
    select: str | None,
    select_by: str,
    support: str | SparseTensor,
) -> ConvResult:
    """What `conv` and `conv_transpose` do once they have a window: select, or respond at given sites."""
    weights = _weights(kernel, bias)
    if isinstance(support, SparseTensor):
        check_no_selection("a given support", capacity, select, select_by)
        _check_given(support, x, window, kernel)
        return ConvResult(*conv_at(window, x, support, *weights))
    check_support(support)
    if capacity is None:
        raise ValueError(
            'capacity is required under support="dilate", got None. For a share of the output sites use '
            "ilajax.capacity(density_bound, output_shape)."
        )
    check_select_by(select_by, select)
    select = "positive" if select is None else select
    check_select(select)
    capacity = check_capacity(capacity)
    if select_by == "site":
        return ConvResult(*conv_by_site(window, capacity, select, x, *weights))
    keys, window = spread_apart(x.keys, window)
    config = _Config(window, capacity, select)
    operands = ffi.place((keys, x.values, *weights), BATCHED)
    keys, values, responses = _conv(config, *operands)
    return ConvResult(SparseTensor(keys, values, window.output_shape), responses)


def check_support(support: object, supports: Sequence[str] = ("dilate", "input")) -> None:
    if not isinstance(support, str) or support not in supports:
        raise ValueError(
            f"support must be one of {tuple(supports)}, got {support!r}. A submanifold convolution, which "
            f'responds at the sites of its input only, is "input"; one that reaches new sites is "dilate".'
        )


def check_operands(x: SparseTensor, kernel: SparseKernel, bias: jax.Array | None) -> None:
    check_sparse("x", x)
    _check_kernel(x, kernel)
    if bias is not None:
        _check_bias(bias, kernel)


def check_no_selection(
    support: str, bound: float | None, select: str | None, select_by: str, name: str = "capacity"
) -> None:
    """Raises ValueError if an argument of the selection is given where nothing is selected."""
    check_select_by(select_by, None)
    given = {
        name: bound,
        "select": select,
        "select_by": None if select_by == "channel" else select_by,
    }
    for argument, value in given.items():
        if value is not None:
            raise ValueError(
                f"{argument} does not apply under {support}, where all responses at its sites are kept; got "
                f"{value!r}. Leave it out."
            )


def _weights(
    kernel: SparseKernel, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if bias is None:
        bias = jnp.zeros(kernel.out_channels, jnp.float32)
    return kernel.keys, kernel.values.astype(jnp.float32), bias.astype(jnp.float32)


def _check_kernel(x: SparseTensor, kernel: object) -> None:
    if not isinstance(kernel, SparseKernel):
        raise TypeError(
            f"kernel must be an ilajax.SparseKernel, got {type(kernel).__name__}. Make one with "
            f"ilajax.SparseKernel.from_dense."
        )
    if kernel.in_channels != x.channels:
        raise ValueError(
            f"kernel of shape {kernel.shape} reads {kernel.in_channels} channels, but x has {x.channels}. "
            f"The last two axes of a kernel are (Cin, Cout)."
        )


def _check_bias(bias: jax.Array, kernel: SparseKernel) -> None:
    if not hasattr(bias, "shape") or not hasattr(bias, "dtype"):
        raise TypeError(f"bias must be an array or None, got {type(bias).__name__}.")
    if bias.shape != (kernel.out_channels,):
        raise ValueError(
            f"bias must have shape ({kernel.out_channels},), one for each output channel, got {bias.shape}."
        )
    if bias.dtype not in VALUE_DTYPES:
        raise TypeError(f"bias must be float32, bfloat16 or float16, got {bias.dtype}.")


def _check_given(
    support: SparseTensor, x: SparseTensor, window: Window, kernel: SparseKernel
) -> None:
    check_sparse("support", support)
    if support.batch_size != x.batch_size:
        raise ValueError(
            f"support must have as many samples as x, {x.batch_size}, got {support.batch_size}."
        )
    if support.spatial_shape != window.output_shape:
        raise ValueError(
            f"support must stand on the output grid, {window.output_shape} with these strides and padding, "
            f"got a support on {support.spatial_shape}."
        )
    if not support.shared and support.channels != kernel.out_channels:
        raise ValueError(
            f"support must be shared, or have keys for each of the {kernel.out_channels} output channels, "
            f"got keys of {support.channels}."
        )


def _check_submanifold(x: SparseTensor, window: Window, padding: Padding) -> None:
    if not x.shared:
        raise ValueError(
            'x must have a shared support under support="input", got keys that differ by channel: a layer '
            "with a density bound selects for each channel by itself, as k_select and from_dense do, unless "
            'it is told to select_by="site". Or put submanifold layers in front of it, on the shared support '
            "that ilajax.from_points gives."
        )
    if set(window.strides) != {1} or not (isinstance(padding, str) and padding.upper() == "SAME"):
        raise ValueError(
            f'strides must be 1 and padding "SAME" under support="input", got strides {window.strides} and '
            f"padding {padding!r}."
        )


@dataclasses.dataclass(frozen=True)
class _Config:
    window: Window
    capacity: int
    select: str


class _Outputs(NamedTuple):
    keys: Int32[Array, "b o q"]
    values: Float[Array, "b o q"]
    responses: Int32[Array, "b o"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(config: _Config, *operands: jax.Array) -> _Outputs:
    return _forward(config, *operands)


def _forward(
    config: _Config,
    keys: Int32[Array, "b ck k"],
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
                ffi.result((bias.size, config.capacity), jnp.int32),
                ffi.result((bias.size, config.capacity), values.dtype),
                ffi.result((bias.size,), jnp.int32),
            ),
            window=config.window,
            select=config.select,
        )
    )


def _vjp_forward(config, keys, values, kernel_keys, weights, bias):
    outputs = _forward(config, keys, values, kernel_keys, weights, bias)
    return outputs, (keys, values, kernel_keys, weights, outputs.keys)


def _vjp_backward(config, residuals, cotangents):
    """The paper's equation 3, with g[b, o, c] the cotangents of the kept outputs, 0 elsewhere:

    x_bar[b, p, i] = sum over live w[t, i, c] of w[t, i, c] * g[b, o, c]
    w_bar[t, i, c] = sum over stored x[b, p, i] of x[b, p, i] * g[b, o, c]
    bias_bar[c] = sum over b, o of g[b, o, c]

    where tap t of output site o reads p = o * stride + t * dilation - low; x_bar at stored inputs alone,
    w_bar at live weights alone.
    """
    keys, values, kernel_keys, weights, out_keys = residuals
    values_bar, weights_bar, bias_bar = ffi.dispatch(
        _BACKWARD,
        functools.partial(_backward_reference, config),
        (keys, values, kernel_keys, weights, out_keys, cotangents.values),
        (True, True, False, False, True, True),
        (ffi.result(values.shape[1:], values.dtype),),
        (
            ffi.result(weights.shape, jnp.float32),
            ffi.result(out_keys.shape[1:2], jnp.float32),
        ),
        window=config.window,
    )
    # One group: the sum over the whole batch.
    return None, values_bar, None, weights_bar[0], bias_bar[0]


_conv.defvjp(_vjp_forward, _vjp_backward)


# --- The reference: algorithms 1 and 2 over dense grids, one tap at a time ---------------------------------


def _forward_reference(
    config: _Config,
    keys: Int32[Array, "b ck k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    bias: Float32[Array, " o"],
) -> tuple[Int32[Array, "b o q"], Float[Array, "b o q"], Int32[Array, "b o"]]:
    window = config.window
    response = responses_on_grid(window, keys, values, kernel_keys, weights, bias.size)
    rounded = (response + bias[:, None]).astype(values.dtype)
    candidate = response != 0
    if config.select == "positive":
        candidate &= (rounded > 0) | jnp.isnan(rounded)
    every_site = jnp.arange(window.output_sites, dtype=jnp.int32)
    sites = jnp.broadcast_to(every_site, rounded.shape)
    selected = select_reference(
        sites, rounded, candidate, window.output_sites, config.capacity, config.select
    )
    return *selected, jnp.sum(candidate, axis=2, dtype=jnp.int32)


def _backward_reference(
    config: _Config,
    keys: Int32[Array, "b ck k"],
    values: Float[Array, "b i k"],
    kernel_keys: Int32[Array, " n"],
    weights: Float32[Array, " n"],
    output_keys: Int32[Array, "b o q"],
    cotangent: Float[Array, "b o q"],
) -> tuple[Float[Array, "b i k"], Float32[Array, "1 n"], Float32[Array, "1 o"]]:
    window = config.window
    x = jnp.where((keys >= 0) & (keys < window.input_sites), values.astype(jnp.float32), 0)
    keys = jnp.broadcast_to(keys, x.shape)
    out_channels = cotangent.shape[1]
    w = dense_weights(kernel_keys, weights, window.taps, x.shape[1], out_channels)
    g = on_grid(output_keys, cotangent.astype(jnp.float32), window.output_sites)
    bias = jnp.sum(g, axis=(0, 2))
    g = jnp.pad(g, [(0, 0), (0, 0), (0, 1)])  # what an entry sends outside the grid
    stored = (keys >= 0) & (keys < window.input_sites)

    def add_tap(x_bar, tap):
        # The cotangents that each stored entry reaches, [B, Cin, Cout, K].
        reached = window.output_keys(keys, tap)
        seen = jax.vmap(lambda planes, site: jnp.moveaxis(planes[:, site], 0, 1))(g, reached)
        x_bar += sum_products(seen, w[:, :, tap].T[:, :, None], axis=2)
        return x_bar, sum_products(seen, x[:, :, None], axis=(0, 3))

    start = ffi.vary_together(jnp.zeros_like(x), g, w)[0]
    x_bar, w_bar = jax.lax.scan(add_tap, start, jnp.arange(window.taps))  # w_bar [taps, Cin, Cout]
    x_bar = jnp.where(stored, x_bar, 0).astype(values.dtype)
    return x_bar, at_live_weights(kernel_keys, w_bar)[None], bias[None]
