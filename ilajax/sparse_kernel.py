"""SparseKernel: filters that store their live weights only."""

import dataclasses
import operator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ilajax.geometry import MAX_SITES, not_negative, sites
from ilajax.sparse_tensor import check_concrete, check_dtypes, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseKernel:
    """A convolution filter as a list of its live weights, of fixed length.

    A stored weight is live even if its value is 0; a weight is removed only if its key is absent.

    Attributes:
      keys: int32[N], `(oc * Cin + ic) * taps + tap` in ascending order: sorted by output channel, input
        channel, then tap, row-major in the window. Padding has the key `Cout * Cin * taps` and comes last.
      values: float32, bfloat16 or float16 [N]; 0 in padding. Ops ignore a value whose key is padding.
      shape: (*window, Cin, Cout), Flax's kernel layout; static.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (3, 3, 1, 8))
      >>> kernel = ilajax.SparseKernel.from_dense(w, mask=abs(w) > 1)
      >>> kernel.to_dense().shape
      (3, 3, 1, 8)

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit together.
    """

    keys: jax.Array
    values: jax.Array
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_kernel_shape(self.shape))
        if len(self.keys.shape) != 1 or self.keys.shape != self.values.shape:
            raise ValueError(
                f"keys and values must be vectors of one length, got shapes {self.keys.shape} and "
                f"{self.values.shape}. Were a layer's weights restored without its kernel_keys? Save all "
                f"variables, nnx.state(model), and load them with ilajax.nn.load_state."
            )
        check_dtypes(self.keys, self.values)

    @property
    def window_shape(self) -> tuple[int, ...]:
        return self.shape[:-2]

    @property
    def taps(self) -> int:
        return sites(self.window_shape)

    @property
    def in_channels(self) -> int:
        return self.shape[-2]

    @property
    def out_channels(self) -> int:
        return self.shape[-1]

    @property
    def size(self) -> int:
        """Number of weights of the full filter, which is also the key of padding."""
        return sites(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def count(self) -> jax.Array:
        """Live weights, int32[]."""
        return jnp.sum(self.keys < self.size, dtype=jnp.int32)

    @property
    def density(self) -> jax.Array:
        """Share of the weights that are live, float32[]."""
        return self.count.astype(jnp.float32) / self.size

    @classmethod
    def from_dense(cls, w: jax.Array, mask: jax.Array | None = None) -> Self:
        """Stores the weights of a dense kernel [*window, Cin, Cout], or those under a mask of its shape.

        A concrete mask cuts the list to the number of live weights. With a traced one the list has a slot
        for each weight, so its shape does not depend on the mask.

        Raises:
          TypeError, ValueError: if `w` or `mask` has a wrong shape or dtype.
        """
        w = jnp.asarray(w)
        shape = check_kernel_shape(w.shape)
        values = _to_key_order(w)
        keys = jnp.arange(values.size, dtype=jnp.int32)
        if mask is None:
            return cls(keys, values, shape)
        mask = jnp.asarray(mask)
        if mask.shape != w.shape:
            raise ValueError(f"mask must have the shape {w.shape} of w, got {mask.shape}.")
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"mask must be bool, got {mask.dtype}. Compare explicitly, as in w != 0."
            )
        live = _to_key_order(mask)
        keys = jnp.where(live, keys, values.size)
        order = jnp.argsort(keys)
        if not isinstance(live, jax.core.Tracer):
            order = order[: max(1, int(live.sum()))]
        return cls(keys[order], jnp.where(live, values, 0)[order], shape)

    def to_dense(self) -> jax.Array:
        """The dense kernel [*window, Cin, Cout], 0 where no weight is stored."""
        return self._scattered(self.values)

    def mask(self) -> jax.Array:
        """Where a weight is live, bool [*window, Cin, Cout]."""
        return self._scattered(jnp.ones(self.keys.shape, bool))

    def refill(self, feature_group_count: int = 1) -> Self:
        """The full filter again: removed weights come back, at 0 and live, for transfer learning.

        With groups of channels, those within a group; see `keys_of_groups`.
        """
        keys = keys_of_groups(self.shape, feature_group_count)
        return type(self)(keys, self._flat(self.values)[keys], self.shape)

    def validate(self) -> Self:
        """Checks the keys' order on concrete arrays and returns the kernel.

        Raises:
          ValueError: if a key is outside the filter, or keys do not ascend with padding at the end. Under
            `jit` there is nothing to check: validate outside.
        """
        check_concrete(self.keys)
        check_kernel_keys("keys", self.keys, self.shape)
        return self

    def _scattered(self, values: jax.Array) -> jax.Array:
        """Values at the keys as a dense array [*window, Cin, Cout], 0 elsewhere."""
        by_channel = self._flat(values).reshape(self.out_channels, self.in_channels, self.taps)
        return jnp.moveaxis(by_channel, (0, 1, 2), (2, 1, 0)).reshape(self.shape)

    def _flat(self, values: jax.Array) -> jax.Array:
        """Values at the keys as a vector of the full filter, 0 elsewhere."""
        flat = jnp.zeros(self.size, values.dtype)
        return flat.at[not_negative(self.keys, self.size)].set(values, mode="drop")

    def __repr__(self) -> str:
        if not hasattr(self.values, "dtype"):
            return f"SparseKernel(keys={self.keys!r}, values={self.values!r}, shape={self.shape})"
        slots = f"{self.values.size} of {self.size} slots"
        return f"SparseKernel({self.dtype}{list(self.shape)}, {slots})"


