"""Conv and ConvTranspose: the sparse convolutions with attention as Flax NNX modules."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx

from ilajax import geometry
from ilajax.geometry import (
    Padding,
    check_padding,
    conv_transpose_window,
    conv_window,
    per_axis,
    positive,
)
from ilajax.ops.conv import ConvResult, check_no_selection, check_support, conv
from ilajax.ops.conv_transpose import conv_transpose
from ilajax.ops.k_select import check_select, check_select_by
from ilajax.sparse_kernel import SparseKernel, check_kernel_keys, keys_of_groups
from ilajax.sparse_tensor import VALUE_DTYPES, SparseTensor, check_sparse

Initializer = Callable[..., jax.Array]


class KernelKeys(nnx.Variable):
    """Keys of a `Conv`'s stored weights, int32[N]; they are not trained, but belong in a checkpoint."""


class Density(nnx.Variable):
    """Response density of each output channel, float32[Cout], as last measured by a `Conv`; -1 until then."""


class Conv(nnx.Module):
    """Sparse convolution that keeps the strongest responses up to a density bound.

    For each sample and output channel, at most `ilajax.capacity(density_bound, output grid)` responses are
    kept, so memory is known at compile time. The bound applies to this layer's output, never to its input.
    With the default `select="positive"` only responses above 0 are kept: **the layer contains its ReLU**, and
    needs no activation after it.

    The layer stores a list of its live weights (see `ilajax.SparseKernel`); no gradient ever reaches a
    removed weight. Weights start like those of `flax.nnx.Conv`: the same `rngs` gives the same filter.

    Every call in training measures the share of output sites that had a response before the selection, for
    each output channel, as a mean over the batch (under `shard_map` and `vmap`: over the device's part of it,
    unless `axis_name` says otherwise). `ilajax.optim.density_biased_l2` uses it. After `model.eval()` nothing
    is measured until `model.train()`. Flax's transformations (`nnx.jit`, `nnx.grad`, `nnx.scan`, `nnx.remat`,
    ...) pass the measurement on, like the statistics of `nnx.BatchNorm`. A plain JAX transformation that
    closes over the layer cannot: `density` then keeps its old value. With a functional `jax.grad`, use
    `nnx.merge(..., copy=True)` and return `nnx.state(model, ilajax.nn.Density)` with the loss.

    Attributes:
      kernel: `nnx.Param`, values of the stored weights, float[N].
      kernel_keys: `KernelKeys`, their keys, int32[N]; see `ilajax.SparseKernel`.
      bias: `nnx.Param`, float[Cout], or None.
      density: `Density`, float32[Cout]; -1 until the first measurement. If it is above the bound, the
        selection cut.
      kernel_shape: (*window, Cin, Cout).

    Args:
      in_features: channels of the input, Cin.
      out_features: channels of the output, Cout.
      kernel_size: the window; an integer means a one-dimensional one, as in Flax.
      density_bound: the largest share of output sites that each channel, or under select_by="site" all
        together, may store, in (0, 1]; required with support="dilate", not accepted with the others.
      strides: steps between output sites; one integer or one for each axis.
      padding: "SAME", "VALID", or a (low, high) pair for each axis.
      kernel_dilation: steps between taps; one integer or one for each axis.
      use_bias: whether non-zero responses get a bias.
      select: which responses are kept, "positive" (the default), "value" or "magnitude"; see `ilajax.conv`.
        Not accepted with the other supports, where all are kept and an activation is `x.map(nnx.relu)`. The
        density regulariser works through the ReLU, so it needs "positive".
      select_by: "channel", the paper's attention, for each output channel by itself; or "site", the strongest
        sites, which gives a shared support (with select "positive" or "magnitude"); see `ilajax.conv`. The
        density is then that of the sites.
      support: "dilate", the paper's convolution; "input", a submanifold convolution on a shared support; or
        "given", responses at the sites of a tensor that the call brings.
      feature_group_count: groups of channels, as in `flax.nnx.Conv`; it divides the channels of input and
        output. Weights between groups do not exist. With as many groups as channels it is depthwise.
      kernel_density: share of the weights that exist at the start, in (0, 1]. Below 1 these are a random
        subset of max(1, round(kernel_density * weights)) of them, and the list has that length.
      kernel_init: initialiser of the full filter, of shape `kernel_shape`.
      bias_init: initialiser of the bias.
      dtype: dtype of the computation: the input is cast to it, weights and bias are rounded to it, and the
        output has it. None: the dtype they promote to. Sums are always in float32, and so are the gradients
        of weights and bias: those of float32 parameters are never rounded to `dtype`.
      param_dtype: dtype of the parameters: float32, bfloat16 or float16.
      use_running_average: whether `density` keeps its value instead of being measured. `model.eval()` and
        `model.train()` set it, as they do for `nnx.BatchNorm`.
      axis_name: the axis of `shard_map` or `vmap` (or a tuple of axes) over which to average the density too,
        as in `nnx.BatchNorm`. Under `jit` alone the batch is whole, and none is needed.
      rngs: random streams; `rngs.params` is used as in `flax.nnx.Conv`.

    Call:
      x: SparseTensor [B, *S, Cin].
      support: a SparseTensor on the output grid, with support="given" only; see `ilajax.conv`.
      use_running_average: overrides the layer's own, unless None.

      Returns the features, a SparseTensor [B, *S', Cout].

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> layer = ilajax.nn.Conv(1, 8, (3, 3), density_bound=0.25, rngs=nnx.Rngs(0))
      >>> x = ilajax.from_dense(jnp.eye(16)[None, ..., None], capacity=16)
      >>> layer(x)
      SparseTensor(float32[1, 16, 16, 8], capacity=64 of 256 sites, 62% filled, full in 1 of 8 segments)
      >>> layer.density.shape
      (8,)

    Source: Hackel et al., section 3, algorithms 1 and 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        density_bound: float | None = None,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        use_bias: bool = True,
        select: str | None = None,
        select_by: str = "channel",
        support: str = "dilate",
        feature_group_count: int = 1,
        kernel_density: float = 1.0,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_running_average: bool = False,
        axis_name: str | tuple[str, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(
                f"rngs must be an nnx.Rngs, got {type(rngs).__name__}. Make one from a seed or a key: "
                f"rngs=nnx.Rngs(0), rngs=nnx.Rngs(key)."
            )
        sizes = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        window = per_axis("kernel_size", sizes, len(sizes))
        features = {"in_features": in_features, "out_features": out_features}
        advice = " It is not read off the first input: weights exist from the start."
        channels = (positive(*f, ", a number of channels", advice) for f in features.items())
        self.kernel_shape = (*window, *channels)
        self.feature_group_count = _check_groups(feature_group_count, self.kernel_shape)
        self.density_bound, self.select = _output_rule(
            support, density_bound, select, select_by, len(window)
        )
        self.select_by, self.support = select_by, support
        self.strides = per_axis("strides", strides, len(window))
        self.padding = check_padding(padding, len(window))
        self.kernel_dilation = per_axis("kernel_dilation", kernel_dilation, len(window))
        self.dtype = None if dtype is None else _value_dtype("dtype", dtype)
        param_dtype = _value_dtype("param_dtype", param_dtype)
        self.use_running_average = use_running_average
        self.axis_name = axis_name

        # Drawn in Flax's order, so that a dense twin starts from the same weights.
        kernel_key = rngs.params()
        in_group = self.in_features // self.feature_group_count
        drawn = kernel_init(kernel_key, (*window, in_group, self.out_features), param_dtype)
        keys = keys_of_groups(self.kernel_shape, self.feature_group_count)
        kernel = SparseKernel(keys, SparseKernel.from_dense(drawn).values, self.kernel_shape)
        kernel = _random_subset(kernel, kernel_density, jax.random.fold_in(kernel_key, 1))
        self.kernel = nnx.Param(kernel.values)
        self.kernel_keys = KernelKeys(kernel.keys)
        self.bias: nnx.Param | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        else:
            self.bias = nnx.data(None)
        self.density = Density(jnp.full((out_features,), -1, jnp.float32))

    @property
    def in_features(self) -> int:
        return self.kernel_shape[-2]

    @property
    def out_features(self) -> int:
        return self.kernel_shape[-1]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.kernel_shape[:-2]

    @property
    def sparse_kernel(self) -> SparseKernel:
        """The current filter."""
        return SparseKernel(self.kernel_keys[...], self.kernel[...], self.kernel_shape)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(
        self,
        x: SparseTensor,
        *,
        support: SparseTensor | None = None,
        use_running_average: bool | None = None,
    ) -> SparseTensor:
        return self._respond(x, support, use_running_average)

    def _respond(
        self,
        x: SparseTensor,
        support: SparseTensor | None,
        use_running_average: bool | None,
        **options: Any,
    ) -> SparseTensor:
        """The features; `options` go to `_output_shape` and to `_convolve`."""
        check_sparse("x", x)
        if x.channels != self.in_features:
            raise ValueError(
                f"x must have the {self.in_features} channels that the layer was made for, got {x.channels}: "
                f"{x}. Make the layer with in_features={x.channels}."
            )
        if (support is not None) != (self.support == "given"):
            raise ValueError(
                f"support must be given in the call, a SparseTensor, if the layer was made with "
                f"support='given', and only then; this one was made with {self.support!r}, and the call has "
                f"{type(support).__name__}."
            )
        capacity = None
        if self.density_bound is not None:
            shape = self._output_shape(x.spatial_shape, **options)
            capacity = geometry.capacity(self.density_bound, shape)
        result = self._convolve(
            *self._promoted(x),
            capacity=capacity,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            select=self.select,
            select_by=self.select_by,
            support=self.support if support is None else support,
            **options,
        )
        if use_running_average is None:
            use_running_average = self.use_running_average
        if not use_running_average:
            self._measure(result.responses, result.features.sites)
        return result.features

    # What `ConvTranspose` does otherwise.

    def _output_shape(self, input_shape: tuple[int, ...], **options: Any) -> tuple[int, ...]:
        window = conv_window(input_shape, self.kernel_size, **self._steps(), **options)
        return window.output_shape

    def _convolve(self, *operands: Any, **options: Any) -> ConvResult:
        return conv(*operands, **options)

    def _steps(self) -> Any:
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation": self.kernel_dilation,
        }

    def _promoted(self, x: SparseTensor) -> tuple[SparseTensor, SparseKernel, jax.Array | None]:
        """Input, filter and bias in the dtype of the computation."""
        if not isinstance(self.kernel_keys[...], jax.core.Tracer):
            # A checkpoint that was filled up with zeros would compute something wrong.
            check_kernel_keys("kernel_keys", self.kernel_keys[...], self.kernel_shape)
        kernel, bias = self.sparse_kernel, None if self.bias is None else self.bias[...]
        dtype = self.dtype
        if dtype is None:
            dtype = jnp.result_type(x.values, kernel.values, *(() if bias is None else (bias,)))
        rounded = SparseKernel(kernel.keys, _rounded(kernel.values, dtype), kernel.shape)
        x = x.with_values(x.values.astype(dtype))
        return x, rounded, None if bias is None else _rounded(bias, dtype)

    def _measure(self, responses: jax.Array, output_sites: int) -> None:
        density = jnp.mean(responses.astype(jnp.float32), axis=0) / output_sites
        density = jnp.broadcast_to(density, self.density.shape)  # by site, one for all channels
        if self.axis_name is not None:
            density = jax.lax.pmean(density, self.axis_name)
        # A plain jax.jit or jax.grad may close over the layer: for inference, or gradients of the input.
        with contextlib.suppress(errors.TraceContextError):
            self.density[...] = density


class ConvTranspose(Conv):
    """Transposed sparse convolution under a density bound: the way up to a finer grid.

    It is `Conv` with the numbers of `ilajax.conv_transpose`: attributes, arguments and training are the same.
    `strides` are steps between the input's sites on the output grid, and with the default
    `select="positive"` the layer contains its ReLU. With `support="given"` it goes back to the sites of an
    earlier map, as spconv's `SparseInverseConv` does.

    Args:
      in_features, out_features, kernel_size, ...: as in `Conv`; `support` is "dilate" or "given".

    Call:
      x: SparseTensor [B, *S, Cin].
      support: a SparseTensor on the output grid, with support="given" only.
      output_shape: the output grid, where strides leave a choice; see `ilajax.conv_transpose`.
      use_running_average: overrides the layer's own, unless None.

      Returns the features, a SparseTensor [B, *S', Cout].

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> fine = ilajax.from_dense(jnp.eye(16)[None, ..., None], capacity=16)
      >>> rngs = nnx.Rngs(0)
      >>> down = ilajax.nn.Conv(1, 4, (3, 3), strides=2, density_bound=0.5, rngs=rngs)
      >>> up = ilajax.nn.ConvTranspose(4, 1, (3, 3), strides=2, support="given", rngs=rngs)
      >>> up(down(fine), support=fine).spatial_shape
      (16, 16)

    Source: the paper has no transposed convolution; see `ilajax.conv_transpose`.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        check_support(self.support, ("dilate", "given"))

    def __call__(
        self,
        x: SparseTensor,
        *,
        support: SparseTensor | None = None,
        output_shape: Sequence[int] | None = None,
        use_running_average: bool | None = None,
    ) -> SparseTensor:
        return self._respond(x, support, use_running_average, output_shape=output_shape)

    def _output_shape(self, input_shape: tuple[int, ...], **options: Any) -> tuple[int, ...]:
        window = conv_transpose_window(input_shape, self.kernel_size, **self._steps(), **options)
        return window.output_shape

    def _convolve(self, *operands: Any, **options: Any) -> ConvResult:
        return conv_transpose(*operands, **options)


def iter_convs(model: Any) -> Iterator[tuple[tuple[Any, ...], Conv]]:
    """The path and layer of each `Conv` in a model, transposed ones too.

    Example:
      >>> model = nnx.Sequential(ilajax.nn.Conv(1, 2, (3,), density_bound=0.5, rngs=nnx.Rngs(0)))
      >>> [path for path, _ in ilajax.nn.iter_convs(model)]
      [('layers', 0)]
    """
    for path, module in nnx.iter_graph(model):
        if isinstance(module, Conv):
            yield path, module


def _rounded(weights: jax.Array, dtype: Any) -> jax.Array:
    """Weights rounded to `dtype` but kept in float32, and so are their gradients."""
    return _straight_through(weights.astype(jnp.float32), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _straight_through(weights: jax.Array, dtype: Any) -> jax.Array:
    return weights.astype(dtype).astype(weights.dtype)


@_straight_through.defjvp
def _(dtype, primals, tangents):
    # The derivative of a cast would be rounded by it: in float16 a gradient overflows at 65504.
    return _straight_through(*primals, dtype), *tangents


def _output_rule(
    support: str, density_bound: float | None, select: str | None, select_by: str, rank: int
) -> tuple[float | None, str | None]:
    """The checked density bound and selection, both None where nothing is selected."""
    check_support(support, ("dilate", "input", "given"))
    if support != "dilate":
        where = f'support="{support}"'
        check_no_selection(where, density_bound, select, select_by, "density_bound")
        return None, None
    if density_bound is None:
        raise ValueError(
            'density_bound is required under support="dilate", got None. Give the largest share of output '
            "sites that each channel may store, in (0, 1]."
        )
    geometry.capacity(density_bound, (1,) * rank)
    check_select_by(select_by, select)
    select = "positive" if select is None else select
    check_select(select)
    return float(density_bound), select


def _check_groups(feature_group_count: int, kernel_shape: tuple[int, ...]) -> int:
    groups = positive("feature_group_count", feature_group_count)
    for name, channels in zip(("in_features", "out_features"), kernel_shape[-2:], strict=True):
        if channels % groups:
            raise ValueError(
                f"feature_group_count must divide in_features and out_features, got {groups} for {name} = "
                f"{channels}."
            )
    return groups


def _value_dtype(argument: str, dtype: Any) -> Any:
    if jnp.dtype(dtype) not in VALUE_DTYPES:
        raise TypeError(f"{argument} must be float32, bfloat16 or float16, got {jnp.dtype(dtype)}.")
    return jnp.dtype(dtype)


def _random_subset(kernel: SparseKernel, density: float, key: jax.Array) -> SparseKernel:
    """max(1, round(density * weights)) of a filter's weights, all subsets equally likely."""
    if not 0.0 < float(density) <= 1.0:
        raise ValueError(
            f"kernel_density must lie in (0, 1], got {density!r}. It is the share of the weights that exist "
            f"at the start."
        )
    count = max(1, round(float(density) * kernel.keys.size))
    if count == kernel.keys.size:
        return kernel
    chosen = jnp.sort(jax.random.permutation(key, kernel.keys.size)[:count])
    return SparseKernel(kernel.keys[chosen], kernel.values[chosen], kernel.shape)
