"""Submanifold convolution of many channels, by lines and as products over pairs of sites.

Both forms of the CPU's kernels are compared with matrix products in NumPy, on small integers exactly. What
products do only where a problem is large, they do here on small ones too, by a plan that leaves less room.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples
from ilajax.ffi import plans, routes
from ops.test_submanifold import GEOMETRIES, program

FORMS = {"lines": 1 << 40, "products": 0}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """The native backend in one of its forms, which `program` takes as the name of a backend."""
    if not routes.native_platforms():
        pytest.skip("no kernels are installed")
    if samples.platform() != "cpu" and request.param == "lines":
        pytest.skip("only the CPU's kernels have two forms")
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    with plans.tuned("cpu", products=FORMS[request.param]):
        yield request.param


def stored(seed, channels, grid, counts, *, capacity=None, dtype="float32", exact=True):
    """A tensor of samples that store so many sites each; it has room for the largest, if not for more."""
    rng = np.random.default_rng(seed)
    keys = np.full((len(counts), 1, capacity or max(counts)), math.prod(grid), np.int32)
    for row, count in zip(keys[:, 0], counts, strict=True):
        row[:count] = np.sort(rng.choice(math.prod(grid), count, replace=False))
    shape = (len(counts), channels, keys.shape[2])
    values = samples.small_integers(rng, shape, zeros=True) if exact else rng.normal(size=shape)
    values = jnp.asarray(np.where(keys < math.prod(grid), values, 0), samples.DTYPES[dtype])
    return ilajax.SparseTensor(jnp.asarray(keys), values, grid)


def with_junk(kernel):
    """The same kernel with values under its padding."""
    junk = jnp.where(kernel.keys < kernel.size, kernel.values, 1e6)
    return dataclasses.replace(kernel, values=junk)


def check_products(run, x, kernel, bias, g, dilation=1):
    """Compares with matrix products, exactly; returns the responses expected, without bias."""
    geometry = oracles.Geometry(x.spatial_shape, kernel.window_shape, 1, "SAME", dilation)
    here = np.asarray(x.keys) < x.sites
    g = jnp.where(here, g, 7)
    features, responses, gradients = run(x, kernel, bias, g)
    want, bars = oracles.submanifold_products(x, kernel, geometry, g)
    np.testing.assert_array_equal(responses, (want != 0).sum(axis=2))
    biased = np.where(want != 0, want + oracles.read(bias)[:, None], 0)
    oracles.assert_close(features.values, biased.astype(np.float32).astype(x.dtype))
    for got, bar, primal in zip(gradients, bars, (x.values, kernel.values, bias), strict=True):
        assert got.dtype == primal.dtype
        oracles.assert_close(got, np.asarray(bar, np.float32).astype(got.dtype))
    return want


# grid, window, dilation; the channels and the dtype go round.
PLACES = GEOMETRIES | {
    "1d-pair": ((70,), (2,), 1),
    "1d-5-dilated": ((150,), (5,), 2),
    "2d-dilated": ((9, 11), (3, 3), 2),
    "2d-lines-of-64": ((3, 64), (3, 3), 1),
    "2d-lines-of-one": ((13, 1), (3, 3), 1),
    "2d-lines-of-two": ((13, 2), (3, 3), 1),
    "2d-short-lines": ((70, 3), (3, 3), 1),
    "3d-idle-axes": ((1, 40, 1), (1, 3, 1), 1),
    "3d-one-site": ((1, 1, 1), (3, 1, 3), 1),
    "4d-idle-axes": ((1, 7, 1, 9), (1, 3, 1, 3), 1),
}
CHANNELS = [(1, 40), (40, 1), (3, 8), (8, 9), (9, 17), (16, 16), (24, 40), (17, 3), (12, 24)]


@pytest.mark.parametrize("form", ["products"], indirect=True)  # lines: test_submanifold.py
@pytest.mark.parametrize("name", PLACES)
def test_places(form, name):
    """Catches a neighbour of another line or sample, a tap taken for another, channels that get lost."""
    grid, window, dilation = PLACES[name]
    at = list(PLACES).index(name)
    (cin, cout), dtype = CHANNELS[at % len(CHANNELS)], list(samples.DTYPES)[at % 3]
    sites = math.prod(grid)
    for fill in (1.0, 0.4):
        x = stored(
            at, cin, grid, (int(fill * sites), 0, sites // 3), capacity=sites + 3, dtype=dtype
        )
        kernel = with_junk(samples.kernel(at, window, cin, cout, density=0.6, zeros=True))
        bias, g = samples.integers(at, (cout,)), samples.integers(at, (3, cout, x.capacity), dtype)
        check_products(program(form, dilation), x, kernel, bias, g, dilation)


@pytest.mark.parametrize("form", ["products"], indirect=True)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_channels(form, channels):
    """Catches a block of channels that is skipped, done twice or reaches into the next."""
    dtype = list(samples.DTYPES)[(CHANNELS.index(channels) + 1) % 3]
    x = stored(1, channels[0], (6, 7), (20, 42, 1), dtype=dtype)
    kernel = samples.kernel(1, (3, 3), *channels)
    g = samples.integers(1, (3, channels[1], 42), dtype)
    check_products(program(form), x, kernel, samples.integers(1, (channels[1],)), g)


def of_blocks(live):
    """A 3 x 3 kernel of 18 -> 40 channels, live where `live(tap, ic, oc)`."""
    live = np.array([live(*at) for at in np.ndindex(9, 18, 40)])
    w = samples.integers(2, (3, 3, 18, 40))
    return with_junk(ilajax.SparseKernel.from_dense(w, live.reshape(w.shape)))


PRUNED = {
    "all": lambda tap, ic, oc: False,
    "taps": lambda tap, ic, oc: tap in (2, 3),
    "last-outputs": lambda tap, ic, oc: oc in (15, 39),
    "first-output": lambda tap, ic, oc: oc == 16,
    "last-input": lambda tap, ic, oc: ic == 17,
    "blocks": lambda tap, ic, oc: (ic // 6 + oc // 16 + tap) % 3 == 0,
    "one-each-block": lambda tap, ic, oc: (ic * 7 + oc * 5 + tap) % 61 == 0,
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_filters(form, name):
    """Catches a live block that is skipped, and a gradient of a weight that is gone."""
    kernel = of_blocks(PRUNED[name])
    x = stored(2, 18, (5, 9), (30, 12))
    g = samples.integers(2, (2, 40, 30))
    check_products(program(form), x, kernel, samples.integers(2, (40,)), g)


def test_responses_of_zero(form):
    """Catches a response of exactly 0 that gets the bias or is counted, at a site with neighbours."""
    x = stored(3, 16, (4, 5), (20,)).map(lambda v: v.at[:, 1::2].set(-v[:, ::2]))
    w = np.repeat(np.asarray(samples.integers(3, (3, 3, 8, 17))), 2, axis=2)
    w[..., 1::2, 5] = 1
    kernel, g = ilajax.SparseKernel.from_dense(w), samples.integers(3, (1, 17, 20))
    want = check_products(program(form), x, kernel, jnp.full(17, 9.0), g)
    assert (want[:, 5] != 0).any()
    assert (want[:, :5] == 0).all()


@pytest.mark.nans
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["values", "weights", "cotangents"])
def test_nan_and_inf(form, where, bad):
    """Catches 0 * inf, also of an absent weight, and NaN that gets lost, or is in another sample as well."""
    x = stored(4, 9, (5, 9), (30, 12, 20), capacity=32)
    kernel = samples.kernel(4, (3, 3), 9, 17, density=0.5, zeros=True)
    g = samples.integers(4, (3, 17, x.capacity))
    if where == "values":
        x = x.with_values(x.values.at[1, ::2, 3].set(bad).at[1, 4, 7].set(np.inf))
    elif where == "weights":
        values = kernel.values.at[::50].set(bad).at[7].set(np.inf)
        kernel = dataclasses.replace(kernel, values=values)
    else:
        g = g.at[1, ::3, 4].set(bad).at[1, 4, 7].set(np.inf)
    check_products(program(form), x, kernel, jnp.ones(17), g)


@pytest.mark.nans
def test_the_reference_of_many_channels():
    """Catches an oracle of the forms that is not what the reference computes."""
    x = stored(4, 9, (5, 9), (30, 0, 20), capacity=32)
    kernel = with_junk(samples.kernel(4, (3, 3), 9, 17, density=0.5, zeros=True))
    g = samples.integers(4, (3, 17, x.capacity))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILAJAX_BACKEND", "reference")
        check_products(program("reference"), x, kernel, jnp.ones(17), g)
        bad = x.values.at[0, ::2, 3].set(np.inf).at[2, 1, 1].set(np.nan)
        check_products(program("reference"), x.with_values(bad), kernel, jnp.ones(17), g)


@pytest.mark.parametrize("mapped", ["samples", "filters"])
def test_vmap(form, mapped):
    """Catches calls in one batch that share a gradient of the filter, or begin where another does."""
    x = stored(5, 9, (5, 9), (30, 12, 0, 45, 7, 20))
    kernels = [samples.kernel(5, (3, 3), 9, 17), samples.kernel(6, (3, 3), 9, 17, density=0.2)]
    bias, g = jnp.ones(17), samples.integers(5, (6, 17, 45))
    if mapped == "samples":
        calls = [(jax.tree.map(lambda a, i=i: a[i : i + 2], (x, g)), kernels[0]) for i in (0, 2, 4)]
        calls = [(x, kernel, g) for (x, g), kernel in calls]
    else:
        calls = [(x, kernel, g) for kernel in kernels]
    axes = (0, None, None, 0) if mapped == "samples" else (None, 0, None, None)
    stack = jax.tree.map(lambda *a: jnp.stack(a), *calls)
    x, kernel, g = (
        s if m == 0 else c
        for s, c, m in zip(stack, calls[0], (axes[0], axes[1], axes[3]), strict=True)
    )
    got = jax.vmap(program(form), axes)(x, kernel, bias, g)
    for i, (x, kernel, g) in enumerate(calls):
        want = program(form)(x, kernel, bias, g)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), got, want)
        check_products(program(form), x, kernel, bias, g)


@pytest.mark.parametrize("lines", [64, 90], ids=["words", "parts-of-words"])
def test_a_large_grid_that_is_nearly_empty(form, lines):
    """Catches sites of an earlier call, of another line, or of another task in the index of the sites."""
    few, grid = (7, 9, 30), (130, 130, lines)
    small = stored(8, 9, few, (200,))
    at = np.stack(np.unravel_index(np.asarray(small.keys[0, 0]), few))
    # In both halves of the grid, which two tasks fill; in its first and last lines; a line apart.
    places = [(0, 0, 0), (40, 60, 11), (40, 70, 34), (90, 2, 0), (123, 121, lines - 30)]
    keys = np.concatenate(
        [np.ravel_multi_index(at + np.array(place)[:, None], grid) for place in places]
    )
    order = np.argsort(keys)
    repeat = lambda a: jnp.tile(a, (1, 1, len(places)))[..., order]  # noqa: E731
    x = ilajax.SparseTensor(
        jnp.asarray(keys[order], jnp.int32)[None, None], repeat(small.values), grid
    )
    kernel, bias = samples.kernel(8, (3, 3, 3), 9, 17, density=0.5), jnp.ones(17)
    g = samples.integers(8, (1, 17, 200))
    want, bars = oracles.submanifold_products(
        small, kernel, oracles.Geometry(few, (3, 3, 3), 1, "SAME", 1), g
    )
    full = stored(9, 9, grid, (x.capacity,))
    for _ in range(3):  # their workspace is what the next call finds
        program(form)(full, kernel, bias, repeat(g))
    features, _, gradients = program(form)(x, kernel, bias, repeat(g))
    oracles.assert_close(features.values, repeat(np.where(want != 0, want + 1, 0)))
    oracles.assert_close(gradients[0], repeat(bars[0]))
    oracles.assert_close(gradients[1], len(places) * bars[1])


# --- How products are cut --------------------------------------------------------------------------


class ProductsPlan(NamedTuple):
    """The numbers of xla_kernels/products/plan.h's, the first ones of a plan."""

    samples: int
    chunk: int
    near: int
    parts: int
    taps: int
    mapped: int
    workers: int


