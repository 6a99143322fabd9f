"""conv and conv_transpose onto a given support, against loops and dense convolution."""

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
    "1d-no-stride": ((9,), (3,), 1, "SAME", 1),
    "1d-dilated": ((71,), (3,), 3, "SAME", 2),
    "2d": ((5, 6), (3, 3), 2, "SAME", 1),
    "2d-cells": ((5, 6), (2, 2), 2, "VALID", 1),
    "2d-1x1": ((5, 6), (1, 1), 2, "SAME", 1),
    "2d-gaps": ((9, 10), (2, 1), (3, 4), "VALID", 1),
    "2d-pairs": ((5, 6), (3, 4), (2, 1), ((2, 0), (-1, 3)), 1),
    "2d-wide-pads": ((4, 3), (3, 3), 2, ((5, 4), (3, 6)), 1),
    "2d-5x5": ((6, 70), (5, 5), (1, 2), "SAME", 1),
    "3d": ((4, 5, 5), (3, 3, 3), 2, "SAME", 1),
    "3d-idle-axes": ((1, 40, 1), (1, 3, 1), (1, 2, 1), "SAME", 1),
    "4d": ((2, 3, 2, 3), (2, 1, 3, 2), (1, 2, 2, 1), "SAME", 1),
}


@functools.cache
def program(backend, transposed=False, **options):
    """jit of the convolution onto a support, and of its gradients."""

    @jax.jit
    def run(x, kernel, bias, support, g):
        def values(values, weights, bias):
            operation = ilajax.conv_transpose if transposed else ilajax.conv
            features, responses = operation(
                x.with_values(values),
                dataclasses.replace(kernel, values=weights),
                bias,
                support=support,
                **options,
            )
            return features.values, (features, responses)

        _, pull, (features, responses) = jax.vjp(
            values, x.values, kernel.values, bias, has_aux=True
        )
        return features, responses, pull(g)

    return run


def check(backend, x, kernel, bias, support, geometry, *, seed=0, **options):
    """Compares with NumPy loops, exactly."""
    transposed = isinstance(geometry, oracles.Transposed)
    run = program(backend, transposed, **options)
    g = samples.integers(seed, (x.batch_size, kernel.out_channels, support.capacity), str(x.dtype))
    features, responses, gradients = run(x, kernel, bias, support, g)
    want, counts = oracles.conv_at(x, kernel, bias, geometry, support.keys)
    np.testing.assert_array_equal(features.keys, support.keys)
    oracles.assert_invariants(features, capacity=support.capacity)
    oracles.assert_close(features.values, want)
    assert features.dtype == x.dtype
    assert features.shared == support.shared
    np.testing.assert_array_equal(responses, counts)
    keys = np.broadcast_to(support.keys, g.shape)
    bars = oracles.conv_backward(x, kernel, geometry, keys, g)
    for got, want, primal in zip(gradients, bars, (x.values, kernel.values, bias), strict=True):
        assert got.dtype == primal.dtype
        oracles.assert_close(got, np.asarray(want, np.float32).astype(got.dtype))


