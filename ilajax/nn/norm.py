"""Normalisation over stored entries: Flax's modules, for which padding and empty sites do not exist."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ilajax.sparse_tensor import SparseTensor, check_sparse


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` over the stored entries of each channel.

      y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the mean and the variance of what a channel stores in the whole batch, zeros that are stored too.
    Padding and empty sites never count: a map of values that are all 5 has the mean 5. Stored sites stay as
    they are. A channel that stores nothing keeps its running statistics.

    A layer with `select="positive"` has its ReLU in front of this; for the usual order, convolution,
    normalisation, ReLU, select by "magnitude", or use a support that selects nothing.

    Args:
      num_features: channels of the input.
      options: those of `flax.nnx.BatchNorm`, but for `axis`: momentum (0.99), epsilon, dtype, use_bias,
        use_scale, use_running_average, axis_name, rngs, .... Under `axis_name` the mean is that of all
        devices' entries, however many each of them has.

    Call:
      x: SparseTensor [B, *S, C].
      use_running_average: overrides the layer's own, which `model.eval()` sets, unless None.

      Returns a SparseTensor with the keys of x.

    Raises:
      TypeError, ValueError: if x is not a SparseTensor of so many channels.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[1.0, 0.0, 3.0, 0.0]])[..., None], capacity=3)
      >>> ilajax.nn.BatchNorm(1, rngs=nnx.Rngs(0))(x).values.round(3)
      Array([[[-1.,  1.,  0.]]], dtype=float32)

    Source: Ioffe and Szegedy, "Batch normalization"; over stored entries as in the authors' and other sparse
    libraries.
    """

    def __init__(self, num_features: int, **options: Any):
        _refuse(self, options, "axis")
        super().__init__(num_features, **options)

    def __call__(self, x: SparseTensor, use_running_average: bool | None = None) -> SparseTensor:  # type: ignore[override]
        stored = _stored(self, x)
        values, scale, bias, dtype = _promoted(self, x)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            mean, var = self.mean[:, None], self.var[:, None]
        else:
            mean, var, count = _statistics(self, values, stored, (0, 2))
            self._follow(mean, var, count)
        factor, shift = _standardising(self, mean, var)
        return x.with_values(_normalised(values, stored, factor, shift, scale, bias, dtype))

    def _follow(self, mean: jax.Array, var: jax.Array, count: jax.Array) -> None:
        """Moves the running statistics of the channels that have an entry."""
        for running, batch in ((self.mean, mean), (self.var, var)):
            old, new = running[...], jax.lax.stop_gradient(batch.reshape(-1))
            moved = self.momentum * old + (1 - self.momentum) * new
            running[...] = jnp.where(count.reshape(-1) > 0, moved, old)


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm` over the channels of each stored site.

    Args:
      num_features: channels of the input.
      options: those of `flax.nnx.LayerNorm`, but for `reduction_axes` and `feature_axes`.

    Call:
      x: SparseTensor [B, *S, C] with a shared support, so that a site has all channels. Returns a
        SparseTensor with the keys of x.

    Raises:
      TypeError, ValueError: if x is not a SparseTensor of so many channels, or each has its own keys.

    Example:
      >>> x = ilajax.from_points(
      ...     np.array([[2]]), np.array([[1.0, 3.0]]), spatial_shape=(4,), batch_size=1, capacity=1
      ... )
      >>> ilajax.nn.LayerNorm(2, rngs=nnx.Rngs(0))(x).values.round(3)
      Array([[[-1.],
              [ 1.]]], dtype=float32)
    """

    def __init__(self, num_features: int, **options: Any):
        _refuse(self, options, "reduction_axes", "feature_axes")
        super().__init__(num_features, **options)

    def __call__(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        stored = _stored(self, x)
        if not x.shared:
            raise ValueError(
                "x must have a shared support, got keys that differ by channel, so that a site does not have "
                'all channels. Use GroupNorm, or make the layer before with select_by="site".'
            )
        values, scale, bias, dtype = _promoted(self, x)
        mean, var, _ = _statistics(self, values, stored, (1,))
        factor, shift = (_spread(a, x.channels) for a in _standardising(self, mean, var))
        return x.with_values(_normalised(values, stored, factor, shift, scale, bias, dtype))


class GroupNorm(nnx.GroupNorm):
    """`flax.nnx.GroupNorm` over the stored entries of each sample and group of channels.

    With `num_groups=None, group_size=1` it is instance normalisation.

    Args:
      num_features: channels of the input.
      num_groups: groups of channels, 32 by default.
      group_size: channels of a group, with num_groups=None.
      options: those of `flax.nnx.GroupNorm`, but for `reduction_axes`.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor with the keys of x.

    Raises:
      TypeError, ValueError: if x is not a SparseTensor of so many channels.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[1.0, 0.0, 3.0, 0.0]])[..., None], capacity=3)
      >>> ilajax.nn.GroupNorm(1, num_groups=1, rngs=nnx.Rngs(0))(x).values.round(3)
      Array([[[-1.,  1.,  0.]]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        **options: Any,
    ):
        _refuse(self, options, "reduction_axes")
        super().__init__(num_features, num_groups, group_size, **options)
        self.num_features = num_features

    def __call__(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        stored = _stored(self, x)
        values, scale, bias, dtype = _promoted(self, x)
        batch, slots, group = x.batch_size, x.capacity, self.group_size
        each = jnp.broadcast_to(stored, values.shape).reshape(batch, self.num_groups, group, slots)
        mean, var, _ = _statistics(self, values.reshape(each.shape), each, (2, 3))
        factor, shift = (
            jnp.repeat(a[..., 0], group, axis=1) for a in _standardising(self, mean, var)
        )
        return x.with_values(_normalised(values, stored, factor, shift, scale, bias, dtype))


def _refuse(layer: nnx.Module, options: dict[str, Any], *names: str) -> None:
    for name in names:
        if name in options:
            raise TypeError(
                f"{type(layer).__name__} takes no {name}, got {options[name]!r}: what it normalises is given "
                "by the sparse tensor. Leave it out."
            )


def _stored(layer: Any, x: SparseTensor) -> jax.Array:
    """Which entries are not padding, [B, C or 1, K]; TypeError or ValueError if x does not fit the layer."""
    check_sparse("x", x)
    if x.channels != layer.num_features:
        raise ValueError(
            f"x must have the {layer.num_features} channels that the layer was made for, got {x.channels}: "
            f"{x}. Make the layer with num_features={x.channels}."
        )
    return x.keys < x.sites


def _promoted(layer: Any, x: SparseTensor) -> tuple[Any, ...]:
    """Values in float32 at least, scale and bias as [C, 1] or None, and the dtype of the result."""
    parameters = [None if p is None else p[...] for p in (layer.scale, layer.bias)]
    values, *parameters = layer.promote_dtype((x.values, *parameters), dtype=layer.dtype)
    wide = [None if a is None else a.astype(jnp.float32) for a in (values, *parameters)]
    return wide[0], *(None if p is None else p[:, None] for p in wide[1:]), values.dtype


def _statistics(
    layer: Any, values: jax.Array, stored: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean and the variance of stored values over `axes`, which stay, and how many there are.

    Where there is none both are 0.
    """

    def over_all(*sums: jax.Array) -> tuple[jax.Array, ...]:
        if layer.axis_name is None:
            return sums
        return jax.lax.psum(sums, layer.axis_name, axis_index_groups=layer.axis_index_groups)

    def total(a: jax.Array) -> jax.Array:
        return _total(a) if axes == (1,) else jnp.sum(a, axis=axes, keepdims=True)

    number = total(jnp.broadcast_to(stored, values.shape).astype(jnp.float32))
    values = jnp.where(stored, values, 0)
    if layer.use_fast_variance:
        number, first, second = over_all(number, total(values), total(jnp.square(values)))
        at_least_one = jnp.maximum(number, 1)
        mean = first / at_least_one
        return mean, jnp.maximum(second / at_least_one - jnp.square(mean), 0), number
    number, first = over_all(number, total(values))
    at_least_one = jnp.maximum(number, 1)
    mean = first / at_least_one
    (second,) = over_all(total(jnp.where(stored, jnp.square(values - mean), 0)))
    return mean, second / at_least_one, number


def _standardising(layer: Any, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What values are multiplied by, and what is added then, to have the mean 0 and the variance 1."""
    factor = jax.lax.rsqrt(var + layer.epsilon)
    return factor, -mean * factor


def _normalised(
    values: jax.Array,
    stored: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """values * factor + shift, scaled and moved: one product and one sum for each entry."""
    if scale is not None:
        factor, shift = factor * scale, shift * scale
    if bias is not None:
        shift += bias
    return jnp.where(stored, values * factor + shift, 0).astype(dtype)


# XLA's sum over a middle axis takes thirty times as long on a CPU as adding one half to the other. Each of
# these is the other's gradient.


@jax.custom_vjp
def _total(a: jax.Array) -> jax.Array:
    """The sum over the channels, [B, C, K] -> [B, 1, K]."""
    while (channels := a.shape[1]) > 1:
        half = channels // 2
        rest = a[:, 2 * half :]
        a = jnp.concatenate([a[:, :half] + a[:, half : 2 * half], rest], axis=1)
    return a


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(a: jax.Array, channels: int) -> jax.Array:
    """The same for each channel, [B, 1, K] -> [B, C, K]."""
    return jnp.broadcast_to(a, (a.shape[0], channels, a.shape[2]))


_total.defvjp(lambda a: (_total(a), a.shape[1]), lambda channels, g: (_spread(g, channels),))
_spread.defvjp(lambda a, channels: (_spread(a, channels), None), lambda _, __, g: (_total(g),))
