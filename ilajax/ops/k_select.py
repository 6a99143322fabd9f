"""k-selection, the paper's attention: keep the strongest entries of each sample and channel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import positive
from ilajax.ops._shapes import Array, Bool, Float, Int32
from ilajax.ops._supports import place_alike
from ilajax.sparse_tensor import SparseTensor, check_sparse

SELECTS = ("value", "positive", "magnitude")

_FORWARD, _BACKWARD = ffi.declare("k_select")


def k_select(x: SparseTensor, capacity: int, *, select: str = "value") -> SparseTensor:
    """Keeps the `capacity` strongest stored entries of each sample and channel.

    The gradient flows to the kept entries only. A shared support stays shared where nothing can be cut:
    `select` is not "positive" and `capacity` is at least x's; else each channel gets keys of its own.

    Args:
      x: the tensor; every stored entry is a candidate, stored zeros too.
      capacity: slots of the result; above x's capacity the rest is padding.
      select: "value", the largest; "positive", the largest of those above 0; "magnitude", the largest
        absolute values. NaN ranks first in every mode. Of equal ranks the lower key is kept.

    Returns:
      A SparseTensor with exactly `capacity` slots.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[3.0, -5.0, 0.0, 1.0]])[..., None], capacity=4)
      >>> ilajax.k_select(x, 2, select="magnitude").keys
      Array([[[0, 1]]], dtype=int32)

    Source: Hackel et al., "Preserving sparsity with attention".
    """
    check_sparse("x", x)
    capacity = check_capacity(capacity)
    check_select(select)
    (x,) = place_alike([x])
    if x.shared and select != "positive" and capacity >= x.capacity:
        return pad_slots(x, capacity)
    keys, values = _k_select(Selection(x.sites, capacity, select), x.unshare().keys, x.values)
    return SparseTensor(keys, values, x.spatial_shape)


def check_capacity(capacity: int) -> int:
    """Returns the capacity as an int; TypeError or ValueError unless it is an integer of at least 1."""
    advice = " For a share of the sites use ilajax.capacity(density_bound, spatial_shape)."
    return positive("capacity", capacity, " number of slots", advice)


def check_select(select: str) -> None:
    """Raises ValueError unless `select` names a mode."""
    if select not in SELECTS:
        raise ValueError(f"select must be one of {SELECTS}, got {select!r}.")


def pad_slots(x: SparseTensor, capacity: int) -> SparseTensor:
    """The same tensor with padding appended up to `capacity` slots, which must not be fewer."""
    pad = [(0, 0), (0, 0), (0, capacity - x.capacity)]
    # The mask keeps cotangents at x's own padding from going through.
    values = jnp.where(x.keys < x.sites, x.values, 0)
    return SparseTensor(
        jnp.pad(x.keys, pad, constant_values=x.sites), jnp.pad(values, pad), x.spatial_shape
    )


class Selection(NamedTuple):
    """How entries are selected; `sites` is the key of padding."""

    sites: int
    capacity: int
    select: str


class Selected(NamedTuple):
    """Entries kept by a selection, in the order of their keys; padding at the tail."""

    keys: Int32[Array, "b c q"]
    values: Float[Array, "b c q"]


def select_reference(
    keys: Int32[Array, "*n"],
    values: Float[Array, "*n"],
    candidate: Bool[Array, "*n"],
    sites: int,
    capacity: int,
    select: str,
) -> Selected:
    """The `capacity` candidates [..., n] of highest rank along the last axis, ascending in key."""
    if select == "positive":
        candidate &= (values > 0) | jnp.isnan(values)
    rank = jnp.abs(values) if select == "magnitude" else values
    rank = jnp.where(jnp.isnan(rank), 0, rank.astype(jnp.float32))
    group = jnp.where(candidate, jnp.where(jnp.isnan(values), 0, 1), 2)
    slots = jnp.broadcast_to(jnp.arange(keys.shape[-1], dtype=jnp.int32), keys.shape)
    # Not-a-number first, then by rank, the lower key before the higher; what is no candidate comes last.
    _, _, _, best = jax.lax.sort((group, -rank, keys, slots), dimension=-1, num_keys=3)
    best = best[..., :capacity]
    chosen = jnp.take_along_axis(candidate, best, axis=-1)
    chosen_keys = jnp.where(chosen, jnp.take_along_axis(keys, best, axis=-1), sites)
    chosen_keys, best, chosen = jax.lax.sort((chosen_keys, best, chosen), dimension=-1, num_keys=1)
    chosen_values = jnp.where(chosen, jnp.take_along_axis(values, best, axis=-1), 0)
    pad = [(0, 0)] * (keys.ndim - 1) + [(0, capacity - best.shape[-1])]
    return Selected(jnp.pad(chosen_keys, pad, constant_values=sites), jnp.pad(chosen_values, pad))


def lookup_reference(
    queries: Int32[Array, "b c q"],
    keys: Int32[Array, "b c k"],
    values: Float[Array, "b c k"],
    sites: int,
) -> Float[Array, "b c q"]:
    """For each query key the value stored under it, 0 where there is none or at padding. Keys ascend."""
    search = jax.vmap(jax.vmap(functools.partial(jnp.searchsorted, method="sort")))
    slot = jnp.clip(search(keys, queries), 0, keys.shape[2] - 1)
    found = jnp.take_along_axis(keys, slot, axis=2) == queries
    found &= (queries >= 0) & (queries < sites)
    return jnp.where(found, jnp.take_along_axis(values, slot, axis=2), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _k_select(selection: Selection, keys: jax.Array, values: jax.Array) -> Selected:
    return _forward(selection, keys, values)


def _forward(
    selection: Selection, keys: Int32[Array, "b c k"], values: Float[Array, "b c k"]
) -> Selected:
    def reference(keys, values):
        stored = (keys >= 0) & (keys < selection.sites)
        return tuple(select_reference(keys, values, stored, *selection))

    shape = (values.shape[1], selection.capacity)
    results = ffi.dispatch(
        _FORWARD,
        reference,
        (keys, values),
        (True, True),
        (ffi.result(shape, jnp.int32), ffi.result(shape, values.dtype)),
        sites=selection.sites,
        select=selection.select,
    )
    return Selected(*results)


def _vjp_forward(selection, keys, values):
    selected = _forward(selection, keys, values)
    return selected, (keys, selected.keys)


def _vjp_backward(selection, residuals, cotangents):
    """x_bar[e] is the cotangent of entry e where it was kept, else 0."""
    keys, selected_keys = residuals
    return None, match(selection.sites, keys, selected_keys, cotangents.values)


_k_select.defvjp(_vjp_forward, _vjp_backward)


def match(
    sites: int,
    keys: Int32[Array, "b c k"],
    kept_keys: Int32[Array, "b c q"],
    cotangent: Float[Array, "b c q"],
) -> Float[Array, "b c k"]:
    """Takes the cotangent of kept entries back to all entries: 0 where an entry was not kept."""

    def reference(keys, kept_keys, cotangent):
        return (lookup_reference(keys, kept_keys, cotangent, sites),)

    return ffi.dispatch(
        _BACKWARD,
        reference,
        (keys, kept_keys, cotangent),
        (True,) * 3,
        (ffi.result(keys.shape[1:], cotangent.dtype),),
        sites=sites,
    )[0]
