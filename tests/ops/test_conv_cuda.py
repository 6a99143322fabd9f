"""conv's CUDA kernels on a GPU: against the reference at larger sizes, in every plan, with the same bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import samples
from ilajax.ffi import plans, routes

pytestmark = [
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or "cuda" not in routes.native_platforms(),
        reason="needs a GPU and the CUDA extension",
    ),
    pytest.mark.nans,
]

# batch, in, out, grid, window, strides, dilation, capacity, density, select, dtype, shared
SHAPES = {
    "r64": (2, 1, 8, (64, 64, 64), (3, 3, 3), 1, 1, 3000, 0.01, "positive", "float32", False),
    "r64-all-kept": (
        2,
        1,
        8,
        (64, 64, 64),
        (3, 3, 3),
        1,
        1,
        90000,
        0.01,
        "value",
        "float32",
        False,
    ),
    "r33-odd": (3, 5, 7, (33, 31, 35), (3, 3, 3), 1, 1, 2000, 0.05, "magnitude", "float32", False),
    "strided": (3, 4, 16, (32, 40, 24), (3, 3, 3), 2, 1, 700, 0.05, "positive", "float32", False),
    "dilated": (
        2,
        3,
        20,
        (30, 30, 30),
        (3, 2, 3),
        1,
        (2, 1, 3),
        900,
        0.05,
        "value",
        "bfloat16",
        False,
    ),
    "2d": (4, 3, 8, (200, 300), (5, 5), 1, 1, 5000, 0.05, "positive", "float16", False),
    "2d-strided": (4, 3, 8, (201, 300), (5, 4), (2, 3), 1, 1000, 0.05, "value", "float32", False),
    "1d": (2, 2, 4, (100000,), (7,), 1, 1, 3000, 0.02, "positive", "float32", False),
    "4d": (2, 2, 4, (12, 13, 14, 11), (2, 3, 2, 3), 1, 1, 2000, 0.03, "positive", "float32", False),
    "wide": (2, 40, 70, (12, 12, 12), (3, 3, 3), 1, 1, 300, 0.1, "positive", "float32", False),
    "shared": (4, 16, 16, (40, 40, 40), (3, 3, 3), 1, 1, 3000, 0.02, "positive", "float32", True),
    "full": (2, 2, 3, (24, 24, 24), (3, 3, 3), 1, 1, 24**3, 1.0, "value", "float32", False),
    "small-batch": (
        32,
        8,
        8,
        (16, 16, 16),
        (3, 3, 3),
        1,
        1,
        400,
        0.1,
        "positive",
        "float32",
        False,
    ),
}


@functools.cache
def case(name):
    batch, cin, cout, grid, window, _, _, capacity, density, _, dtype, shared = SHAPES[name]
    slots = int(np.prod(grid) * density * 1.1) + 1 if density < 1 else int(np.prod(grid))
    x = samples.tensor(
        1, batch, cin, grid, capacity=slots, density=density, dtype=dtype, shared=shared, zeros=True
    )
    kernel = samples.kernel(2, window, cin, cout, density=0.7, empty=True, zeros=True)
    g = samples.integers(3, (batch, cout, capacity), dtype)
    bias = samples.integers(4, (cout,))
    return x, kernel, bias, g


def compute(backend, name, monkeypatch, inputs=None):
    """Features, responses and gradients of a case on a backend."""
    _, _, _, _, _, strides, dilation, capacity, _, select, _, _ = SHAPES[name]
    x, kernel, bias, g = inputs or case(name)
    monkeypatch.setenv("ILAJAX_BACKEND", backend)

    @jax.jit
    def run(x, kernel, bias, g):
        def values(values, weights, bias):
            features, responses = ilajax.conv(
                x.with_values(values),
                dataclasses.replace(kernel, values=weights),
                bias,
                capacity=capacity,
                strides=strides,
                kernel_dilation=dilation,
                select=select,
            )
            return features.values, (features, responses)

        _, pull, (features, responses) = jax.vjp(
            values, x.values, kernel.values, bias, has_aux=True
        )
        return features.keys, features.values, responses, pull(g)

    return jax.tree.map(np.asarray, run(x, kernel, bias, g))


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, monkeypatch):
    """Catches what small grids do not reach: several tiles, runs, strips and parts; data is exact."""
    equal(compute("native", name, monkeypatch), compute("reference", name, monkeypatch))


@pytest.mark.parametrize("budget", [1 << 20, 1 << 18, 1 << 16])
@pytest.mark.parametrize(
    "name", ["r64", "r33-odd", "strided", "2d-strided", "4d", "1d", "small-batch"]
)
def test_chunks_slabs_and_a_small_pool(name, budget, monkeypatch):
    """Catches a result that depends on how much workspace there is."""
    want = compute("native", name, monkeypatch)
    with plans.tuned("cuda", workspace=budget):
        equal(compute("native", name, monkeypatch), want)


@pytest.mark.parametrize("name", ["r64", "r33-odd", "shared", "wide"])
def test_the_same_bits_each_time(name, monkeypatch):
    """Catches sums whose order depends on scheduling."""
    x, kernel, bias, g = case(name)
    rng = np.random.default_rng(5)
    x = x.with_values(jnp.asarray(rng.normal(size=x.values.shape), x.dtype))
    kernel = dataclasses.replace(
        kernel, values=jnp.asarray(rng.normal(size=kernel.values.shape), jnp.float32)
    )
    g = jnp.asarray(rng.normal(size=g.shape), g.dtype)
    first = compute("native", name, monkeypatch, (x, kernel, bias, g))
    for _ in range(3):
        again = compute("native", name, monkeypatch, (x, kernel, bias, g))
        equal(
            jax.tree.map(lambda a: a.tobytes(), again), jax.tree.map(lambda a: a.tobytes(), first)
        )


@pytest.mark.parametrize("kind", ["random", "negative", "descending", "duplicate", "large"])
def test_any_keys_are_safe(kind, monkeypatch):
    """Catches an access outside a buffer (under compute-sanitizer), a hang or an error."""
    name = "r33-odd"
    x, kernel, bias, g = case(name)
    rng = np.random.default_rng(6)
    shape, sites = x.keys.shape, 33 * 31 * 35
    keys = {
        "random": rng.integers(-(2**31), 2**31, shape),
        "negative": np.full(shape, -5),
        "descending": np.broadcast_to(np.arange(shape[-1], 0, -1), shape),
        "duplicate": np.full(shape, 77),
        "large": rng.integers(0, 2 * sites, shape),
    }[kind].astype(np.int32)
    x = dataclasses.replace(x, keys=jnp.asarray(keys))
    compute("native", name, monkeypatch, (x, kernel, bias, g))
