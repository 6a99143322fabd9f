"""Supports of several tensors put together: their union, and values spread over it."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ilajax import ffi
from ilajax.sparse_tensor import SparseTensor, check_sparse


def check_alike(tensors: Mapping[str, SparseTensor], properties: Sequence[str]) -> None:
    """Raises TypeError unless all arguments are SparseTensors, ValueError unless these properties agree."""
    head, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        check_sparse(name, x)
        for what in properties:
            wanted, got = getattr(first, what), getattr(x, what)
            if got != wanted:
                raise ValueError(f"{head} and {name} must agree in {what}, got {wanted} and {got}.")


def have_one_support(tensors: Mapping[str, SparseTensor], same_support: bool) -> bool:
    """Whether all arguments carry one and the same keys array, or the user says that their keys are equal.

    Raises:
      ValueError: if `same_support` is said of keys that differ, as far as they are concrete.
    """
    head, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.keys is first.keys:
            continue
        if not same_support:
            return False
        differ = _where_keys_differ(first, x)
        if differ:
            raise ValueError(
                f"same_support=True needs equal keys, but those of {head} and {name} differ {differ}. Leave "
                "same_support out to get the union of the supports."
            )
    return True


def _where_keys_differ(a: SparseTensor, b: SparseTensor) -> str:
    """In words; "" where they do not, or where nothing can be seen yet."""
    if a.keys.shape != b.keys.shape:
        return f"in shape, {a.keys.shape} and {b.keys.shape}"
    if any(isinstance(keys, jax.core.Tracer) for keys in (a.keys, b.keys)):
        return ""
    differ = np.argwhere(np.any(np.asarray(a.keys) != np.asarray(b.keys), axis=2))
    return "in the segment (batch {}, channel {})".format(*differ[0]) if differ.size else ""


@jax.named_scope("ilajax.union")
def spread_over_union(tensors: Sequence[SparseTensor]) -> list[SparseTensor]:
    """The same tensors with the union of their supports, which they then share; 0 where one has no site.

    Args:
      tensors: all with shared supports, or all with as many channels and keys for each.

    Returns:
      As many tensors with one and the same keys array, of as many slots as all have together, or as the
      grid has sites. What padding held is dropped, and cotangents at padding go nowhere.
    """
    sites = tensors[0].sites
    slots = min(sum(x.capacity for x in tensors), sites)
    varying = ffi.vary_together(*(a for x in tensors for a in (x.keys, x.values)))
    keys = jnp.concatenate(varying[0::2], axis=2)
    keys = jnp.where(keys < 0, sites, jnp.minimum(keys, sites))

    # Functions of one segment, mapped and not indexed: a sharded batch stays where it is.
    def union(keys):
        keys, entry = jax.lax.sort((keys, jnp.arange(keys.size, dtype=jnp.int32)), num_keys=1)
        first = keys != jnp.concatenate([jnp.full_like(keys[:1], -1), keys[:-1]])
        slot = jnp.where(keys < sites, jnp.cumsum(first, dtype=jnp.int32) - 1, slots)
        all_keys = jnp.full(slots, sites, jnp.int32).at[slot].set(keys, mode="drop")
        return all_keys, jnp.zeros_like(slot).at[entry].set(slot)

    def spread(slot, values):
        # Added, not set: the gradient is then a gather and no more.
        return jnp.zeros(slots, values.dtype).at[slot].add(values, mode="drop")

    keys, slot = jax.vmap(jax.vmap(union))(keys)
    result = []
    for x, values in zip(tensors, varying[1::2], strict=True):
        own = jnp.broadcast_to(slot[:, :, : x.capacity], values.shape)
        slot = slot[:, :, x.capacity :]
        result.append(SparseTensor(keys, jax.vmap(jax.vmap(spread))(own, values), x.spatial_shape))
    return result
