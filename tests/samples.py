"""Seeded random tensors and kernels for the tests."""

import math

import jax.numpy as jnp
import numpy as np

import ilajax
from ilajax.ffi import routes

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def platform():
    """The platform of the default device, by the name that its kernels are registered under."""
    return routes.default_platform()


def small_integers(rng, shape, *, zeros=False):
    """Integers of -4 to 4, which every dtype and every sum in a small test represents exactly."""
    values = rng.integers(-4, 5, shape)
    return values if zeros else np.where(values == 0, 3, values)


def tensor(
    seed,
    batch=2,
    channels=2,
    spatial_shape=(5, 6),
    *,
    capacity=12,
    density=0.4,
    dtype="float32",
    shared=False,
    exact=True,
    zeros=False,
):
    """A tensor whose segments hold a random number of entries; `zeros`: some stored values are 0."""
    rng = np.random.default_rng(seed)
    sites = math.prod(spatial_shape)
    rows = 1 if shared else channels
    keys = np.full((batch, rows, capacity), sites, np.int32)
    for segment in keys.reshape(-1, capacity):
        count = min(int(rng.binomial(sites, density)), capacity)
        segment[:count] = np.sort(rng.choice(sites, count, replace=False))
    shape = (batch, channels, capacity)
    values = small_integers(rng, shape, zeros=zeros) if exact else rng.normal(size=shape)
    values = np.where(keys < sites, values, 0)
    return ilajax.SparseTensor(
        jnp.asarray(keys),
        jnp.asarray(values.astype(np.float32), DTYPES[dtype]),
        tuple(spatial_shape),
    )


def kernel(
    seed,
    window=(3, 3),
    in_channels=2,
    out_channels=3,
    *,
    density=0.7,
    padding=2,
    dtype="float32",
    exact=True,
    empty=False,
    zeros=False,
):
    """A kernel with random live weights and `padding` empty slots.

    `empty`: the last output channel has no live weight. `zeros`: some live weights are 0.
    """
    rng = np.random.default_rng(seed + 1000)
    shape = (*window, in_channels, out_channels)
    size = math.prod(shape)
    live = rng.random(size) < density
    if empty:
        live[size - size // out_channels :] = False
    slots = size + padding
    keys = np.full(slots, size, np.int32)
    keys[: live.sum()] = np.flatnonzero(live)
    values = small_integers(rng, slots, zeros=zeros) if exact else rng.normal(size=slots)
    values = np.where(keys < size, values, 0)
    return ilajax.SparseKernel(
        jnp.asarray(keys), jnp.asarray(values.astype(np.float32), DTYPES[dtype]), shape
    )


def from_entries(spatial_shape, segments, capacity, dtype="float32"):
    """A tensor from segments [B][C] of {key: value}."""
    sites = math.prod(spatial_shape)
    shape = (len(segments), len(segments[0]), capacity)
    keys, values = np.full(shape, sites, np.int32), np.zeros(shape, np.float32)
    for b, sample in enumerate(segments):
        for c, entries in enumerate(sample):
            for slot, key in enumerate(sorted(entries)):
                keys[b, c, slot], values[b, c, slot] = key, entries[key]
    return ilajax.SparseTensor(
        jnp.asarray(keys), jnp.asarray(values, DTYPES[dtype]), tuple(spatial_shape)
    )


def integers(seed, shape, dtype="float32"):
    """An array of small integers, zeros too."""
    rng = np.random.default_rng(seed + 2000)
    return jnp.asarray(small_integers(rng, shape, zeros=True).astype(np.float32), DTYPES[dtype])


def with_padding(x, extra):
    """The same tensor with `extra` more slots of padding."""
    pad = [(0, 0), (0, 0), (0, extra)]
    return ilajax.SparseTensor(
        jnp.pad(x.keys, pad, constant_values=math.prod(x.spatial_shape)),
        jnp.pad(x.values, pad),
        x.spatial_shape,
    )
