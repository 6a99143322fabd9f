"""conv with support="input": responses at the input's own sites, against loops and dense convolution."""

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


@functools.cache
def program(backend, dilation=1):
    """jit of the convolution and its gradients."""

    @jax.jit
    def run(x, kernel, bias, g):
        def values(values, weights, bias):
            features, responses = ilajax.conv(
                x.with_values(values),
                dataclasses.replace(kernel, values=weights),
                bias,
                kernel_dilation=dilation,
                support="input",
            )
            return features.values, (features, responses)

        _, pull, (features, responses) = jax.vjp(
            values, x.values, kernel.values, bias, has_aux=True
        )
        return features, responses, pull(g)

    return run


def check(backend, x, kernel, bias, dilation=1, seed=0):
    """Compares with NumPy loops, exactly."""
    geometry = oracles.Geometry(x.spatial_shape, kernel.window_shape, 1, "SAME", dilation)
    want = oracles.submanifold(x, kernel, bias, geometry)
    g = samples.integers(seed, want.shape, str(x.dtype))
    features, responses, gradients = program(backend, dilation)(x, kernel, bias, g)
    np.testing.assert_array_equal(features.keys, x.keys)
    oracles.assert_invariants(features, capacity=x.capacity)
    oracles.assert_close(features.values, want)
    assert features.dtype == x.dtype
    assert features.shared
    stored = np.asarray(x.keys) < x.sites
    buffers = oracles.responses(x, kernel, geometry)
    at_sites = np.take_along_axis(buffers, np.where(stored, x.keys, 0), axis=2)
    np.testing.assert_array_equal(responses, ((at_sites != 0) & stored).sum(axis=2))
    keys = np.broadcast_to(x.keys, g.shape)
    bars = oracles.conv_backward(x, kernel, geometry, keys, g)
    for got, want, primal in zip(gradients, bars, (x.values, kernel.values, bias), strict=True):
        assert got.dtype == primal.dtype
        oracles.assert_close(got, np.asarray(want, np.float32).astype(got.dtype))


GEOMETRIES = {
    "1d": ((9,), (3,), 1),
    "1d-dilated": ((11,), (3,), 3),
    "2d": ((5, 6), (3, 3), 1),
    "2d-1x1": ((5, 6), (1, 1), 1),
    "2d-even": ((5, 6), (2, 4), 1),
    "2d-row": ((5, 6), (1, 3), (1, 2)),
    "2d-5x5": ((6, 6), (5, 5), 1),
    "2d-window-above-grid": ((3, 3), (5, 7), 1),
    "3d": ((4, 3, 5), (3, 3, 3), 1),
    "4d": ((2, 3, 2, 3), (2, 1, 3, 2), 1),
}


@pytest.mark.crossed(4)
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_loops(backend, name, dtype):
    """Catches a wrong value or gradient in any dimension, window, dilation and dtype; data is exact."""
    grid, window, dilation = GEOMETRIES[name]
    seed = sum(map(ord, name + dtype))
    rng = np.random.default_rng(seed)
    batch, cin, cout = (int(n) for n in rng.integers(1, 4, 3))
    x = samples.tensor(
        seed, batch, cin, grid, capacity=math.prod(grid) // 2, dtype=dtype, shared=True, zeros=True
    )
    kernel = samples.kernel(
        seed, window, cin, cout, density=0.6, dtype=dtype, zeros=True, empty=seed % 2 == 0
    )
    check(backend, x, kernel, samples.integers(seed, (cout,), dtype), dilation, seed)


CONTENTS = {
    "empty": lambda: samples.tensor(0, density=0.0, shared=True),
    "one-entry": lambda: samples.with_padding(samples.tensor(1, capacity=1, shared=True), 11),
    "full": lambda: samples.tensor(2, capacity=30, density=1.0, shared=True),
    "zeros": lambda: samples.tensor(3, shared=True).map(jnp.zeros_like),
    "isolated": lambda: samples.tensor(4, density=0.05, shared=True),
}


@pytest.mark.parametrize("contents", CONTENTS)
def test_contents(backend, contents):
    """Catches mistakes at the extremes: nothing there, everything there, stored zeros."""
    check(backend, CONTENTS[contents](), samples.kernel(1), jnp.array([1.0, 0.0, -2.0]))


def test_an_empty_kernel(backend):
    """Catches a bias that reaches sites without a response, and sites that get lost."""
    x = samples.tensor(5, shared=True)
    features, responses, _ = program(backend)(
        x, samples.kernel(5, density=0.0), jnp.full(3, 9.0), jnp.zeros((2, 3, 12))
    )
    np.testing.assert_array_equal(features.keys, x.keys)
    assert not np.any(features.values)
    assert not np.any(responses)


