"""Window arithmetic: grids, windows and flat keys, as pure functions of static shapes."""

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Padding = str | Sequence[tuple[int, int]]

MAX_SITES = 2**31 - 1


def sites(spatial_shape: Sequence[int]) -> int:
    """Number of sites of a grid, which is also the key that marks padding."""
    return math.prod(spatial_shape)


def positive(argument: str, value: object, what: str = "", advice: str = "") -> int:
    """The value as an int; TypeError, which says what is meant, or ValueError unless it is at least 1."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument} must be an integer{what}, got {value!r}.{advice}") from None
    if count < 1:
        raise ValueError(f"{argument} must be at least 1, got {count}.")
    return count


def check_spatial_shape(spatial_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the grid's shape as a tuple of ints.

    Raises:
      TypeError: if an axis is not an integer.
      ValueError: if there is no axis, an axis is shorter than 1, or the grid has 2**31 sites or more.
    """
    try:
        shape = tuple(operator.index(size) for size in spatial_shape)
    except TypeError:
        raise TypeError(
            f"spatial_shape must be a sequence of integers, got {spatial_shape!r}."
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(
            f"spatial_shape must have at least one axis and every axis at least one site, got {shape}."
        )
    if sites(shape) > MAX_SITES:
        raise ValueError(
            f"spatial_shape {shape} has {sites(shape)} sites, but keys are int32 and allow at most "
            f"2**31 - 1. Use a coarser grid, or split it into parts along the batch axis."
        )
    return shape


def capacity(density_bound: float, spatial_shape: Sequence[int]) -> int:
    """Slots that a density bound allows for each sample and channel.

    This is `max(1, floor(density_bound * sites))`, where a product within rounding error of a whole number
    counts as that number: 0.29 of 100 sites is 29.

    Args:
      density_bound: the upper bound on the share of stored sites, in (0, 1].
      spatial_shape: the grid.

    Returns:
      The capacity K, the number of slots of each (batch, channel) segment.

    Raises:
      TypeError: if the bound is not one number.
      ValueError: if the bound lies outside (0, 1] or the grid is not valid.

    Example:
      >>> capacity(0.1, (10, 10, 10))
      100
    """
    try:
        bound = float(density_bound)
    except (TypeError, ValueError):
        raise TypeError(
            f"density_bound must be one number in (0, 1], got {density_bound!r}. Each layer has a bound of "
            f"its own, known before tracing, which holds for every channel."
        ) from None
    if not 0.0 < bound <= 1.0:
        raise ValueError(
            f"density_bound must lie in (0, 1], got {density_bound!r}. It is the share of the grid's "
            f"sites that may be stored; 1 stores them all."
        )
    count = sites(check_spatial_shape(spatial_shape))
    # float64 errs by one part in 2**53; 1e-12 of the largest grid is 2e-3 of a site.
    return max(1, math.floor(bound * count * (1 + 1e-12)))


def per_axis(argument: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One positive integer for each axis, from a sequence or from one integer for all."""
    try:
        values = (operator.index(value),) * rank  # type: ignore[arg-type]
    except TypeError:
        try:
            values = tuple(operator.index(v) for v in value)  # type: ignore[union-attr]
        except TypeError:
            raise TypeError(
                f"{argument} must be an integer or a sequence of {rank} integers, got {value!r}."
            ) from None
    if len(values) != rank:
        raise ValueError(
            f"{argument} must have one entry for each of the {rank} spatial axes, got {values}."
        )
    if min(values) < 1:
        raise ValueError(f"{argument} must be at least 1 along every axis, got {values}.")
    return values


def check_padding(padding: Padding, rank: int) -> Padding:
    """Returns the padding's name unchanged, or its pairs as a tuple of pairs, which is hashable.

    Raises:
      TypeError: if it is neither a name nor a sequence of pairs of integers.
      ValueError: if the name is unknown, or the pairs are not one for each axis.
    """
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or a (low, high) pair for each spatial axis, "
                f"got {padding!r}."
            )
        return padding
    try:
        pads = tuple((operator.index(low), operator.index(high)) for low, high in padding)
    except (TypeError, ValueError):
        raise TypeError(
            f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or a sequence of (low, high) pairs of integers, "
            f"got {padding!r}.{_pairs_for(padding, rank)}"
        ) from None
    if len(pads) != rank:
        raise ValueError(
            f"padding must have one (low, high) pair for each of the {rank} spatial axes, got {pads}."
        )
    return pads


def _pairs_for(padding: object, rank: int) -> str:
    """Advice if padding is one integer, or one for each axis, as in other libraries."""
    sides = (padding,) * rank if isinstance(padding, int) else padding
    if not isinstance(sides, list | tuple) or len(sides) != rank:
        return ""
    if not all(isinstance(side, int) for side in sides):
        return ""
    pairs = tuple((side, side) for side in sides)
    return f" For as many sites on both sides write padding={pairs}."


@dataclasses.dataclass(frozen=True)
class Window:
    """The static geometry of a sliding window.

    Tap t of output site o reads input site `(o * stride + t * dilation - low) / input_dilation`, where that
    divides.
    """

    input_shape: tuple[int, ...]  # the grid that the window reads
    window_shape: tuple[int, ...]  # taps along each axis
    strides: tuple[int, ...]  # steps between output sites, in input sites
    dilation: tuple[int, ...]  # steps between taps, in input sites
    low: tuple[int, ...]  # sites of padding before the first one
    output_shape: tuple[int, ...]  # the grid that the window writes
    input_dilation: tuple[int, ...]  # steps between input sites; 1, unless it is transposed

    @property
    def taps(self) -> int:
        return sites(self.window_shape)

    @property
    def input_sites(self) -> int:
        return sites(self.input_shape)

    @property
    def output_sites(self) -> int:
        return sites(self.output_shape)

    def reversed(self) -> "Window":
        """The window of the gradient, which reads the output's grid and writes the input's."""
        axes = zip(self.window_shape, self.dilation, self.low, strict=True)
        return dataclasses.replace(
            self,
            input_shape=self.output_shape,
            output_shape=self.input_shape,
            strides=self.input_dilation,
            input_dilation=self.strides,
            low=tuple((taps - 1) * dilation - low for taps, dilation, low in axes),
        )

    def input_keys(self, keys: jax.Array, tap: jax.Array) -> jax.Array:
        """The input key that `tap` reads for each output key; `input_sites` if there is none."""
        reads = (keys >= 0) & (keys < self.output_sites)
        position = []
        for o, t, stride, dilation, low, step in self._axes(keys, self.output_shape, tap):
            distance = o * stride + t * dilation - low
            reads &= distance % step == 0
            position.append(distance // step)
        return jnp.where(reads, ravel(position, self.input_shape), self.input_sites)

    def output_keys(self, keys: jax.Array, tap: jax.Array) -> jax.Array:
        """The output key that each input key reaches through `tap`; `output_sites` if there is none."""
        reached = (keys >= 0) & (keys < self.input_sites)
        position = []
        for p, t, stride, dilation, low, step in self._axes(keys, self.input_shape, tap):
            distance = p * step + low - t * dilation
            reached &= distance % stride == 0
            position.append(distance // stride)
        return jnp.where(reached, ravel(position, self.output_shape), self.output_sites)

    def _axes(self, keys: jax.Array, shape: tuple[int, ...], tap: jax.Array) -> Iterator[Any]:
        """For each axis: positions, the tap's place in the window, and the window's numbers."""
        places = (unravel(keys, shape), unravel(tap, self.window_shape))
        numbers = (self.strides, self.dilation, self.low, self.input_dilation)
        return zip(*places, *numbers, strict=True)


def conv_window(
    input_shape: tuple[int, ...],
    window_shape: tuple[int, ...],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
) -> Window:
    """The window of `jax.lax.conv_general_dilated` with these arguments.

    Raises:
      TypeError, ValueError: if an argument has the wrong form, or the window is larger than the padded grid.
    """
    rank = len(input_shape)
    strides, dilation, extent = _steps(input_shape, window_shape, strides, dilation)
    padding = check_padding(padding, rank)
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(input_shape, extent, strides, padding.upper())
        padding = [(int(low), int(high)) for low, high in pads]
    output_shape = []
    axes = zip(input_shape, extent, strides, padding, strict=True)
    for axis, (size, reach, stride, (low, high)) in enumerate(axes):
        if reach > size + low + high:
            raise ValueError(
                f"the window reaches over {reach} sites along spatial axis {axis}, but the padded grid has "
                f"only {size + low + high}. Use a smaller window or kernel_dilation, or more padding."
            )
        output_shape.append((size + low + high - reach) // stride + 1)
    lows = tuple(low for low, _ in padding)
    written = check_spatial_shape(output_shape)
    ones = (1,) * rank
    return Window(input_shape, tuple(window_shape), strides, dilation, lows, written, ones)


def conv_transpose_window(
    input_shape: tuple[int, ...],
    window_shape: tuple[int, ...],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    output_shape: Sequence[int] | None = None,
) -> Window:
    """The window of `jax.lax.conv_transpose` with these arguments.

    It reads a grid that a convolution with the same strides and padding writes, where that reads
    `output_shape`; pairs of padding are those of the spread input, as in `jax.lax.conv_transpose`.

    Raises:
      TypeError, ValueError: if an argument has the wrong form, or the convolution would not write
        `input_shape` from `output_shape`.
    """
    rank = len(input_shape)
    strides, dilation, extent = _steps(input_shape, window_shape, strides, dilation)
    padding = check_padding(padding, rank)
    axes = range(rank)
    if isinstance(padding, str):
        over = [max(extent[a] - strides[a], 0) if padding.upper() == "VALID" else 0 for a in axes]
        default = [input_shape[a] * strides[a] + over[a] for a in axes]
        shape = _written(output_shape, default)
        found = jax.lax.padtype_to_pads(shape, extent, strides, padding.upper())
        pads = [(int(low), int(high)) for low, high in found]
    else:
        pads = [
            (extent[a] - 1 - low, extent[a] - 1 - high) for a, (low, high) in enumerate(padding)
        ]
        default = [(input_shape[a] - 1) * strides[a] + extent[a] - sum(pads[a]) for a in axes]
        shape = _written(output_shape, default)
    for a in axes:
        reads = shape[a] + sum(pads[a]) - extent[a]
        if reads < 0 or reads // strides[a] + 1 != input_shape[a]:
            raise ValueError(
                f"output_shape must be a grid from which a convolution with strides {strides} and padding "
                f"{padding!r} makes x's grid {input_shape}, got {shape}: axis {a} does not. The default is "
                f"{tuple(default)}."
            )
    spread = [(size - 1) * stride + 1 for size, stride in zip(input_shape, strides, strict=True)]
    check_spatial_shape(spread)  # kernels count its sites
    lows = tuple(extent[a] - 1 - pads[a][0] for a in axes)
    return Window(input_shape, tuple(window_shape), (1,) * rank, dilation, lows, shape, strides)


def _written(output_shape: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The checked grid that a transposed convolution writes."""
    if output_shape is None:
        return check_spatial_shape(default)
    shape = per_axis("output_shape", output_shape, len(default))
    return check_spatial_shape(shape)


def _steps(
    input_shape: tuple[int, ...],
    window_shape: tuple[int, ...],
    strides: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Strides, dilation and the window's extent, checked, for each axis."""
    rank = len(input_shape)
    if len(window_shape) != rank:
        raise ValueError(
            f"kernel has a window of {len(window_shape)} axes {window_shape}, but x has a grid of "
            f"{rank} axes {input_shape}. Give the kernel one window axis for each spatial axis."
        )
    dilation = per_axis("kernel_dilation", dilation, rank)
    extent = tuple((w - 1) * d + 1 for w, d in zip(window_shape, dilation, strict=True))
    return per_axis("strides", strides, rank), dilation, extent


def spread_apart(keys: jax.Array, window: Window) -> tuple[jax.Array, Window]:
    """Keys of the window's input once its sites stand `input_dilation` apart, and the window over them."""
    steps = window.input_dilation
    if set(steps) == {1}:
        return keys, window
    shape = tuple(
        (size - 1) * step + 1 for size, step in zip(window.input_shape, steps, strict=True)
    )
    inside = (keys >= 0) & (keys < window.input_sites)
    places = unravel(keys, window.input_shape)
    moved = ravel([p * step for p, step in zip(places, steps, strict=True)], shape)
    ones = (1,) * len(shape)
    spread = dataclasses.replace(window, input_shape=shape, input_dilation=ones)
    return jnp.where(inside, moved, spread.input_sites), spread


def pool_window(
    input_shape: tuple[int, ...],
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding | None = None,
) -> Window:
    """The windows of a pooling, an output site each.

    Without strides and padding: cells side by side that cover the grid, the last one along an axis may reach
    past its end. Else as `conv_window`, with the window's size as strides and "SAME" where one is left out.

    Raises:
      TypeError, ValueError: if an argument has the wrong form, or the padded grid is smaller than the window,
        or has an axis of 2**31 sites or more.
    """
    window_shape = per_axis("window", window, len(input_shape))
    if strides is None and padding is None:
        output_shape = tuple(-(-s // w) for s, w in zip(input_shape, window_shape, strict=True))
        ones, zeros = (1,) * len(input_shape), (0,) * len(input_shape)
        return Window(input_shape, window_shape, window_shape, ones, zeros, output_shape, ones)
    strides = window_shape if strides is None else strides
    padding = "SAME" if padding is None else padding
    windows = conv_window(input_shape, window_shape, strides=strides, padding=padding)
    for a, (size, low) in enumerate(zip(input_shape, windows.low, strict=True)):
        end = (windows.output_shape[a] - 1) * windows.strides[a] + window_shape[a]
        if max(end, size) + abs(low) > MAX_SITES:
            raise ValueError(
                f"padding must leave fewer than 2**31 sites along spatial axis {a}, got {padding!r}."
            )
    return windows


def not_negative(keys: jax.Array, padding: int) -> jax.Array:
    """Keys as indices: one below 0, which would wrap around, becomes that of padding."""
    return jnp.where(keys < 0, padding, keys)


def unravel(keys: jax.Array, shape: Sequence[int]) -> list[jax.Array]:
    """Flat row-major keys, of JAX or NumPy, to one position for each axis; undefined outside the grid."""
    positions = []
    for size in reversed(shape[1:]):
        positions.append(keys % size)
        keys = keys // size
    return [keys, *reversed(positions)]


def ravel(position: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    """One position for each axis to flat row-major keys; `sites(shape)` for positions outside the grid."""
    key = jnp.zeros_like(position[0])
    inside = jnp.ones(key.shape, dtype=bool)
    for p, size in zip(position, shape, strict=True):
        inside &= (p >= 0) & (p < size)
        # Clipped, so that a position far outside cannot overflow into the grid.
        key = key * size + jnp.clip(p, 0, size - 1)
    return jnp.where(inside, key, sites(shape)).astype(jnp.int32)