def check_kernel_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns (*window, Cin, Cout) as a tuple of ints, or raises ValueError."""
    checked = tuple(operator.index(size) for size in shape)
    if len(checked) < 3 or min(checked) < 1:
        raise ValueError(
            f"a kernel's shape must be (*window, Cin, Cout) with at least one window axis and no empty "
            f"axis, got {checked}."
        )
    if sites(checked) > MAX_SITES:
        raise ValueError(f"a kernel must have fewer than 2**31 weights, got shape {checked}.")
    return checked


def keys_of_groups(shape: tuple[int, ...], feature_group_count: int) -> jax.Array:
    """The keys of a filter [*window, Cin, Cout] whose channels convolve in groups, all that there are."""
    taps, (cin, cout) = sites(shape[:-2]), shape[-2:]
    group, out = cin // feature_group_count, jnp.arange(cout, dtype=jnp.int32)[:, None]
    channel = out // (cout // feature_group_count) * group + jnp.arange(group, dtype=jnp.int32)
    pair = out * cin + channel
    return (pair[..., None] * taps + jnp.arange(taps, dtype=jnp.int32)).reshape(-1)


def check_kernel_keys(argument: str, keys: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError where concrete keys [..., N] of filters of one shape are out of order."""
    if not getattr(keys, "is_fully_addressable", True) and not keys.is_fully_replicated:
        return  # parts of them are in other processes
    keys, size = np.asarray(keys, np.int64), sites(shape)
    outside = (keys < 0) | (keys > size)
    # Any number of padding keys may follow; nothing but padding may follow padding.
    unordered = (keys[..., :-1] >= keys[..., 1:]) & (keys[..., 1:] != size)
    if outside.any():
        problem = f"but {keys[outside][0]} is among them"
    elif unordered.any():
        where = (*np.argwhere(unordered)[0][:-1], slice(None))
        slot = int(np.argmax(unordered[where]))
        problem = f"but at slot {slot + 1} {keys[where][slot + 1]} follows {keys[where][slot]}"
    else:
        return
    raise ValueError(
        f"{argument} must ascend in [0, {size}), with padding of {size} after them, {problem}. Were they "
        f"restored by Orbax with strict=False, which fills up with 0? Load the checkpoint with "
        f"ilajax.nn.load_state, which takes the lengths as they were stored."
    )


def _to_key_order(w: jax.Array) -> jax.Array:
    """[*window, Cin, Cout] to the flat order (Cout, Cin, tap) of the keys."""
    return jnp.moveaxis(w.reshape(-1, *w.shape[-2:]), (0, 1, 2), (2, 1, 0)).reshape(-1)
