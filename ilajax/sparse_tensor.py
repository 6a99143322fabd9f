"""SparseTensor: feature maps as padded coordinate lists of fixed capacity."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from ilajax import display
from ilajax.geometry import check_spatial_shape, ravel, sites, unravel

VALUE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

T = TypeVar("T")


def register(cls: type[T]) -> type[T]:
    """Registers a dataclass of two arrays and a static field as a pytree."""
    *arrays, static = (field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    def flatten(x: T) -> tuple[tuple[Any, ...], Any]:
        key = jax.tree_util.GetAttrKey
        return tuple((key(name), getattr(x, name)) for name in arrays), getattr(x, static)

    def unflatten(value: Any, leaves: Any) -> T:
        # Transformations put tracers, None and plain objects here: nothing is checked.
        x = object.__new__(cls)
        x.__dict__.update(zip((*arrays, static), (*leaves, value), strict=True))
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseTensor:
    """A batch of feature maps that stores at most K sites for each sample and channel.

    Every (batch, channel) segment holds its stored sites in ascending order of their keys, then padding. All
    shapes are static, so a SparseTensor goes through `jit`, `vmap`, `scan` and `shard_map` like any array
    with a leading batch axis.

    Attributes:
      keys: int32[B, C or 1, K], the flat row-major position in the spatial grid. Padding comes last and has
        the key `prod(spatial_shape)`. A channel axis of 1 is a shared support: all channels have the same
        sites.
      values: float32, bfloat16 or float16 [B, C, K]; 0 in padding.
      spatial_shape: the grid, one or more axes with fewer than 2**31 sites; static.

    `x + y` and `x - y` add over the union of the supports (`ilajax.add`), `-x`, `2 * x` and `x / 2` scale the
    stored values, and `x.map(f)` applies any function to them.

    The keys are integers, which `jax.grad` rejects ("grad requires real- or complex-valued inputs, got
    int32"). So differentiate with respect to the values, or pass `allow_int=True` and read `.values` of the
    result:

      >>> x = ilajax.from_dense(jnp.ones((1, 4, 4, 1)), capacity=16)
      >>> loss = lambda values: ilajax.to_dense(x.with_values(values)).sum()
      >>> jax.grad(loss)(x.values).shape
      (1, 1, 16)

    Raises:
      TypeError, ValueError: if the arrays' shapes or dtypes do not fit together. Only `validate()` checks the
        contents of the arrays.
    """

    keys: jax.Array
    values: jax.Array
    spatial_shape: tuple[int, ...]

    # Addition is an operation, so it belongs to a higher layer: ilajax/ops/add.py puts it here.
    _add: ClassVar[Callable[["SparseTensor", "SparseTensor"], "SparseTensor"]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spatial_shape", check_spatial_shape(self.spatial_shape))
        _check_arrays(self.keys, self.values)

    @property
    def batch_size(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    @property
    def capacity(self) -> int:
        """Slots of each segment, K."""
        return self.values.shape[2]

    @property
    def sites(self) -> int:
        """Sites of the grid, which is also the key of padding."""
        return sites(self.spatial_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the equal dense array, (B, *spatial_shape, C)."""
        return (self.batch_size, *self.spatial_shape, self.channels)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def shared(self) -> bool:
        """Whether one support serves all channels."""
        return self.keys.shape[1] == 1

    @property
    def counts(self) -> jax.Array:
        """Stored sites of each sample and channel, int32[B, C]."""
        xp = _namespace(self.keys)
        stored = xp.sum(self.keys < self.sites, axis=2, dtype=np.int32)
        return xp.broadcast_to(stored, (self.batch_size, self.channels))

    @property
    def density(self) -> jax.Array:
        """Share of the sites that are stored, float32[B, C]."""
        return self.counts.astype(np.float32) / self.sites

    def coordinates(self) -> jax.Array:
        """Positions of the stored sites, int32[B, C or 1, K, d]; padding has `spatial_shape`, as in a `BCOO`.

        Example:
          >>> x = ilajax.from_dense(jnp.eye(2)[None, ..., None], capacity=3)
          >>> x.coordinates()[0, 0]
          Array([[0, 0],
                 [1, 1],
                 [2, 2]], dtype=int32)
        """
        xp = _namespace(self.keys)
        positions = xp.stack(unravel(self.keys, self.spatial_shape), axis=-1)
        stored = (self.keys < self.sites)[..., None]
        return xp.where(stored, positions, np.array(self.spatial_shape, np.int32))

    def with_values(self, values: jax.Array) -> Self:
        """The same support with other values, [B, C', K]; C' may differ if the support is shared.

        Values do not show which support they belong to: those of another one would land on the wrong sites.
        To combine tensors use `x + y`, which knows the supports of both.
        """
        return dataclasses.replace(self, values=values)

    def map(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        """Applies `f` to the stored values; padding stays 0, whatever `f` makes of it."""
        # f does not see padding either: if f has no derivative at 0, its gradient would be nan.
        stored = self.keys < self.sites
        xp = _namespace(self.keys, self.values)
        mapped = f(xp.where(stored, self.values, xp.ones_like(self.values)))
        xp = _namespace(self.keys, mapped)  # jax.nn.relu of NumPy's arrays is JAX's
        return self.with_values(xp.where(stored, mapped, xp.zeros_like(mapped)))

    def unshare(self) -> Self:
        """Gives each channel its own keys."""
        shape = (self.batch_size, self.channels, self.capacity)
        keys = _namespace(self.keys).broadcast_to(self.keys, shape)
        return dataclasses.replace(self, keys=keys)

    def __neg__(self) -> Self:
        return self.map(lambda values: -values)

    def __mul__(self, factor: Any) -> Self:
        _check_scalar("*", factor)
        return self.map(lambda values: values * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Self:
        _check_scalar("/", divisor)
        return self.map(lambda values: values / divisor)

    def __add__(self, other: Any) -> "SparseTensor":
        """The sum over the union of both supports, see `ilajax.add`."""
        if isinstance(other, SparseTensor):
            return SparseTensor._add(self, other)
        if isinstance(other, int | float | np.number) and other == 0:
            return self  # sum() starts from 0
        raise TypeError(
            f"+ and - take another SparseTensor, got {type(other).__name__}. To add to the stored sites use "
            "x.map(lambda v: v + 1); to all sites, ilajax.to_dense(x) + 1."
        )

    __radd__ = __add__

    def __sub__(self, other: Any) -> "SparseTensor":
        """The difference over the union of both supports, see `ilajax.add`."""
        return self + (-other if isinstance(other, SparseTensor) else other)

    def __rsub__(self, other: Any) -> "SparseTensor":
        return -self + other

    # NumPy's scalars and arrays leave their operators to the ones above.
    __array_ufunc__ = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            "a SparseTensor does not turn into an array implicitly: use ilajax.to_dense(x) for the dense "
            "array, or x.values for the stored values."
        )

    def to_bcoo(self) -> sparse.BCOO:
        """The same array as a `jax.experimental.sparse.BCOO` of shape (B, C, *S) with n_batch=2."""
        return sparse.BCOO(
            (jnp.asarray(self.values), jnp.asarray(self.unshare().coordinates())),
            shape=(self.batch_size, self.channels, *self.spatial_shape),
            indices_sorted=True,
            unique_indices=True,
        )

    @classmethod
    def from_bcoo(cls, matrix: sparse.BCOO) -> Self:
        """From a BCOO of shape (B, C, *S) with n_batch=2 and n_dense=0; duplicates are added up.

        Raises:
          TypeError, ValueError: if it is not a BCOO of this layout.
        """
        if not isinstance(matrix, sparse.BCOO):
            raise TypeError(f"matrix must be a jax BCOO, got {type(matrix).__name__}.")
        if matrix.n_batch != 2 or matrix.n_dense != 0 or matrix.ndim < 3:
            raise ValueError(
                f"matrix must have shape (B, C, *S) with n_batch=2 and n_dense=0, got shape {matrix.shape} "
                f"with n_batch={matrix.n_batch} and n_dense={matrix.n_dense}. "
                f"Make one with BCOO.fromdense(x, n_batch=2)."
            )
        spatial_shape = check_spatial_shape(matrix.shape[2:])
        if not matrix.unique_indices:
            matrix = matrix.sum_duplicates(nse=matrix.nse)
        keys = ravel(list(jnp.moveaxis(matrix.indices, -1, 0)), spatial_shape)
        values = jnp.where(keys < sites(spatial_shape), matrix.data, 0)
        shape = (*matrix.shape[:2], matrix.nse)
        keys, values = jnp.broadcast_to(keys, shape), jnp.broadcast_to(values, shape)
        order = jnp.argsort(keys, axis=2, stable=True)
        keys, values = (jnp.take_along_axis(a, order, axis=2) for a in (keys, values))
        return cls(keys, values, spatial_shape)

    def validate(self) -> Self:
        """Checks the invariants on concrete arrays and returns the tensor.

        Raises:
          ValueError: naming the first segment (batch, channel) that breaks one, or the arrays' shapes or
            dtypes that do not fit together. Under `jit` there is nothing to check: validate outside.
        """
        try:
            _check_arrays(self.keys, self.values)
        except TypeError as error:
            raise ValueError(str(error)) from None
        check_concrete(self.keys, self.values)
        keys = np.asarray(self.keys, np.int64)
        values = np.asarray(self.values, np.float32)
        padding = keys == self.sites
        _raise_at("a key outside the grid [0, {sites}]", (keys < 0) | (keys > self.sites), self)
        _raise_at("a stored key after padding", padding[..., :-1] & ~padding[..., 1:], self)
        ascending = (keys[..., :-1] < keys[..., 1:]) | padding[..., 1:]
        _raise_at("keys that do not strictly ascend", ~ascending, self)
        _raise_at("a value other than 0 in padding", padding & (values != 0), self)
        return self

    def __repr__(self) -> str:
        return display.text(self.keys, self.values, self.spatial_shape)

    def _repr_html_(self) -> str | None:
        return display.html(self.keys, self.values, self.spatial_shape)


def _namespace(*arrays: Any) -> Any:
    """NumPy where all arrays are NumPy's, else jax.numpy.

    Workers of a data loader hold NumPy arrays and must not start JAX, which does not survive a fork.
    """
    return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp


def check_sparse(argument: str, x: object) -> None:
    """Raises TypeError unless `x` is a SparseTensor, and whatever its constructor would raise."""
    if not isinstance(x, SparseTensor):
        raise TypeError(
            f"{argument} must be an ilajax.SparseTensor, got {type(x).__name__}. "
            f"Make one with ilajax.from_dense or ilajax.from_points."
        )
    _check_arrays(x.keys, x.values)


def check_concrete(*arrays: Any) -> None:
    """What `validate` raises under `jit`."""
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        raise ValueError("validate() looks at concrete arrays, got tracers. Call it outside jit.")


def check_dtypes(keys: Any, values: Any) -> None:
    """Raises TypeError unless keys and values have the dtypes of such."""
    if keys.dtype != jnp.int32:
        raise TypeError(f"keys must be int32, got {keys.dtype}.")
    if values.dtype not in VALUE_DTYPES:
        raise TypeError(f"values must be float32, bfloat16 or float16, got {values.dtype}.")


def _check_scalar(operator: str, factor: object) -> None:
    shape = getattr(factor, "shape", None)
    if isinstance(factor, int | float) or shape == ():
        return
    what = type(factor).__name__ + ("" if shape is None else f" of shape {shape}")
    raise TypeError(
        f"a SparseTensor {operator} takes a scalar, got {what}. For two tensors of one support, or a factor "
        f"for each channel, use x.with_values(x.values {operator} ...); for any function, x.map(f)."
    )


def _check_arrays(keys: Any, values: Any) -> None:
    for name, array in (("keys", keys), ("values", values)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}.")
        if len(array.shape) != 3:
            raise ValueError(
                f"{name} must have three axes (batch, channel, slot), got shape {array.shape}."
            )
    check_dtypes(keys, values)
    batch, channels, slots = values.shape
    if keys.shape not in ((batch, channels, slots), (batch, 1, slots)):
        raise ValueError(
            f"keys must have the shape {(batch, channels, slots)} of values, or {(batch, 1, slots)} for a "
            f"shared support, got {keys.shape}."
        )
    if slots < 1:
        raise ValueError("a SparseTensor needs a capacity of at least 1, got 0 slots.")


def _raise_at(what: str, wrong: np.ndarray, x: SparseTensor) -> None:
    if wrong.any():
        batch, channel, slot = np.argwhere(wrong)[0].tolist()
        where = f"batch {batch}, channel {channel}" + (" (shared by all)" if x.shared else "")
        raise ValueError(
            f"segment ({where}) has {what.format(sites=x.sites)}, at slot {slot} of {x.capacity}. "
            f"Keys must ascend strictly, and padding (key {x.sites}, value 0) must come last."
        )