def operands(seed, reads, writes, window, dtype="float32", *, shared=True, own_support=False):
    """A tensor on one grid, a kernel, a bias, and a support on the other grid."""
    rng = np.random.default_rng(seed)
    batch, cin, cout = (int(n) for n in rng.integers(1, 4, 3))
    slots = {"capacity": math.prod(reads) // 2 + 1, "density": 0.5}
    x = samples.tensor(seed, batch, cin, reads, dtype=dtype, shared=shared, zeros=True, **slots)
    kernel = samples.kernel(
        seed, window, cin, cout, density=0.6, dtype=dtype, zeros=True, empty=seed % 2 == 0
    )
    slots = {"capacity": math.prod(writes) // 2 + 1, "density": 0.5}
    support = samples.tensor(seed + 1, batch, cout, writes, shared=not own_support, **slots)
    return x, kernel, samples.integers(seed, (cout,), dtype), support


@pytest.mark.crossed(4)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_loops(backend, name, transposed):
    """Catches a wrong value or gradient in any dimension, window, stride and dtype; data is exact."""
    grid, window, strides, padding, dilation = GEOMETRIES[name]
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    options = {"strides": strides, "kernel_dilation": dilation}
    if transposed:
        geometry = oracles.Transposed(geometry)
        if not isinstance(padding, str):
            # Around the spread input, as in jax.lax.conv_transpose.
            extent = [(w - 1) * dilation + 1 for w in window]
            padding = tuple(
                (e - 1 - low, e - 1 - high) for e, (low, high) in zip(extent, padding, strict=True)
            )
    seed = sum(map(ord, name))
    dtype = list(samples.DTYPES)[seed % 3]
    x, kernel, bias, support = operands(seed, geometry.grid, geometry.shape, window, dtype)
    check(backend, x, kernel, bias, support, geometry, padding=padding, **options)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared"])
def test_supports_of_each_channel(backend, shared, transposed):
    """Catches channels that respond at each other's sites, and inputs that are taken for each other's."""
    geometry = oracles.Geometry((5, 6), (3, 3), 2)
    if transposed:
        geometry = oracles.Transposed(geometry)
    for dtype in ("float32", "bfloat16"):
        case = operands(
            3, geometry.grid, geometry.shape, (3, 3), dtype, shared=shared, own_support=True
        )
        check(backend, *case, geometry, strides=2)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_channels(backend, transposed):
    """Catches a block of channels that is skipped, or reaches into the next."""
    geometry = oracles.Geometry((4, 6), (3, 2), 2)
    if transposed:
        geometry = oracles.Transposed(geometry)
    for cin, cout in ((1, 17), (9, 16), (24, 3)):
        x = samples.tensor(cin, 2, cin, geometry.grid, shared=True)
        support = samples.tensor(cout, 2, 1, geometry.shape, shared=True)
        kernel = samples.kernel(cin, (3, 2), cin, cout, density=0.5)
        check(backend, x, kernel, samples.integers(cin, (cout,)), support, geometry, strides=2)


@pytest.mark.nans
@pytest.mark.parametrize("tuning", [{"workspace": 1}, {"tasks": 3, "workers": 2}], ids=str)
def test_without_room_and_in_parts(backend, tuning):
    """Catches sums that depend on how the work is cut, and values that a tap gathers from another site."""
    if backend == "reference":
        pytest.skip("has no plan")
    down = oracles.Geometry((30, 41), (3, 3), 2)
    for seed, geometry in enumerate((down, oracles.Transposed(down))):
        x = samples.tensor(seed, 3, 9, geometry.grid, capacity=300, shared=True)
        support = samples.tensor(seed + 5, 3, 1, geometry.shape, capacity=400, shared=True)
        kernel = samples.kernel(seed, (3, 3), 9, 17, density=0.4)
        bias = samples.integers(seed, (17,))
        values = x.values.at[1, 2, 5].set(jnp.inf).at[2, 0, 7].set(jnp.nan)
        values = jnp.where(x.keys < x.sites, values, 0)
        with plans.tuned("cpu", **tuning), plans.tuned("cuda", **tuning):
            for given in (x, x.with_values(values)):
                program.cache_clear()
                with np.errstate(invalid="ignore"):
                    check(backend, given, kernel, bias, support, geometry, strides=2)
    program.cache_clear()


def test_a_tap_that_reads_far_apart(backend):
    """Catches stacks of a tap's sites that do not fit a worker's, so that it has to gather them."""
    geometry = oracles.Geometry((3000,), (3,), 4)
    x = samples.tensor(1, 1, 264, (3000,), capacity=1500, density=0.5, shared=True)
    support = samples.tensor(2, 1, 1, geometry.shape, capacity=750, density=0.95, shared=True)
    kernel = samples.kernel(1, (3,), 264, 1)
    check(backend, x, kernel, jnp.ones(1), support, geometry, strides=4)


def test_dense_convolution_at_the_sites(backend):
    """Catches a site that is missed, taken twice, or taken from another sample; values are real numbers."""
    geometry = oracles.Geometry((6, 7, 5), (3, 3, 3), 2)
    x = samples.tensor(6, 3, 3, geometry.grid, capacity=80, shared=True, exact=False)
    kernel = samples.kernel(6, (3, 3, 3), 3, 4, exact=False)
    support = samples.tensor(7, 3, 1, geometry.shape, capacity=20, shared=True)
    run = program(backend, strides=2)
    g = jnp.where(support.keys < support.sites, 1.0, 0.0) * jnp.arange(1.0, 5)[:, None]
    features, _, (x_bar, w_bar, _) = run(x, kernel, jnp.zeros(4), support, g)

    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: oracles.dense_conv(x, w, geometry), x, w)
        return y, *pull(g)

    def stored(t):
        """1 where an entry is stored, on the grid."""
        return oracles.dense(t.with_values(jnp.where(t.keys < t.sites, jnp.ones_like(t.values), 0)))

    scattered = oracles.dense(features.with_values(g))
    y, x_want, w_want = oracles.on_cpu(
        both, oracles.dense(x), oracles.dense_kernel(kernel), scattered
    )
    want = y * stored(features)
    np.testing.assert_allclose(oracles.dense(features), want, rtol=1e-4, atol=1e-4)
    got, want = oracles.dense(x.with_values(x_bar)), x_want * stored(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    flat = w_want.reshape(27, 3, 4)
    for slot, tap, ic, oc, _ in oracles.weights(kernel):
        np.testing.assert_allclose(w_bar[slot], flat[tap, ic, oc], rtol=1e-3, atol=1e-3)


def test_the_input_itself_is_a_submanifold_convolution(backend):
    """Catches a given support that means something else than "input" where both can be said."""
    x, kernel = samples.tensor(7, shared=True), samples.kernel(7)
    run = jax.jit(lambda x, support: ilajax.conv(x, kernel, jnp.ones(3), support=support))
    want = ilajax.conv(x, kernel, jnp.ones(3), support="input")
    for got, expected in zip(jax.tree.leaves(run(x, x)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_support_is_kept_as_it_is():
    """Catches a copy of the keys, by which the next layers would not see that supports are one."""
    x, support = samples.tensor(8, shared=True), samples.tensor(9, channels=1, shared=True)
    features, _ = ilajax.conv(x, samples.kernel(8), support=support)
    assert features.keys is support.keys


def test_invariants(backend):
    """Catches output that breaks the contract on some data."""

    @settings(max_examples=15)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.booleans())
    def holds(seed, density, other, transposed):
        geometry = oracles.Geometry((5, 6), (3, 3), 2)
        geometry = oracles.Transposed(geometry) if transposed else geometry
        x = samples.tensor(seed, spatial_shape=geometry.grid, density=density, shared=True)
        support = samples.tensor(
            seed, channels=1, spatial_shape=geometry.shape, density=other, shared=True
        )
        kernel = samples.kernel(seed, padding=0)
        check(backend, x, kernel, samples.integers(seed, (3,)), support, geometry, strides=2)

    holds()
