"""A feature map read at points."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ilajax import ffi
from ilajax.geometry import ravel, sites
from ilajax.ops._points import (
    as_array,
    as_batch_index,
    as_int32,
    by_sample,
    check_batch_index,
    check_not_split,
    first,
)
from ilajax.sparse_tensor import SparseTensor, check_sparse

METHODS = ("nearest", "linear")


def sample(
    x: SparseTensor,
    points: jax.Array,
    batch_index: jax.Array | None = None,
    *,
    method: str = "nearest",
) -> jax.Array:
    """The features of a map at points between the sites.

    Site i covers [i, i + 1) along an axis, and its centre is i + 0.5. A site that is not stored, or lies
    outside the grid, counts as 0, so that "linear" fades out within half a voxel of the border:

        nearest:  y[n] = x[floor(p[n])]
        linear:   y[n] = sum over the 2**d sites i around q = p[n] - 0.5 of x[i] prod_a (1 - |q_a - i_a|)

    The gradient flows to the values of x, not to the points. Nothing is densified: each site is searched
    for among the keys of its sample.

    Points come in one list, or, with a batch axis in front, in a list for each sample, which is the form for
    a batch that is sharded over several devices: see `from_points`.

    Args:
      x: the feature map [B, *S, C], of own or shared supports.
      points: float[N, d], in voxels of x; or float[B, N, d].
      batch_index: int[N], the sample of each point; -1 marks a padding point. With a batch axis int[B, N], -1
        or the row's own number, which is the default.
      method: "nearest" or "linear".

    Returns:
      The features [N, C] or [B, N, C] in x's dtype; 0 for padding points and far outside the grid.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, shape or value; and, where the arrays are
        concrete, for a batch index out of range and for NaN points. Inside `jit` such points give 0.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[1.0, 3.0, 0.0]])[..., None], capacity=2)
      >>> ilajax.sample(x, jnp.array([[1.2], [1.0]]), jnp.array([0, 0]), method="linear")
      Array([[2.4],
             [2. ]], dtype=float32)
    """
    check_sparse("x", x)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    # Checked as it comes: JAX would wrap 64-bit integers around before anybody has seen them.
    points = as_array(points)
    batch_index = as_batch_index(batch_index, points)
    _check_points(x, points, batch_index)
    operands = (x.keys, x.values, points, as_int32(batch_index))
    run = functools.partial(_sample, x.spatial_shape, method)
    if points.ndim == 2:
        return run(*ffi.vary_together(*map(jnp.asarray, operands)))
    one_sample = (x.keys[:, None], x.values[:, None], points)
    return by_sample(run, one_sample, operands[-1])


@functools.partial(jax.jit, static_argnums=(0, 1))  # eagerly too: one program in place of fifty
@jax.named_scope("ilajax.sample")
def _sample(
    spatial_shape: tuple[int, ...],
    method: str,
    keys: jax.Array,
    values: jax.Array,
    points: jax.Array,
    batch: jax.Array,
) -> jax.Array:
    """[N, C]. The 2**d corners of "linear" stand on a leading axis; "nearest" has one corner."""
    extent = jnp.array(spatial_shape, jnp.float32)
    points = jax.lax.stop_gradient(points).astype(jnp.float32)
    # Far points are drawn near, where float to int conversion is defined; NaN too, and read nothing.
    points = jnp.clip(jnp.where(jnp.isnan(points), -1, points), -1, extent + 1)
    if method == "nearest":
        corner = jnp.floor(points)[None]
        weight = jnp.ones((1, batch.shape[0], 1), jnp.float32)
    else:
        low = jnp.floor(points - 0.5)
        rest = points - 0.5 - low
        upper = jnp.array(list(itertools.product((0, 1), repeat=len(spatial_shape))))[:, None, :]
        corner = low + upper
        weight = jnp.where(upper == 1, rest, 1 - rest).prod(axis=2, keepdims=True)
    site = ravel(list(jnp.moveaxis(corner.astype(jnp.int32), -1, 0)), spatial_shape)[..., None]

    inside = (batch >= 0) & (batch < keys.shape[0])
    batch = jnp.where(inside, batch, 0)[:, None]
    slot, found = _find(keys, batch, site)
    found &= inside[:, None] & (site < sites(spatial_shape))  # the key of padding is no site
    found &= weight > 0  # an infinite neighbour of weight 0 would make a NaN
    # Read in float32, so that the gradient is summed in it.
    wide = values.astype(jnp.float32)
    entry = wide[batch, jnp.arange(values.shape[1]), slot]
    return jnp.where(found, entry * weight, 0).sum(axis=0).astype(values.dtype)


def _find(keys: jax.Array, batch: jax.Array, site: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slot of each site [corners, N, 1] in the segments of its sample, and whether it is stored.

    A binary search of each point in its own segments, [corners, N, C or 1]: `jnp.searchsorted` under vmap
    would copy the segments for each point.
    """
    slots = keys.shape[2]
    row = jnp.arange(keys.shape[1])
    longest = 1 << (slots.bit_length() - 1)

    def advance(step: int, below: jax.Array) -> jax.Array:
        """`below` keys are known to be smaller: are so many more? Past the end, the last key answers."""
        ahead = below + (longest >> step)
        return jnp.where(keys[batch, row, jnp.minimum(ahead, slots) - 1] < site, ahead, below)

    start = (site + row) * 0  # of the final shape, and varying over the mesh as the sites do
    below = jax.lax.fori_loop(0, longest.bit_length(), advance, start)
    slot = jnp.minimum(below, slots - 1)
    return slot, keys[batch, row, slot] == site


def _check_points(x: SparseTensor, points: jax.Array, batch_index: jax.Array) -> None:
    rank = len(x.spatial_shape)
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(
            f"points must be floats in voxels of x, got {points.dtype}. The centre of voxel i is i + 0.5."
        )
    if points.ndim not in (2, 3) or points.shape[-1] != rank:
        raise ValueError(
            f"points must have shape [N, {rank}] or [B, N, {rank}] for the grid {x.spatial_shape}, got "
            f"{points.shape}."
        )
    if points.ndim == 3 and points.shape[0] != x.batch_size:
        raise ValueError(
            f"points must have the batch size {x.batch_size} of x in front, got shape {points.shape}."
        )
    if not jnp.issubdtype(batch_index.dtype, jnp.integer):
        raise TypeError(f"batch_index must be integers, got {batch_index.dtype}.")
    if batch_index.shape != points.shape[:-1]:
        raise ValueError(
            f"batch_index must have shape {list(points.shape[:-1])}, one sample for each point, got "
            f"{batch_index.shape}."
        )
    if points.ndim == 2:
        check_not_split("points", points)
        check_not_split("x", x.values)
    if isinstance(batch_index, jax.core.Tracer):
        return  # any point may be padding
    index = np.asarray(batch_index)
    check_batch_index(index, x.batch_size)
    if not isinstance(points, jax.core.Tracer):
        nan = np.isnan(np.asarray(points)).any(axis=-1) & (index != -1)
        if nan.any():
            raise ValueError(
                f"points must not be NaN, got NaN for point {first(nan)} ({int(nan.sum())} such points). "
                f"Drop them, or mark them with batch_index -1."
            )
