"""What the checks on four devices share: a mesh, data that is split over it, and operations in a row."""

import contextlib
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ilajax
import samples

KIND = AxisType[sys.argv[1]]  # of the mesh's axes: the first argument of sharding.py
BATCH = 8
GRID = (5, 6)
KERNEL = samples.kernel(0, (3, 3), 2, 3)
BIAS = jnp.array([1.0, 0.0, -1.0])


def mesh(shape=(4,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(KIND,) * len(names))


def context(mesh):
    """What a user of Explicit axes sets around the whole program."""
    return jax.set_mesh(mesh) if KIND is AxisType.Explicit else contextlib.nullcontext()


def tensor(seed=0, **options):
    return samples.tensor(seed, BATCH, 2, GRID, **options)


def conv(x, weights, bias, **options):
    kernel = dataclasses.replace(KERNEL, values=weights)
    return ilajax.conv(x, kernel, bias, **({"capacity": 7, "select": "value"} | options))


def chain(x, weights, bias):
    """All kinds of operation in a row, [B, C]."""
    x, _ = conv(x, weights, bias)
    x = ilajax.max_pool(ilajax.k_select(x, 6), 2, capacity=5)
    x = ilajax.avg_pool(ilajax.relu(x), (1, 3))
    x = ilajax.from_dense(ilajax.to_dense(x), 3)
    return ilajax.global_max_pool(x) + ilajax.global_avg_pool(x)


def total(weights, bias, x):
    return (chain(x, weights, bias) ** 2).sum()


def submanifold_total(weights, bias, x):
    features, _ = conv(x, weights, bias, capacity=None, select=None, support="input")
    return (features.values**2).sum()


def split(x, spec=P("data")):
    return jax.device_put(x, NamedSharding(mesh(), spec))


def close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)
