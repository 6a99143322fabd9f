"""Supports of several tensors, or channels, put together: their union, and values spread over it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


def place_alike(tensors: Sequence[SparseTensor]) -> list[SparseTensor]:
    """The same tensors, with all their arrays split over devices as the batch is, see `ffi.place`.

    Tensors of one keys array may get several: ask `have_one_support` before.
    """
    arrays = [a for x in tensors for a in (x.keys, x.values)]
    placed = ffi.place(arrays, [True] * len(arrays))
    pairs = zip(tensors, placed[0::2], placed[1::2], strict=True)
    return [SparseTensor(keys, values, x.spatial_shape) for x, keys, values in pairs]


def spread_over_union(tensors: Sequence[SparseTensor]) -> list[SparseTensor]:
    """The same tensors with the union of their supports, which they then share; 0 where one has no site.

    Args:
      tensors: placed alike, with shared supports.

    Returns:
      As many tensors with one and the same keys array, of as many slots as all have together, or as the
      grid has sites. What padding held is dropped, and cotangents at padding go nowhere.
    """
    keys, values = _union(tensors)
    return [SparseTensor(keys, own, tensors[0].spatial_shape) for own in values]


class Moves(NamedTuple):
    """Where entries stand in a union.

    Attributes:
      slot_of: int32[B, C, K], the slot of each entry; one past the last for padding.
      entry_in: int32[B, C, U], the entry in each slot; one past the last where there is none.
    """

    slot_of: jax.Array
    entry_in: jax.Array


def over_one_support(x: SparseTensor) -> SparseTensor:
    """The same tensor with one support for all channels: the union of theirs, 0 where one has no site."""
    if x.shared:
        return x
    keys, moves = shared_union(x)
    return SparseTensor(keys, jax.vmap(jax.vmap(_moved))(x.values, *moves), x.spatial_shape)


@jax.jit
@jax.named_scope("ilajax.union")
def shared_union(x: SparseTensor) -> tuple[jax.Array, Moves]:
    """The union of all channels' supports, int32[B, 1, U], and where each channel's entries stand in it."""
    slots = min(x.channels * x.capacity, x.sites)
    keys, slot_of = _union_of(
        x.keys.reshape(x.batch_size, 1, x.channels * x.capacity), x.sites, slots
    )
    slot_of = slot_of.reshape(x.keys.shape)
    return keys, Moves(slot_of, _entries_in(slot_of, slots))


def at_slots(values: jax.Array, moves: Moves) -> jax.Array:
    """Values over a union, [B, C, U], at the entries' slots: [B, C, K]."""
    return jax.vmap(jax.vmap(_moved))(values, moves.entry_in, moves.slot_of)


def at_entries(values: jax.Array, kept: jax.Array) -> jax.Array:
    """Values [B, C, K] at some of the entries, int32[B, 1, Q]; 0 one past the last entry."""
    slot_of = _entries_in(kept, values.shape[2])
    return jax.vmap(jax.vmap(_moved, (0, None, None)))(values, slot_of[:, 0], kept[:, 0])


@jax.jit  # By itself, a constant does not find the mesh of arrays whose types name one.
@jax.named_scope("ilajax.union")
def _union(tensors: Sequence[SparseTensor]) -> tuple[jax.Array, list[jax.Array]]:
    """The keys of the union, and the values of each tensor in its slots."""
    sites = tensors[0].sites
    slots = min(sum(x.capacity for x in tensors), sites)
    keys, slot = _union_of(jnp.concatenate([x.keys for x in tensors], axis=2), sites, slots)
    result = []
    for x in tensors:
        slot_of, slot = slot[:, :, : x.capacity], slot[:, :, x.capacity :]
        moves = (slot_of[:, 0], _entries_in(slot_of, slots)[:, 0])
        # All channels move alike.
        result.append(jax.vmap(jax.vmap(_moved, (0, None, None)))(x.values, *moves))
    return keys, result


def _union_of(keys: jax.Array, sites: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """The keys of each segment's union [..., slots], and the slot of each entry."""
    keys = jnp.where(keys < 0, sites, jnp.minimum(keys, sites))

    # Functions of one segment, mapped and not indexed: a sharded batch stays where it is.
    def union(keys):
        keys, entry = jax.lax.sort((keys, jnp.arange(keys.size, dtype=jnp.int32)), num_keys=1)
        first = keys != jnp.concatenate([jnp.full_like(keys[:1], -1), keys[:-1]])
        slot = jnp.where(keys < sites, jnp.cumsum(first, dtype=jnp.int32) - 1, slots)
        all_keys = jnp.full(slots, sites, jnp.int32).at[slot].set(keys, mode="drop")
        return all_keys, jnp.zeros_like(slot).at[entry].set(slot)

    return jax.vmap(jax.vmap(union))(keys)


def _entries_in(slot_of: jax.Array, slots: int) -> jax.Array:
    """The entry that stands in each slot of a segment; one past the last where none does."""

    def entry_in(slot):
        return jnp.full(slots, slot.size).at[slot].set(jnp.arange(slot.size), mode="drop")

    return jax.vmap(jax.vmap(entry_in))(slot_of)


@jax.custom_vjp
def _moved(values: jax.Array, slot_of: jax.Array, entry_in: jax.Array) -> jax.Array:
    """The values [K] in their slots [U]: read both ways, since a scatter takes XLA three times as long."""
    return _read(values, entry_in)


def _read(values: jax.Array, at: jax.Array) -> jax.Array:
    """0 one past the end."""
    return jnp.pad(values, (0, 1)).at[at].get(mode="promise_in_bounds")


_moved.defvjp(
    lambda values, slot_of, entry_in: (_read(values, entry_in), slot_of),
    lambda slot_of, cotangent: (_read(cotangent, slot_of), None, None),
)