@pytest.fixture
def cut(monkeypatch):
    """A function that runs products with other numbers; it returns results and both plans."""
    if samples.platform() != "cpu" or not routes.native_platforms():
        pytest.skip("only the CPU's kernels are planned so")
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    made = {}

    def record(platform, target, *problem, make=plans.plan):
        made[target] = make(platform, target, *problem)
        return made[target]

    monkeypatch.setattr(plans, "plan", record)

    def run(*operands, **numbers):
        with plans.tuned("cpu", products=0, **numbers):
            results = program.__wrapped__("native")(*operands)
        both = (made[f"ilajax_submanifold_{direction}"] for direction in ("fwd", "bwd"))
        return results, *(ProductsPlan(*plan.numbers[:7].tolist()) for plan in both)

    return run


def test_chunks_and_parts(cut):
    """Catches sites lost or done twice between two chunks, parts or blocks that are laid out at once."""
    x = stored(7, 16, (40, 70), (2799, 0, 1300, 512))
    kernel, bias = samples.kernel(7, (3, 3), 16, 24), samples.integers(7, (24,))
    g = samples.integers(7, (4, 24, 2799))
    for numbers, parts, taps in (
        ({"tasks": 1}, 1, 0),
        ({"tasks": 3}, 3, 0),
        ({}, 8, 0),
        ({"workspace": 100_000}, 1, 2),
        ({"workspace": 1, "tasks": 3}, 1, 3),
    ):
        results, forward, backward = cut(x, kernel, bias, g, **numbers)
        assert forward[1:5] == (512, 2799, 0, 0)
        assert backward[1:5] == (512, 2799, parts, taps)
        check_products(lambda *_, r=results: r, x, kernel, bias, g)
    x, kernel = stored(7, 2, (200,), (190, 65)), samples.kernel(7, (3,), 2, 520)
    bias, g = jnp.ones(520), samples.integers(7, (2, 520, 190))
    results, forward, backward = cut(x, kernel, bias, g)
    assert (forward.chunk, backward.chunk) == (64, 190)
    check_products(lambda *_: results, x, kernel, bias, g)


