"""conv on real numbers: against dense convolution and finite differences, and in half precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import ilajax
import oracles
import samples
from ops.test_conv import GEOMETRIES, GEOMETRY, SELECTS, program

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}


@pytest.mark.crossed(4)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("select", SELECTS)
def test_dense_convolution(backend, select, dtype):
    """Catches what exact small integers cannot: low-precision sums, wrong rounding, a wrong cut."""
    x = samples.tensor(8, 2, 3, (8, 9), capacity=30, dtype=dtype, exact=False)
    kernel = samples.kernel(8, (3, 3), 3, 4, dtype=dtype, exact=False)
    geometry = oracles.Geometry((8, 9), (3, 3))
    bias = jnp.asarray([0.5, -0.5, 0.1, 0.0], samples.DTYPES[dtype])
    features, responses, _ = program(backend, 20, select)(
        x, kernel, bias, jnp.zeros((2, 4, 20), x.dtype)
    )
    oracles.assert_invariants(features, capacity=20)
    exact = oracles.on_cpu(
        lambda x, w: oracles.dense_conv(x, w, geometry),
        oracles.dense(x),
        oracles.dense_kernel(kernel),
    )
    tolerance = TOLERANCE[dtype] * np.abs(exact).max()
    # A site that no entry reaches is 0 in both; all others are far from 0 on random data.
    live = np.abs(exact) > 1e-6
    dense = np.moveaxis(np.where(live, exact + np.asarray(bias, np.float32), 0), -1, 1).reshape(
        2, 4, -1
    )
    live = np.moveaxis(live, -1, 1).reshape(2, 4, -1)
    if select == "positive":
        assert (np.abs(np.asarray(responses) - (live & (dense > 0)).sum(-1)) <= 1).all()
        live &= dense > -tolerance
    else:
        np.testing.assert_array_equal(responses, live.sum(-1))
    rank = np.abs(dense) if select == "magnitude" else dense
    for b in range(2):
        for oc in range(4):
            keys = np.asarray(features.keys[b, oc])
            keys = keys[keys < geometry.sites]
            assert keys.size == min(20, int(responses[b, oc]))
            assert live[b, oc, keys].all()
            got = oracles.read(features.values[b, oc, : keys.size])
            np.testing.assert_allclose(
                got, dense[b, oc, keys], rtol=TOLERANCE[dtype], atol=tolerance
            )
            left = np.setdiff1d(np.flatnonzero(live[b, oc]), keys)
            if left.size and keys.size == 20:
                assert rank[b, oc, left].max() <= rank[b, oc, keys].min() + 2 * tolerance


@pytest.mark.crossed(4)
@pytest.mark.parametrize("capacity", [10, 60])
@pytest.mark.parametrize("name", ["2d", "2d-strided-dilated", "3d-asymmetric"])
def test_gradients_of_dense_convolution(backend, name, capacity):
    """Catches gradients other than the dense function's, taken at kept outputs and read at the support."""
    grid, window, strides, padding, dilation = GEOMETRIES[name]
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    x = samples.tensor(9, 2, 2, grid, capacity=20, exact=False)
    kernel = samples.kernel(9, window, 2, 3, exact=False)
    g = jax.random.normal(jax.random.key(9), (2, 3, capacity))
    features, _, (x_bar, w_bar, _) = program(
        backend, capacity, "magnitude", (padding, strides, dilation)
    )(x, kernel, jnp.zeros(3), g)
    masked = jnp.where(features.keys < features.sites, g, 0)
    scattered = oracles.dense(features.with_values(masked))

    def gradients(x, w, g):
        _, pull = jax.vjp(lambda x, w: oracles.dense_conv(x, w, geometry), x, w)
        return pull(g)

    dense_x_bar, dense_w_bar = oracles.on_cpu(
        gradients, oracles.dense(x), oracles.dense_kernel(kernel), scattered
    )
    planes = np.moveaxis(dense_x_bar, -1, 1).reshape(2, 2, -1)
    for b, sample in enumerate(oracles.segments(x)):
        for c, segment in enumerate(sample):
            want = [planes[b, c, key] for _, key, _ in segment]
            np.testing.assert_allclose(x_bar[b, c, : len(want)], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(x_bar[b, c, len(want) :], 0)
    flat = dense_w_bar.reshape(-1, 2, 3)
    want = np.zeros(kernel.values.shape)
    for slot, tap, ic, oc, _ in oracles.weights(kernel):
        want[slot] = flat[tap, ic, oc]
    np.testing.assert_allclose(w_bar, want, rtol=1e-4, atol=1e-5)


def test_gradients_against_finite_differences(backend):
    """Catches a backward pass that does not belong to the forward pass, with nothing else in between."""
    x = samples.tensor(10, 1, 2, (4, 5), capacity=8, exact=False)
    kernel = samples.kernel(10, (3, 2), 2, 2, exact=False)

    def f(values, weights, bias):
        features, _ = ilajax.conv(
            x.with_values(jnp.where(x.keys < 20, values, 0)),
            dataclasses.replace(kernel, values=weights),
            bias,
            capacity=20,
            select="magnitude",
        )
        return jnp.sin(jnp.arange(20.0)) * features.values

    arguments = (x.values, kernel.values, jnp.array([0.3, -0.2]))
    # Bilinear on a fixed support: central differences are exact but for rounding.
    check_grads(jax.jit(f), arguments, order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-3)


def test_a_half_precision_input_keeps_float32_weights(backend):
    """Catches sums or weight gradients rounded to the dtype of the features, and a dtype that changes."""
    x = samples.tensor(11, dtype="bfloat16")
    kernel = samples.kernel(11)
    # 1 + 2^-12 is not a bfloat16, and four such products cancel to 2^-12 of the sum.
    kernel = dataclasses.replace(kernel, values=kernel.values * (1 + 2.0**-12))
    bias = jnp.zeros(3)
    features, _, (x_bar, w_bar, b_bar) = program(backend, 30, "value")(
        x, kernel, bias, jnp.ones((2, 3, 30), jnp.bfloat16)
    )
    keys, values, _ = oracles.conv(x, kernel, bias, GEOMETRY, 30, "value")
    oracles.assert_tensor(features, keys, values)
    assert (features.dtype, x_bar.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (w_bar.dtype, b_bar.dtype) == (jnp.float32, jnp.float32)


def test_half_precision_sums_are_float32(backend):
    """Catches accumulation in the storage dtype: 300 ones are 300, not the 256 of bfloat16 sums."""
    x = samples.from_entries((301,), [[dict.fromkeys(range(301), 1)]], 301, "bfloat16")
    kernel = ilajax.SparseKernel.from_dense(jnp.ones((301, 1, 1), jnp.bfloat16))
    features, _, (_, _, b_bar) = program(backend, 1, "value", ("VALID", 1, 1))(
        x, kernel, jnp.zeros(1, jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    )
    assert features.values[0, 0, 0] == jnp.bfloat16(301)
    assert b_bar[0] == 1


def test_overflow_to_infinity_in_float16(backend):
    """Catches a saturated or wrapped value where a float32 response does not fit into float16."""
    x = samples.from_entries((4,), [[{0: 60000, 2: -60000, 3: 1}]], 4, "float16")
    kernel = ilajax.SparseKernel.from_dense(jnp.full((1, 1, 1), 2, jnp.float16))
    features, _, _ = program(backend, 4, "value", ("SAME", 1, 1))(
        x, kernel, jnp.zeros(1, jnp.float16), jnp.zeros((1, 1, 4), jnp.float16)
    )
    np.testing.assert_array_equal(
        features.values[0, 0].astype(jnp.float32), [np.inf, -np.inf, 2, 0]
    )
