"""Nearest-neighbour upsampling against `np.repeat` and loops over sites."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples


@functools.cache
def program(backend, factor, capacity=None):
    """jit of an upsampling and its gradient; the cotangent is a function of the output's shape."""

    @jax.jit
    def run(x, support=None):
        def values(values):
            y = ilajax.upsample(x.with_values(values), factor, support=support, capacity=capacity)
            return y.values, y

        fine, pull, y = jax.vjp(values, x.values, has_aux=True)
        g = (jnp.arange(fine.size) % 7 - 3).astype(fine.dtype).reshape(fine.shape)
        return y, g, pull(g)[0]

    return run


def expected(x, factor, grid, keys):
    """The values at fine keys [B][C], and for each of them the slot that it comes from; None: it has none."""
    table = []
    for b, sample in enumerate(oracles.segments(x)):
        table.append([])
        for c, entries in enumerate(sample):
            stored = {key: (value, slot) for slot, key, value in entries}
            found = []
            for key in keys[b][c]:
                if key == math.prod(grid):
                    continue
                cell = [
                    int(p) // f for p, f in zip(np.unravel_index(key, grid), factor, strict=True)
                ]
                coarse = int(np.ravel_multi_index(cell, x.spatial_shape))
                found.append((key, *stored.get(coarse, (0.0, None))))
            table[-1].append(found)
    return table


def check(backend, x, factor, support=None):
    """Compares keys, values and gradient, exactly."""
    rank = len(x.spatial_shape)
    factors = (factor,) * rank if isinstance(factor, int) else factor
    y, g, gradient = program(backend, factor)(x, support)
    if support is None:
        grid = tuple(s * f for s, f in zip(x.spatial_shape, factors, strict=True))
        # Where a map of ones is not 0, once it is spread.
        ones = jnp.where(x.keys < x.sites, 1.0, 0.0)
        mask = oracles.dense(ilajax.SparseTensor(x.keys, ones, x.spatial_shape))
        for axis, f in enumerate(factors):
            mask = np.repeat(mask, f, axis + 1)
        planes = np.moveaxis(mask, -1, 1).reshape(x.batch_size, -1, math.prod(grid))
        keys = [[np.flatnonzero(plane).tolist() for plane in sample] for sample in planes]
        capacity = min(x.capacity * math.prod(factors), math.prod(grid))
        assert y.shared == x.shared
    else:
        grid, capacity = support.spatial_shape, support.capacity
        keys = oracles.read(support.keys).tolist()
        assert y.shared == support.shared
    each = [[sample[c % len(sample)] for c in range(x.channels)] for sample in keys]
    table = expected(x, factors, grid, each)
    kept = [[[(key, value) for key, value, _ in found] for found in sample] for sample in table]
    oracles.assert_tensor(y, *oracles.pack(kept, capacity, math.prod(grid), x.values.dtype))
    assert y.spatial_shape == grid
    assert y.dtype == x.dtype
    want = np.zeros(x.values.shape)
    for b, sample in enumerate(table):
        for c, found in enumerate(sample):
            for place, (_, _, slot) in enumerate(found):
                if slot is not None:
                    want[b, c, slot] += float(g[b, c, place])
    oracles.assert_close(gradient, want)
    return y


SHAPES = [((5,), 3), ((3, 4), 2), ((3, 2), (1, 4)), ((2, 3, 2), 2), ((2, 1, 2, 2), (2, 3, 1, 2))]


@pytest.mark.crossed(3)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_sites_of_the_cells(backend, shape, shared):
    """Catches keys out of order, a value in another cell, and a gradient that is not the cell's sum."""
    grid, factor = shape
    dtype = list(samples.DTYPES)[sum(grid) % 3]
    options = {"dtype": dtype, "shared": shared, "zeros": True}
    check(
        backend, samples.tensor(sum(grid), 2, 3, grid, capacity=math.prod(grid), **options), factor
    )


@pytest.mark.crossed(5)
@pytest.mark.parametrize("own", ["neither", "support", "map", "both"])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_a_given_support(backend, dtype, own):
    """Catches a site whose cell is not stored, in any mix of shared and own keys, on a grid cut short."""
    x = samples.tensor(
        1, 2, 3, (3, 4), capacity=9, density=0.5, dtype=dtype, shared=own in ("neither", "support")
    )
    support = samples.tensor(
        2, 2, 3, (5, 8), capacity=30, density=0.6, dtype=dtype, shared=own in ("neither", "map")
    )
    y = check(backend, x, 2, support)
    assert ilajax.upsample(x, 2, support=support).keys is support.keys
    assert y.capacity == 30


@pytest.mark.nans
def test_what_is_not_finite_stays_in_its_cell(backend):
    """Catches NaN and infinity that leak into other sites, and a zero that is not stored."""
    x = samples.from_entries((4,), [[{0: np.nan, 1: 0.0, 3: -np.inf}]], 4)
    y = jax.jit(lambda x: ilajax.upsample(x, 2))(x)
    np.testing.assert_array_equal(y.keys[0, 0], [0, 1, 2, 3, 6, 7, 8, 8])
    np.testing.assert_array_equal(y.values[0, 0], [np.nan, np.nan, 0, 0, -np.inf, -np.inf, 0, 0])


@pytest.mark.nans
def test_cotangents_at_padding_are_ignored(backend):
    """Catches a cotangent that leaks out of an empty slot."""
    x = samples.from_entries((4,), [[{0: 1.0, 3: 2.0}]], 3)
    _, pull = jax.vjp(lambda v: ilajax.upsample(x.with_values(v), 2).values, x.values)
    (gradient,) = pull(jnp.where(jnp.arange(6) < 4, 1.0, jnp.nan)[None, None])
    np.testing.assert_array_equal(gradient, [[[2, 2, 0]]])


def test_a_capacity_selects_by_absolute_value(backend):
    """Catches a capacity that cuts by place, and one that is ignored where nothing is cut."""
    x = samples.from_entries((4,), [[{0: 1.0, 1: -3.0, 3: 2.0}]], 3)
    y, _, gradient = program(backend, 2, 3)(x)
    np.testing.assert_array_equal(y.keys, [[[2, 3, 6]]])
    np.testing.assert_array_equal(y.values, [[[-3, -3, 2]]])
    np.testing.assert_array_equal(gradient, [[[0, -3 - 2, -1]]])
    assert ilajax.upsample(x, 2, capacity=11).capacity == 11


def test_pooling_undoes_it(backend):
    """Catches a factor that is not pooling's window: the mean over each cell is the value again."""
    x = samples.tensor(5, 2, 2, (4, 5), capacity=15)
    up = jax.jit(lambda x: ilajax.avg_pool(ilajax.upsample(x, (2, 3)), (2, 3), capacity=15))(x)
    oracles.assert_tensor(up, x.keys, x.values, tolerance=1e-6)


def test_under_vmap_and_scan(backend):
    """Catches a mapped axis that is not folded into the batch."""
    x = samples.tensor(6, 3, 2, (3, 3), capacity=6)
    each = jax.tree.map(lambda a: a[:, None], x)
    want = jax.jit(lambda x: ilajax.upsample(x, 2))(x)
    mapped = jax.jit(jax.vmap(lambda x: ilajax.upsample(x, 2)))(each)
    _, scanned = jax.jit(
        lambda x: jax.lax.scan(lambda _, x: (None, ilajax.upsample(x, 2)), None, x)
    )(each)
    for got in (mapped, scanned):
        np.testing.assert_array_equal(got.keys[:, 0], want.keys)
        np.testing.assert_array_equal(got.values[:, 0], want.values)
