"""Between dense arrays and sparse tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ilajax import ffi
from ilajax.geometry import check_spatial_shape, not_negative, sites
from ilajax.ops._shapes import Array, Float, Int32
from ilajax.ops.k_select import Selected, Selection, check_capacity, check_select, select_reference
from ilajax.sparse_tensor import VALUE_DTYPES, SparseTensor, check_sparse

_SCATTER, _GATHER = ffi.declare("to_dense")
_FROM_DENSE, _ = ffi.declare("from_dense")  # its gradient is to_dense


def to_dense(x: SparseTensor) -> jax.Array:
    """The dense array [B, *S, C] of a sparse tensor; its gradient is gathered at the stored keys.

    Raises:
      TypeError: if x is not a SparseTensor.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> ilajax.to_dense(x).shape
      (1, 3, 3, 1)
    """
    check_sparse("x", x)
    planes = _to_dense(x.sites, *ffi.place((x.keys, x.values), (True, True)))
    return jnp.moveaxis(planes, 1, 2).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_dense(sites: int, keys: jax.Array, values: jax.Array) -> jax.Array:
    """[B, C, sites]."""
    return _scatter(sites, keys, values)


def _scatter(
    sites: int, keys: Int32[Array, "b ck k"], values: Float[Array, "b c k"]
) -> Float[Array, "b c {sites}"]:
    def reference(keys, values):
        keys = jnp.broadcast_to(not_negative(keys, sites), values.shape)
        # Mapped over segments, not indexed by them: a sharded batch stays where it is.
        segment = lambda k, v: jnp.zeros(sites, v.dtype).at[k].set(v, mode="drop")  # noqa: E731
        return (jax.vmap(jax.vmap(segment))(keys, values),)

    each = (ffi.result((values.shape[1], sites), values.dtype),)
    return ffi.dispatch(_SCATTER, reference, (keys, values), (True, True), each)[0]


def _gather(
    sites: int, keys: Int32[Array, "b ck k"], planes: Float[Array, "b c {sites}"]
) -> Float[Array, "b c k"]:
    def reference(keys, planes):
        keys = jnp.broadcast_to(not_negative(keys, sites), (*planes.shape[:2], keys.shape[2]))
        return (jnp.take_along_axis(planes, keys, axis=2, mode="fill", fill_value=0),)

    each = (ffi.result((planes.shape[1], keys.shape[2]), planes.dtype),)
    return ffi.dispatch(_GATHER, reference, (keys, planes), (True, True), each)[0]


def _to_dense_forward(sites, keys, values):
    return _to_dense(sites, keys, values), keys


def _to_dense_backward(sites, keys, cotangent):
    return None, _gather(sites, keys, cotangent)


_to_dense.defvjp(_to_dense_forward, _to_dense_backward)


def from_dense(x: jax.Array, capacity: int, *, select: str | None = "magnitude") -> SparseTensor:
    """The non-zeros of a dense array, at most the `capacity` strongest of each sample and channel.

    Its gradient is scattered to the kept sites.

    Args:
      x: float32, bfloat16 or float16 [B, *S, C]; NaN counts as a non-zero.
      capacity: slots of the result.
      select: what is kept where there are more non-zeros than slots, see `k_select`; "positive" keeps
        values above 0 only. None: nothing is to be cut, and an array that does not fit raises. Inside `jit`,
        where nobody can look, None is "magnitude".

    Returns:
      A SparseTensor that gives each channel its own support. For one support for all channels see
      `from_points`.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, rank or value; with `select=None` also where
        a concrete x has more non-zeros than slots in a segment.

    Example:
      >>> ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3).keys
      Array([[[0, 4, 8]]], dtype=int32)
    """
    given: object = x
    if isinstance(given, SparseTensor) or not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"x must be an array [B, *S, C], got {type(x).__name__}.")
    if len(x.shape) < 3 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have the axes [B, *S, C] with at least one spatial axis and one channel, got shape "
            f"{x.shape}."
        )
    if x.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"x must be float32, bfloat16 or float16, of NumPy or JAX, got {x.dtype}. Convert it, as in "
            f"jnp.asarray(x, jnp.float32)."
        )
    spatial_shape = check_spatial_shape(x.shape[1:-1])
    capacity = check_capacity(capacity)
    if select is None and not isinstance(x, jax.core.Tracer):
        _raise_if_cut(np.asarray(x), capacity)
    select = "magnitude" if select is None else select
    check_select(select)
    (x,) = ffi.place((jnp.asarray(x),), (True,))
    flat = x.reshape(x.shape[0], sites(spatial_shape), x.shape[-1])
    keys, values = _from_dense(Selection(sites(spatial_shape), capacity, select), flat)
    return SparseTensor(keys, values, spatial_shape)


def _raise_if_cut(x: np.ndarray, capacity: int) -> None:
    counts = np.count_nonzero(x, axis=tuple(range(1, x.ndim - 1)))
    if (counts > capacity).any():
        batch, channel = np.unravel_index(counts.argmax(), counts.shape)
        raise ValueError(
            f"capacity is {capacity}, but x has {counts.max()} non-zeros in the segment (batch {batch}, "
            f'channel {channel}). Raise the capacity, or say what to keep, as in select="magnitude".'
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_dense(selection: Selection, x: jax.Array) -> Selected:
    """From [B, sites, C]."""

    def reference(x):
        values = jnp.moveaxis(x, 2, 1)
        keys = jnp.broadcast_to(jnp.arange(selection.sites, dtype=jnp.int32), values.shape)
        return tuple(select_reference(keys, values, values != 0, *selection))

    shape = (x.shape[2], selection.capacity)
    each = (ffi.result(shape, jnp.int32), ffi.result(shape, x.dtype))
    results = ffi.dispatch(_FROM_DENSE, reference, (x,), (True,), each, select=selection.select)
    return Selected(*results)


def _from_dense_forward(selection, x):
    selected = _from_dense(selection, x)
    return selected, selected.keys


def _from_dense_backward(selection, keys, cotangents):
    planes = _scatter(selection.sites, keys, cotangents.values)
    return (jnp.moveaxis(planes, 1, 2),)


_from_dense.defvjp(_from_dense_forward, _from_dense_backward)