def test_dense_convolution_at_the_sites(backend):
    """Catches a neighbour that is missed, taken twice, or taken from another sample."""
    grid = (6, 7, 5)
    x = samples.tensor(6, 3, 3, grid, capacity=80, density=0.3, shared=True, exact=False)
    kernel = samples.kernel(6, (3, 3, 3), 3, 4, exact=False)
    bias = jnp.array([0.5, -0.25, 0.0, 1.0])
    geometry = oracles.Geometry(grid, (3, 3, 3))
    g = jax.random.normal(jax.random.key(6), (3, 4, 80))
    features, _, (x_bar, w_bar, b_bar) = program(backend)(x, kernel, bias, g)
    keys = np.asarray(x.keys)
    stored = keys < x.sites
    g = np.where(stored, g, 0)

    def at_sites(dense):
        planes = np.moveaxis(dense, -1, 1).reshape(3, dense.shape[-1], -1)
        return np.where(stored, np.take_along_axis(planes, np.where(stored, keys, 0), axis=2), 0)

    scattered = oracles.dense(x.with_values(jnp.asarray(g)))

    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: oracles.dense_conv(x, w, geometry), x, w)
        return y, *pull(g)

    y, dense_x_bar, dense_w_bar = oracles.on_cpu(
        both, oracles.dense(x), oracles.dense_kernel(kernel), scattered
    )
    want = np.where(stored, at_sites(y) + np.asarray(bias)[:, None], 0)
    np.testing.assert_allclose(features.values, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x_bar, at_sites(dense_x_bar), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(b_bar, g.sum((0, 2)), rtol=1e-4, atol=1e-4)
    flat = dense_w_bar.reshape(27, 3, 4)
    for slot, tap, ic, oc, _ in oracles.weights(kernel):
        np.testing.assert_allclose(w_bar[slot], flat[tap, ic, oc], rtol=1e-3, atol=1e-3)


def test_padding_changes_nothing(backend):
    """Catches a result that depends on how many empty slots there are, or on what they hold."""
    x, kernel, bias = samples.tensor(7, shared=True), samples.kernel(7, padding=0), jnp.ones(3)
    g = samples.integers(7, (2, 3, 12))
    want, want_responses, (x_bar, w_bar, b_bar) = program(backend)(x, kernel, bias, g)
    wide = ilajax.SparseKernel(
        jnp.pad(kernel.keys, (0, 4), constant_values=kernel.size),
        jnp.pad(kernel.values, (0, 4), constant_values=7.0),
        kernel.shape,
    )
    got, got_responses, got_bars = program(backend)(
        samples.with_padding(x, 6),
        wide,
        bias,
        jnp.pad(g, [(0, 0), (0, 0), (0, 6)], constant_values=9),
    )
    np.testing.assert_array_equal(got.values[..., :12], want.values)
    np.testing.assert_array_equal(got.values[..., 12:], 0)
    np.testing.assert_array_equal(got_responses, want_responses)
    np.testing.assert_array_equal(got_bars[0][..., :12], x_bar)
    np.testing.assert_array_equal(got_bars[0][..., 12:], 0)
    np.testing.assert_array_equal(got_bars[1][: w_bar.size], w_bar)
    np.testing.assert_array_equal(got_bars[1][w_bar.size :], 0)
    np.testing.assert_array_equal(got_bars[2], b_bar)


@pytest.mark.nans
def test_nan_and_inf(backend):
    """Catches a NaN born of an absent or zero factor against inf, and one that gets lost."""
    x = samples.tensor(8, shared=True, density=0.3)
    kernel = samples.kernel(8, zeros=True)
    values = x.values.at[0, 0, 0].set(jnp.inf).at[1, 1, 2].set(jnp.nan).at[0, 1, 3].set(0)
    values = jnp.where(x.keys < x.sites, values, 0)
    with np.errstate(invalid="ignore"):
        check(backend, x.with_values(values), kernel, jnp.ones(3))
        weights = kernel.values.at[3].set(jnp.inf).at[20].set(jnp.nan)
        check(backend, x, dataclasses.replace(kernel, values=weights), jnp.ones(3))


def test_invariants(backend):
    """Catches output that breaks the contract on some data, and a support that changes."""

    @settings(max_examples=20)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.booleans())
    def holds(seed, density, kernel_density, zeros):
        x = samples.tensor(seed, density=density, shared=True, zeros=zeros)
        kernel = samples.kernel(seed, density=kernel_density, padding=0, zeros=zeros)
        check(backend, x, kernel, samples.integers(seed, (3,)), seed=seed)

    holds()


LARGE = {
    "long-segments": ((37, 70), (3, 3), 2, 5, 700),
    "3d": ((30, 40, 33), (3, 3, 3), 2, 4, 900),
    "wide": ((8, 9), (1, 1), 19, 70, 30),
    "wide-window": ((12, 13), (3, 3), 3, 66, 60),
}


@pytest.mark.crossed(4)
@pytest.mark.parametrize("name", LARGE)
def test_larger_problems(backend, name):
    """Catches what only size shows: chunks of sites, blocks of channels, searches in long segments."""
    grid, window, cin, cout, slots = LARGE[name]
    density = min(0.6, slots / math.prod(grid))
    x = samples.tensor(9, 2, cin, grid, capacity=slots, density=density, shared=True)
    kernel = samples.kernel(9, window, cin, cout, density=0.3 if cout > 9 else 0.7)
    check(backend, x, kernel, samples.integers(9, (cout,)))
