"""conv and conv_transpose with select_by="site", against loops and dense convolution."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import samples
from ilajax.ffi import plans

# What a convolution reads, its window, strides, padding and dilation.
GEOMETRIES = {
    "1d": ((9,), (3,), 2, "SAME", 1),
    "1d-no-stride": ((150,), (3,), 1, "SAME", 1),
    "1d-dilated": ((141,), (5,), 1, "SAME", 20),
    "1d-dilated-stride": ((141,), (3,), 3, "SAME", 40),
    "2d": ((5, 6), (3, 3), 2, "SAME", 1),
    "2d-no-stride": ((5, 6), (3, 3), 1, "SAME", 1),
    "2d-cells": ((5, 6), (2, 2), 2, "VALID", 1),
    "2d-gaps": ((9, 10), (2, 1), (3, 4), "VALID", 1),
    "2d-pairs": ((5, 6), (3, 4), (2, 1), ((2, 0), (-1, 3)), 1),
    "2d-wide-pads": ((4, 3), (3, 3), 1, ((5, 4), (3, 6)), 1),
    "2d-long-lines": ((4, 70), (3, 3), (2, 1), "SAME", 1),
    "3d": ((4, 5, 5), (3, 3, 3), 2, "SAME", 1),
    "3d-idle-axes": ((1, 40, 1), (1, 3, 1), (1, 2, 1), "SAME", 1),
    "4d": ((2, 3, 2, 3), (2, 1, 3, 2), (1, 2, 2, 1), "SAME", 1),
}


@functools.cache
def program(backend, capacity, transposed=False, **options):
    """jit of the convolution and of its gradients."""

    @jax.jit
    def run(x, kernel, bias, g):
        def values(values, weights, bias):
            operation = ilajax.conv_transpose if transposed else ilajax.conv
            features, responses = operation(
                x.with_values(values),
                dataclasses.replace(kernel, values=weights),
                bias,
                capacity=capacity,
                select_by="site",
                **options,
            )
            return features.values, (features, responses)

        _, pull, (features, responses) = jax.vjp(
            values, x.values, kernel.values, bias, has_aux=True
        )
        return features, responses, pull(g)

    return run


def check(backend, x, kernel, bias, geometry, capacity, select="positive", *, seed=0, **options):
    """Compares with NumPy loops, exactly."""
    transposed = isinstance(geometry, oracles.Transposed)
    run = program(backend, capacity, transposed, select=select, **options)
    g = samples.integers(seed, (x.batch_size, kernel.out_channels, capacity), str(x.dtype))
    features, responses, gradients = run(x, kernel, bias, g)
    keys, values, counts = oracles.conv_by_site(x, kernel, bias, geometry, capacity, select)
    oracles.assert_tensor(features, keys, values)
    assert features.shared
    assert features.dtype == x.dtype
    assert features.spatial_shape == geometry.shape
    np.testing.assert_array_equal(responses, counts)
    if select == "positive":
        g = jnp.where(values == 0, 0, g)
    bars = oracles.conv_backward(x, kernel, geometry, np.broadcast_to(keys, g.shape), g)
    for got, want, primal in zip(gradients, bars, (x.values, kernel.values, bias), strict=True):
        assert got.dtype == primal.dtype
        oracles.assert_close(got, np.asarray(want, np.float32).astype(got.dtype))
    return features


def operands(seed, reads, window, dtype="float32", *, shared=True, cout=None, density=0.3):
    rng = np.random.default_rng(seed)
    batch, cin, some = (int(n) for n in rng.integers(1, 4, 3))
    slots = {"capacity": math.prod(reads) // 2 + 1, "density": density}
    x = samples.tensor(seed, batch, cin, reads, dtype=dtype, shared=shared, zeros=True, **slots)
    cout = cout or some
    kernel = samples.kernel(
        seed, window, cin, cout, density=0.6, dtype=dtype, zeros=True, empty=seed % 2 == 0
    )
    return x, kernel, samples.integers(seed, (cout,), dtype)


@pytest.mark.crossed(4)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_loops(backend, name, transposed):
    """Catches a wrong site, value or gradient in any dimension, window, stride and dtype; data is exact."""
    grid, window, strides, padding, dilation = GEOMETRIES[name]
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    options = {"strides": strides, "kernel_dilation": dilation}
    if transposed:
        geometry = oracles.Transposed(geometry)
        options["output_shape"] = geometry.shape
        if not isinstance(padding, str):
            # Around the spread input, as in jax.lax.conv_transpose.
            extent = [(w - 1) * dilation + 1 for w in window]
            padding = tuple(
                (e - 1 - low, e - 1 - high) for e, (low, high) in zip(extent, padding, strict=True)
            )
    seed = sum(map(ord, name))
    dtype = list(samples.DTYPES)[seed % 3]
    case = operands(seed, geometry.grid, window, dtype)
    select = ("positive", "magnitude")[seed % 2]
    # Few of the candidates, and room for more than there are sites.
    for capacity in (max(1, geometry.sites // 5), geometry.sites + 3):
        check(backend, *case, geometry, capacity, select, padding=padding, **options)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("select", ["positive", "magnitude"])
def test_own_keys(backend, select):
    """Catches an input whose channels are taken to have one support."""
    geometry = oracles.Geometry((5, 6), (3, 3), 2)
    case = operands(3, geometry.grid, (3, 3), shared=False)
    check(backend, *case, geometry, 4, select, strides=2)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("capacity", [7, 40])
def test_channels(backend, capacity):
    """Catches a block of channels that is left out of a score, or reaches into the next."""
    geometry = oracles.Geometry((4, 6), (3, 2), 1)
    for cin, cout in ((1, 17), (9, 16), (24, 3)):
        x = samples.tensor(cin, 2, cin, geometry.grid, shared=True, density=0.2)
        kernel = samples.kernel(cin, (3, 2), cin, cout, density=0.5)
        check(backend, x, kernel, samples.integers(cin, (cout,)), geometry, capacity)


def line(values, bias=0.0):
    """An input of one channel, and filters of one tap that give its value and twice that."""
    x = samples.from_entries((len(values),), [[dict(enumerate(values))]], len(values))
    kernel = ilajax.SparseKernel.from_dense(jnp.array([[[1.0, 2.0]]]))
    return x, kernel, jnp.full(2, bias)


def test_ties_keep_the_lower_key(backend):
    """Catches an order among equals that depends on how the work is cut."""
    x, kernel, bias = line([1.0, -2.0, 2.0, -2.0, 2.0, 1.0])
    geometry = oracles.Geometry((6,), (1,))
    kept = check(backend, x, kernel, bias, geometry, 3, "magnitude")
    np.testing.assert_array_equal(kept.keys[0, 0], [1, 2, 3])


def test_what_does_not_pass_is_no_candidate(backend):
    """Catches sites that are kept, or count, although no channel is above 0."""
    x, kernel, bias = line([3.0, -2.0, 1.0, -5.0, -1.0, 2.0], bias=-2.0)
    kept = check(backend, x, kernel, bias, oracles.Geometry((6,), (1,)), 6)
    np.testing.assert_array_equal(kept.keys[0, 0], [0, 5, 6, 6, 6, 6])
    assert kept.values[0, 0, 1] == 0, "2 - 2 does not pass, 4 - 2 does"


def test_the_smallest_numbers_are_candidates(backend):
    """Catches a square that underflows to "nothing passes"."""
    x, kernel, bias = line([2.0**-100, 0.0, -(2.0**-100), 0.0, 2.0**-100])
    kept = check(backend, x, kernel, bias, oracles.Geometry((5,), (1,)), 4, "magnitude")
    np.testing.assert_array_equal(kept.keys[0, 0], [0, 2, 4, 5])


@pytest.mark.nans
@pytest.mark.parametrize("select", ["positive", "magnitude"])
def test_nan_and_inf(backend, select):
    """Catches a diverging network that hides its NaN, and squares that overflow."""
    x, kernel, bias = line([1.0, 3.0, jnp.nan, 1e30, jnp.inf, -jnp.inf, 2.0])
    geometry = oracles.Geometry((7,), (1,))
    for capacity in (1, 3, 7):
        with np.errstate(invalid="ignore"):
            kept = check(backend, x, kernel, bias, geometry, capacity, select)
        assert 2 in np.asarray(kept.keys[0, 0]).tolist()


@pytest.mark.parametrize("contents", ["empty", "full", "no weights"])
def test_contents(backend, contents):
    """Catches mistakes at the extremes."""
    geometry = oracles.Geometry((5, 6), (3, 3), 2)
    x, kernel, bias = operands(5, geometry.grid, (3, 3), density={"full": 1.0}.get(contents, 0.0))
    if contents == "no weights":
        x = samples.tensor(5, x.batch_size, x.channels, geometry.grid, shared=True)
        kernel = samples.kernel(5, (3, 3), x.channels, kernel.out_channels, density=0.0)
    for capacity in (2, 9, 30):
        check(backend, x, kernel, bias, geometry, capacity, strides=2)


@pytest.mark.parametrize(
    "tuning", [{"workspace": 1}, {"tasks": 3, "workers": 2}, {"workspace": 1 << 16}], ids=str
)
def test_without_room_and_in_parts(backend, tuning):
    """Catches sums and selections that depend on how the work is cut."""
    if backend == "reference":
        pytest.skip("has no plan")
    down = oracles.Geometry((30, 41), (3, 3), 2)
    for seed, geometry in enumerate((down, oracles.Transposed(down))):
        x = samples.tensor(seed, 3, 9, geometry.grid, capacity=200, shared=True, density=0.1)
        kernel = samples.kernel(seed, (3, 3), 9, 17, density=0.4)
        bias = samples.integers(seed, (17,))
        shape = {"output_shape": geometry.shape} if seed else {}
        with plans.tuned("cpu", **tuning), plans.tuned("cuda", **tuning):
            for capacity in (100, 1300):
                program.cache_clear()
                check(backend, x, kernel, bias, geometry, capacity, strides=2, **shape)
    program.cache_clear()


def test_dense_convolution_of_the_kept_sites(backend):
    """Catches a site that is missed or taken from another sample; values are real numbers."""
    geometry = oracles.Geometry((6, 7, 5), (3, 3, 3), 2)
    x = samples.tensor(6, 3, 3, geometry.grid, capacity=80, shared=True, exact=False)
    kernel = samples.kernel(6, (3, 3, 3), 3, 4, exact=False)
    run = program(backend, 20, select="magnitude", strides=2)
    features, _, _ = run(x, kernel, jnp.zeros(4), jnp.zeros((3, 4, 20)))
    want = oracles.on_cpu(
        lambda x, w: oracles.dense_conv(x, w, geometry),
        oracles.dense(x),
        oracles.dense_kernel(kernel),
    )
    want = np.moveaxis(np.asarray(want), -1, 1).reshape(3, 4, -1)
    scores = np.square(want).sum(axis=1)
    for b, keys in enumerate(np.asarray(features.keys[:, 0])):
        np.testing.assert_allclose(features.values[b], want[b][:, keys], rtol=1e-4, atol=1e-4)
        left = np.delete(scores[b], keys)
        assert scores[b][keys].min() >= left.max() * (1 - 1e-4)


def test_a_strided_layer_feeds_a_submanifold_layer():
    """Catches an output that shared supports cannot go on with."""
    x, kernel = samples.tensor(7, shared=True), samples.kernel(7)
    down, _ = ilajax.conv(x, kernel, capacity=5, strides=2, select_by="site")
    features, _ = ilajax.conv(down, samples.kernel(8, in_channels=3), support="input")
    assert features.keys is down.keys
    up, _ = ilajax.conv_transpose(features, samples.kernel(9, in_channels=3), strides=2, support=x)
    assert up.keys is x.keys


def test_vmap(backend):
    """Catches a mapped axis that is not folded into the batch, as to the selection."""
    x, kernel, bias = operands(3, (5, 6), (3, 3))
    several = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), x)

    def run(x):
        return ilajax.conv(x, kernel, bias, capacity=7, select_by="site")

    got = jax.jit(jax.vmap(run))(several)
    for i, each in enumerate((x, jax.tree.map(lambda a: a[::-1], x))):
        for mapped, alone in zip(jax.tree.leaves(got), jax.tree.leaves(run(each)), strict=True):
            np.testing.assert_array_equal(mapped[i], alone)


def test_invariants(backend):
    """Catches output that breaks the contract on some data."""

    @settings(max_examples=15)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 31), st.booleans())
    def holds(seed, density, capacity, transposed):
        geometry = oracles.Geometry((5, 6), (3, 3), 2)
        geometry = oracles.Transposed(geometry) if transposed else geometry
        options = {"strides": 2, "output_shape": (5, 6)} if transposed else {"strides": 2}
        capacity = capacity if transposed else capacity % 3 + 1
        x = samples.tensor(seed, spatial_shape=geometry.grid, density=density, shared=True)
        kernel = samples.kernel(seed, padding=0)
        bias = samples.integers(seed, (3,))
        features = check(backend, x, kernel, bias, geometry, capacity, seed=seed, **options)
        oracles.assert_invariants(features, capacity=capacity)

    holds()
