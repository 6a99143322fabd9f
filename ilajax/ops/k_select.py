"""k-selection, the paper's attention: keep the strongest entries of each sample and channel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilajax import ffi
from ilajax.geometry import positive
from ilajax.ops._shapes import Array, Bool, Float, Float32, Int32
from ilajax.ops._supports import at_entries, over_one_support, place_alike
from ilajax.sparse_tensor import SparseTensor, check_sparse

SELECTS = ("value", "positive", "magnitude")
SELECT_BY = ("channel", "site")

_FORWARD, _BACKWARD = ffi.declare("k_select")


def k_select(
    x: SparseTensor, capacity: int, *, select: str | None = None, select_by: str = "channel"
) -> SparseTensor:
    """Keeps the `capacity` strongest stored entries of each sample and channel, or the strongest sites.

    The gradient flows to the kept entries only. By channel, a shared support stays shared where nothing can
    be cut: `select` is not "positive" and `capacity` is at least x's; else each channel gets its own keys.

    By site, one support is selected for all channels. Let p be what the selection lets pass of a value: all
    of it under "magnitude", and under "positive" 0 for what is not above 0. Candidates are the sites where
    any channel's p is not 0, and their rank is

      score[b, s] = sum over channels c of p[b, c, s]^2.

    Args:
      x: the tensor; by channel, every stored entry is a candidate, stored zeros too.
      capacity: slots of the result; above x's capacity the rest is padding.
      select: "value", the largest (the default by channel); "positive", the largest of those above 0;
        "magnitude", the largest absolute values (the default by site, where "value" has no meaning). NaN
        ranks first in every mode. Of equal ranks the lower key is kept.
      select_by: "channel", each by itself, or "site".

    Returns:
      A SparseTensor with exactly `capacity` slots; by site with a shared support, and the values p.

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[3.0, -5.0, 0.0, 1.0]])[..., None], capacity=4)
      >>> ilajax.k_select(x, 2, select="magnitude").keys
      Array([[[0, 1]]], dtype=int32)

    Source: Hackel et al., "Preserving sparsity with attention". The paper selects by channel; whole sites are
    ranked as its version ii would, by the magnitude of their vectors.
    """
    check_sparse("x", x)
    capacity = check_capacity(capacity)
    check_select_by(select_by, select)
    if select is None:
        select = "value" if select_by == "channel" else "magnitude"
    check_select(select)
    (x,) = place_alike([x])
    if select_by == "site":
        return _select_sites(over_one_support(x), capacity, select)
    if x.shared and select != "positive" and capacity >= x.capacity:
        return pad_slots(x, capacity)
    keys, values = _k_select(Selection(x.sites, capacity, select), x.unshare().keys, x.values)
    return SparseTensor(keys, values, x.spatial_shape)


def _select_sites(x: SparseTensor, capacity: int, select: str) -> SparseTensor:
    """The strongest sites of a shared support: slots are selected as if they were keys."""
    p = passed(jnp.where(x.keys < x.sites, x.values, 0), select)
    slots = jnp.broadcast_to(jnp.arange(x.capacity, dtype=jnp.int32), x.keys.shape)
    scores = jax.lax.stop_gradient(site_scores(p))
    kept, _ = _k_select(Selection(x.capacity, capacity, "positive"), slots, scores)
    padded = jnp.pad(x.keys, [(0, 0), (0, 0), (0, 1)], constant_values=x.sites)
    keys = jax.vmap(jax.vmap(lambda keys, at: keys.at[at].get(mode="promise_in_bounds")))(
        padded, kept
    )
    return SparseTensor(keys, at_entries(p, kept), x.spatial_shape)


def passed(values: Float[Array, "b c k"], select: str) -> Float[Array, "b c k"]:
    """What a selection of sites lets pass: under "positive" 0 for what is not above 0, NaN apart."""
    return jnp.where(values <= 0, 0, values) if select == "positive" else values


def site_scores(p: Float[Array, "b c k"]) -> Float32[Array, "b 1 k"]:
    """The sum of p^2 over the channels; above 0 wherever a p is not 0, however small."""
    score = jnp.sum(jnp.square(p.astype(jnp.float32)), axis=1, keepdims=True)
    any_passed = jnp.any(p != 0, axis=1, keepdims=True)
    return jnp.where(any_passed, jnp.maximum(score, jnp.finfo(jnp.float32).tiny), 0)


def check_select_by(select_by: object, select: str | None) -> None:
    """Raises ValueError unless `select_by` is known, and goes with `select`."""
    if not isinstance(select_by, str) or select_by not in SELECT_BY:
        raise ValueError(
            f"select_by must be one of {SELECT_BY}, got {select_by!r}. Each channel selects by itself under "
            f'"channel"; all together, onto one support, under "site".'
        )
    if select_by == "site" and select == "value":
        raise ValueError(
            'select must be "positive" or "magnitude" under select_by="site", got "value": the vectors of '
            "several channels have no largest value."
        )


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


def select_sites_reference(
    keys: Int32[Array, "b 1 k"], p: Float[Array, "b c k"], sites: int, capacity: int
) -> Selected:
    """The `capacity` sites of the highest scores, ascending in key, and what passed there."""
    scores = site_scores(p)
    slots = jnp.broadcast_to(jnp.arange(keys.shape[2], dtype=jnp.int32), keys.shape)
    kept, _ = select_reference(slots, scores, scores != 0, keys.shape[2], capacity, "positive")
    keys = jnp.pad(keys, [(0, 0), (0, 0), (0, 1)], constant_values=sites)
    p = jnp.pad(p, [(0, 0), (0, 0), (0, 1)])
    return Selected(jnp.take_along_axis(keys, kept, axis=2), jnp.take_along_axis(p, kept, axis=2))


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
