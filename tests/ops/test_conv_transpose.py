"""conv_transpose that selects, against loops and jax.lax.conv_transpose; onto a support: test_conv_at.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples
from ops.test_conv_at import GEOMETRIES

SELECTS = ("positive", "value", "magnitude")


@functools.cache
def program(backend, capacity, select, **options):
    """jit of the transposed convolution and its gradients."""

    @jax.jit
    def run(x, kernel, bias, g):
        def values(values, weights, bias):
            w = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
            features, responses = ilajax.conv_transpose(
                x.with_values(values), w, bias, capacity=capacity, select=select, **options
            )
            return features.values, (features, responses)

        _, pull, (features, responses) = jax.vjp(
            values, x.values, kernel.values, bias, has_aux=True
        )
        return features, responses, pull(g)

    return run


@pytest.mark.crossed(4)
@pytest.mark.parametrize("name", [n for n, g in GEOMETRIES.items() if isinstance(g[3], str)])
def test_loops(backend, name):
    """Catches a wrong site, value, choice or gradient in any dimension, window and stride; data is exact."""
    grid, window, strides, padding, dilation = GEOMETRIES[name]
    geometry = oracles.Transposed(oracles.Geometry(grid, window, strides, padding, dilation))
    seed = sum(map(ord, name))
    select = SELECTS[seed % 3]
    x = samples.tensor(seed, 2, 2, geometry.grid, zeros=True, shared=seed % 2 == 0)
    kernel = samples.kernel(seed, window, 2, 3, density=0.6, zeros=True)
    bias = samples.integers(seed, (3,))
    capacity = max(1, geometry.sites // 3)
    run = program(
        backend,
        capacity,
        select,
        strides=strides,
        padding=padding,
        kernel_dilation=dilation,
        output_shape=grid,
    )
    g = samples.integers(seed, (2, 3, capacity))
    features, responses, gradients = run(x, kernel, bias, g)
    keys, values, counts = oracles.conv(x, kernel, bias, geometry, capacity, select)
    assert features.spatial_shape == grid
    oracles.assert_invariants(features, capacity=capacity)
    oracles.assert_tensor(features, keys, values)
    np.testing.assert_array_equal(responses, counts)
    bars = oracles.conv_backward(x, kernel, geometry, keys, g)
    for got, want in zip(gradients, bars, strict=True):
        oracles.assert_close(got, np.asarray(want, np.float32))


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))], ids=str)
@pytest.mark.parametrize("strides", [1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("window", [(3, 3), (2, 4), (1, 1)], ids=str)
def test_it_is_lax_conv_transpose(window, strides, padding):
    """Catches another output grid, another alignment, or a filter that is flipped."""
    grid = (4, 5)
    steps = (strides,) * 2 if isinstance(strides, int) else strides
    x = samples.tensor(1, 2, 2, grid, capacity=20, density=0.6)
    kernel = samples.kernel(1, window, 2, 3)

    def dense(x, w):
        numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_transpose(x, w, steps, padding, dimension_numbers=numbers)

    want = oracles.on_cpu(dense, oracles.dense(x), oracles.dense_kernel(kernel))
    capacity = math.prod(want.shape[1:3])
    got, _ = ilajax.conv_transpose(
        x, kernel, capacity=capacity, strides=strides, padding=padding, select="value"
    )
    assert got.spatial_shape == want.shape[1:3]
    np.testing.assert_array_equal(oracles.dense(got), want)


def test_up_undoes_down():
    """Catches a way up whose sites are not those of the way down: spconv's inverse convolution."""
    for size in (17, 18):
        fine = samples.tensor(2, 2, 2, (size,), shared=True)
        kernel = samples.kernel(2, (3,), 2, 2, density=1.0)
        coarse, _ = ilajax.conv(fine, kernel, capacity=9, strides=2, select="magnitude")
        assert coarse.spatial_shape == (9,)
        up, _ = ilajax.conv_transpose(coarse, kernel, strides=2, support=fine)
        assert up.keys is fine.keys
        free, _ = ilajax.conv_transpose(
            coarse, kernel, strides=2, capacity=size, select="value", output_shape=(size,)
        )
        at = oracles.dense(up.with_values(jnp.ones_like(up.values) * (up.keys < size)))
        np.testing.assert_array_equal(oracles.dense(up), oracles.dense(free) * at)
