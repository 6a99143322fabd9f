"""Transposed sparse convolution, which goes up to a finer grid."""

from collections.abc import Sequence

import jax

from ilajax.geometry import Padding, conv_transpose_window
from ilajax.ops.conv import ConvResult, check_operands, convolve
from ilajax.sparse_kernel import SparseKernel
from ilajax.sparse_tensor import SparseTensor


def conv_transpose(
    x: SparseTensor,
    kernel: SparseKernel,
    bias: jax.Array | None = None,
    *,
    capacity: int | None = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    output_shape: Sequence[int] | None = None,
    select: str | None = None,
    select_by: str = "channel",
    support: str | SparseTensor = "dilate",
) -> ConvResult:
    """Convolves stored entries, spread `strides` sites apart, with live weights: the way to a finer grid.

    The response at output site o and output channel c is

      r[b, o, c] = sum over stored x[b, p, i] and live w[t, i, c] with p * stride = o + t * dilation - low,

    the numbers of `jax.lax.conv_transpose` with `transpose_kernel=False`. Bias, selection and gradient are
    those of `ilajax.conv`. With `support=skip`, a map from the way down, it is spconv's inverse convolution:
    responses at the very sites that a strided convolution has left.

    Args:
      x: [B, *S, Cin], own supports or a shared one.
      kernel: the filter, of shape (*window, Cin, Cout); it is not flipped.
      bias: float [Cout], or None.
      capacity: slots of the output, see `ilajax.capacity`; required under support="dilate".
      strides: steps between the input's sites on the output grid; one integer or one for each axis.
      padding: "SAME", "VALID", or a (low, high) pair for each axis, around the spread input.
      kernel_dilation: steps between taps; one integer or one for each axis.
      output_shape: the output grid; by default that of `jax.lax.conv_transpose`, with a given support that
        one's. Any grid that a convolution with these strides and padding maps to x's grid: with "SAME" and
        stride 2, a grid of 9 sites comes from one of 17 or 18.
      select, select_by: what is a candidate, and how it ranks; see `ilajax.conv`.
      support: "dilate", or a SparseTensor on the output grid, at whose sites responses are; see
        `ilajax.conv`.

    Returns:
      ConvResult(features, responses).

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> fine = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> kernel = ilajax.SparseKernel.from_dense(jnp.ones((3, 3, 1, 1)))
      >>> coarse, _ = ilajax.conv(fine, kernel, capacity=16, strides=2)
      >>> back, _ = ilajax.conv_transpose(coarse, kernel, strides=2, support=fine)
      >>> back.spatial_shape, back.keys is fine.keys
      ((8, 8), True)

    Source: the paper has no transposed convolution; algorithm 1 with the input spread apart.
    """
    check_operands(x, kernel, bias)
    if isinstance(support, SparseTensor) and output_shape is None:
        output_shape = support.spatial_shape
    window = conv_transpose_window(
        x.spatial_shape,
        kernel.window_shape,
        strides=strides,
        padding=padding,
        dilation=kernel_dilation,
        output_shape=output_shape,
    )
    if isinstance(support, str) and support == "input":
        raise ValueError(
            'support must be "dilate" or a SparseTensor, got "input": the output has a grid of its own.'
        )
    return convolve(window, x, kernel, bias, capacity, select, select_by, support)
