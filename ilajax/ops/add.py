"""Addition of feature maps over the union of their supports."""

import jax.numpy as jnp

from ilajax.ops._reach import reached_keys
from ilajax.ops._supports import check_alike, have_one_support, place_alike, spread_over_union
from ilajax.ops.conv import conv
from ilajax.ops.k_select import check_capacity, check_select, k_select, pad_slots
from ilajax.ops.upsample import upsample
from ilajax.sparse_tensor import SparseTensor


def add(
    a: SparseTensor,
    b: SparseTensor,
    *,
    capacity: int | None = None,
    select: str = "magnitude",
    same_support: bool = False,
) -> SparseTensor:
    """The sum of two tensors, stored wherever one of them stores a site; `a + b` is the same.

    A site where the sum is 0 stays stored. The gradient flows to the stored entries of both.

    Tensors that carry one and the same keys array keep it. Else two shared supports give the shared union of
    them, and where one has keys for each channel, so has the sum. That one array is the same is seen within
    one trace only: behind `nnx.jit` or `nnx.remat` equal keys come back as another array, and the union gets
    twice the slots. `same_support=True` then says that the keys are equal.

    Args:
      a, b: [B, *S, C], of any of the three dtypes; the result has the dtype that JAX promotes them to.
      capacity: slots of the result; by default those of the union, min(Ka + Kb, sites), or those of a common
        support, which lose nothing. Any other is a k-selection of the sum, see `k_select`; one that can cut
        gives each channel keys of its own, since channels keep different sites.
      select: how that selection ranks; by default by absolute value.
      same_support: the keys of both are equal, and those of `a` are kept. Checked where they are concrete.

    Returns:
      A SparseTensor.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value, if batch sizes, grids or channels
        differ, or concrete keys do under `same_support`.

    Example:
      >>> a = ilajax.from_dense(jnp.array([[1.0, 0.0, 2.0, 0.0]])[..., None], capacity=2)
      >>> b = ilajax.from_dense(jnp.array([[0.0, 5.0, -2.0, 0.0]])[..., None], capacity=2)
      >>> (a + b).keys, (a + b).values
      (Array([[[0, 1, 2, 4]]], dtype=int32), Array([[[1., 5., 0., 0.]]], dtype=float32))
    """
    check_alike({"a": a, "b": b}, ("batch_size", "spatial_shape", "channels"))
    check_select(select)
    one_support = have_one_support({"a": a, "b": b}, same_support)
    a, b = place_alike((a, b))
    if not one_support:
        if a.shared and b.shared:
            a, b = spread_over_union((a, b))
        else:
            a, b = _over_unions(a.unshare(), b.unshare())
    # The mask keeps what padding may hold, and cotangents at it, from going through.
    total = a.with_values(jnp.where(a.keys < a.sites, jnp.add(a.values, b.values), 0))
    if capacity is None or check_capacity(capacity) == total.capacity:
        return total
    return k_select(total, capacity, select=select)


def _over_unions(a: SparseTensor, b: SparseTensor) -> tuple[SparseTensor, SparseTensor]:
    """Both over the union of their supports, channel by channel; 0 where one has no site."""
    slots = min(a.capacity + b.capacity, a.sites)
    width = max(a.capacity, b.capacity)
    lists = jnp.stack([pad_slots(x, width).keys for x in (a, b)], axis=2)
    keys = reached_keys(conv, lists, a.spatial_shape, (1,) * len(a.spatial_shape), slots)
    union = SparseTensor(keys, jnp.zeros(keys.shape), a.spatial_shape)
    return upsample(a, 1, support=union), upsample(b, 1, support=union)


# What `+` calls: the data type stands below its operations.
SparseTensor._add = staticmethod(add)
