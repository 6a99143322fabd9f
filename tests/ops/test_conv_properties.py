"""Properties of conv that need no oracle, on chosen and on any data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import samples
from ops.test_conv import SELECTS, cotangent, entries, program


@pytest.mark.parametrize("select", SELECTS)
def test_padding_changes_nothing(backend, select):
    """Catches a result that depends on how many empty slots input and kernel carry, or on what they hold."""
    x, kernel, bias = samples.tensor(5), samples.kernel(5, padding=0), jnp.array([1.0, 0.0, -1.0])
    g = cotangent(5, 2, 3, 8)
    run = program(backend, 8, select)
    want, want_responses, (x_bar, w_bar, b_bar) = run(x, kernel, bias, g)
    slots = kernel.values.size
    junk = np.full(7, 1e30, np.float32)
    wide = ilajax.SparseKernel(
        jnp.pad(kernel.keys, (0, 7), constant_values=kernel.size),
        jnp.concatenate([kernel.values, junk]),
        kernel.shape,
    )
    got, got_responses, got_bars = run(samples.with_padding(x, 5), wide, bias, g)
    np.testing.assert_array_equal(got.keys, want.keys)
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got_responses, want_responses)
    np.testing.assert_array_equal(got_bars[0][..., : x.capacity], x_bar)
    np.testing.assert_array_equal(got_bars[0][..., x.capacity :], 0)
    np.testing.assert_array_equal(got_bars[1][:slots], w_bar)
    np.testing.assert_array_equal(got_bars[1][slots:], 0)
    np.testing.assert_array_equal(got_bars[2], b_bar)


@pytest.mark.nans
def test_nan_in_padding_is_ignored(backend):
    """Catches a padding weight, or a cotangent at padding, whose NaN gets into a result."""
    x, kernel, bias = samples.tensor(6), samples.kernel(6, padding=3), jnp.ones(3)
    dirty = dataclasses.replace(
        kernel, values=jnp.where(kernel.keys == kernel.size, jnp.nan, kernel.values)
    )
    run = program(backend, 40, "value")
    g = cotangent(6, 2, 3, 40)
    features, responses, gradients = run(x, kernel, bias, g)
    dirty_g = jnp.where(features.keys == features.sites, jnp.nan, g)
    got = run(x, dirty, bias, dirty_g)
    jax.tree.map(np.testing.assert_array_equal, got, (features, responses, gradients))


@pytest.mark.crossed(3)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("capacity", [5, 40])
def test_the_bias_gradient_is_a_sum_over_kept_outputs(backend, shared, capacity):
    """Catches a bias gradient that counts padding, or only some of the kept outputs."""
    x, kernel = samples.tensor(7, shared=shared), samples.kernel(7, empty=True)
    features, _, (_, _, b_bar) = program(backend, capacity, "positive")(
        x, kernel, jnp.ones(3), jnp.ones((2, 3, capacity))
    )
    np.testing.assert_array_equal(b_bar, np.asarray(features.counts).sum(axis=0))


@functools.cache
def composed(backend, capacity, select):
    """conv cut to the capacity, and conv with room for all, then k_select."""

    @jax.jit
    def run(x, kernel, bias):
        cut = ilajax.conv(x, kernel, bias, capacity=capacity, select=select)
        whole = ilajax.conv(x, kernel, bias, capacity=x.sites, select=select)
        return cut, whole, ilajax.k_select(whole.features, capacity, select=select)

    return run


@pytest.mark.crossed(4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("select", SELECTS)
def test_selection_is_k_select(backend, select, dtype):
    """Catches a rank by anything but the stored value: in bfloat16 rounding makes many ties."""
    run = composed(backend, 6, select)

    @settings(max_examples=15)
    @given(st.integers(0, 10**6), st.booleans())
    def holds(seed, exact):
        x = samples.tensor(seed, density=0.3, dtype=dtype, exact=exact)
        kernel = samples.kernel(seed, dtype=dtype, exact=exact)
        bias = samples.integers(seed, (3,), dtype)
        cut, whole, selected = run(x, kernel, bias)
        jax.tree.map(np.testing.assert_array_equal, cut.features, selected)
        np.testing.assert_array_equal(cut.responses, whole.responses)

    holds()


@pytest.mark.parametrize("select", SELECTS)
def test_invariants(backend, select):
    """Catches output that breaks the contract of a SparseTensor, on any data."""
    run = program(backend, 8, select)

    @settings(max_examples=20)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans())
    def holds(seed, density, kernel_density, exact, zeros):
        x = samples.tensor(seed, density=density, exact=exact, zeros=zeros)
        kernel = samples.kernel(seed, density=kernel_density, padding=0, exact=exact, zeros=zeros)
        bias = samples.integers(seed, (3,))
        g = cotangent(seed, 2, 3, 8)
        features, responses, gradients = run(x, kernel, bias, g)
        oracles.assert_invariants(features, capacity=8)
        np.testing.assert_array_equal(features.counts, np.minimum(responses, 8))
        for gradient, primal in zip(gradients, (x.values, kernel.values, bias), strict=True):
            assert (gradient.shape, gradient.dtype) == (primal.shape, primal.dtype)
        assert (np.asarray(gradients[0])[np.asarray(x.keys) == x.sites] == 0).all()
        assert (np.asarray(gradients[1])[np.asarray(kernel.keys) == kernel.size] == 0).all()

    holds()


def test_translation(backend):
    """Catches a border effect inside the grid: shifted input gives shifted output."""
    run = program(backend, 30, "value")
    kernel, bias = samples.kernel(12), jnp.array([1.0, 0.0, -1.0])
    block = {0: 2, 1: -1, 6: 3}
    g = jnp.zeros((2, 3, 30))
    want, _, _ = run(entries({k + 7: v for k, v in block.items()}, {}, {}, {}), kernel, bias, g)
    for shift in (1, 6, 8):
        moved = entries({k + 7 + shift: v for k, v in block.items()}, {}, {}, {})
        got, _, _ = run(moved, kernel, bias, g)
        stored = np.asarray(want.keys[0]) < 30
        np.testing.assert_array_equal(np.asarray(got.keys[0])[stored] - shift, want.keys[0][stored])
        np.testing.assert_array_equal(got.values[0], want.values[0])
