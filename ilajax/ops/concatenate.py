"""Joining tensors along their channels."""

from collections.abc import Sequence

import jax.numpy as jnp

from ilajax.ops._supports import check_alike, have_one_support, place_alike, spread_over_union
from ilajax.ops.k_select import pad_slots
from ilajax.sparse_tensor import SparseTensor


def concatenate(tensors: Sequence[SparseTensor], *, same_support: bool = False) -> SparseTensor:
    """Joins tensors along their channels.

    Tensors that carry one and the same shared keys array keep it. Shared supports that differ give the shared
    union of them, 0 where a tensor has no site, in as many slots as all have together, or as the grid has
    sites. Else each channel gets keys of its own, in as many slots as the largest capacity.

    That one array is the same is seen within one trace only: behind `nnx.jit` or `nnx.remat` equal keys come
    back as another array, and give a union of more slots than are used. `same_support=True` then says that
    the keys are equal. A tensor of one channel counts as shared.

    Args:
      tensors: [B, *S, C_i], of one batch size, grid and dtype; capacities may differ.
      same_support: the shared keys of all are equal, and those of the first are kept. Checked where they are
        concrete.

    Returns:
      A SparseTensor [B, *S, sum of C_i].

    Raises:
      TypeError, ValueError: if there is none, if batch sizes, grids or dtypes differ, and under
        `same_support` if a tensor has keys for each channel, or concrete keys differ.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> y = ilajax.from_dense(jnp.ones((1, 3, 3, 1)), capacity=9)
      >>> [ilajax.concatenate([x, other]).keys.shape for other in (x, y)]
      [(1, 1, 3), (1, 1, 9)]
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("tensors must hold at least one SparseTensor, got none.")
    named = {f"tensors[{i}]": x for i, x in enumerate(tensors)}
    check_alike(named, ("batch_size", "spatial_shape", "dtype"))
    shared = [x.shared for x in tensors]
    if same_support and not all(shared):
        raise ValueError(
            f"same_support=True needs shared supports, but tensors[{shared.index(False)}] has keys for each "
            "channel. Leave same_support out: every channel then keeps its own."
        )
    one_support = all(shared) and have_one_support(named, same_support)
    tensors = place_alike(tensors)
    if all(shared):
        if one_support:
            values = [pad_slots(x, x.capacity).values for x in tensors]
        else:
            tensors = spread_over_union(tensors)
            values = [x.values for x in tensors]
        return tensors[0].with_values(jnp.concatenate(values, axis=1))
    slots = max(x.capacity for x in tensors)
    padded = [pad_slots(x.unshare(), slots) for x in tensors]
    return SparseTensor(
        jnp.concatenate([x.keys for x in padded], axis=1),
        jnp.concatenate([x.values for x in padded], axis=1),
        tensors[0].spatial_shape,
    )