def test_taps_that_read_far_from_each_other(cut):
    """Catches stacks left over from the taps before, where a worker has no room for those of all."""
    x, kernel = stored(10, 264, (60, 40), (2000, 700)), samples.kernel(10, (3, 3), 264, 2)
    bias, g = jnp.ones(2), samples.integers(10, (2, 2, 2000))
    results, forward, _ = cut(x, kernel, bias, g)
    assert forward[1:3] == (512, 512)
    check_products(lambda *_: results, x, kernel, bias, g)


def test_waves_and_workers_do_not_show(cut):
    """Catches sums whose order depends on the workers, or on the samples that have room at once."""
    x = stored(8, 16, (40, 50), (1300, 700, 0, 1100, 512), exact=False)
    kernel, bias = samples.kernel(8, (3, 3), 16, 24, exact=False), jnp.linspace(-1, 1, 24)
    operands = (x, kernel, bias, jax.random.normal(jax.random.key(8), (5, 24, 1300)))
    want, *plans_ = cut(*operands)
    assert [plan.samples for plan in plans_] == [5, 5]
    for numbers, waves in (
        ({}, [5, 5]),
        ({"workers": 1}, [5, 5]),
        ({"workers": 2}, [5, 5]),
        ({"workspace": 1_500_000, "workers": 2}, [5, 5]),
        ({"site_maps": 0}, [5, 5]),
        ({"site_maps": 0, "workspace": 450_000}, [5, 1]),
    ):
        got, *plans_ = cut(*operands, **numbers)
        assert [plan.samples for plan in plans_] == waves
        jax.tree.map(np.testing.assert_array_equal, got, want)
