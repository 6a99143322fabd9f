"""The dense operations of OctNet3 against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import samples
from ilajax.models._dense import _by_kernel, conv_general_dilated, max_pool

SPECS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def by_xla(x, w):
    rank = x.ndim - 2
    dimensions = lax.conv_dimension_numbers(x.shape, w.shape, SPECS[rank])
    return lax.conv_general_dilated(x, w, (1,) * rank, "SAME", dimension_numbers=dimensions)


def operands(*shape, features=4, dtype=jnp.float32):
    """Input, filter and cotangent of small integers: sums are exact, and rounded once."""
    rng = np.random.default_rng(0)
    window = (3,) * (len(shape) - 2)
    shapes = (shape, (*window, shape[-1], features), (*shape[:-1], features))
    return [jnp.asarray(rng.integers(-3, 4, s), dtype) for s in shapes]


@jax.jit(static_argnums=0)
def with_gradients(function, *operands):
    *primals, cotangent = operands
    y, pull = jax.vjp(function, *primals)
    return y, *pull(cotangent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 3), (1, 1, 2, 1, 2), (2, 4, 8, 9, 8)])
def test_the_kernel_is_the_convolution(shape, dtype):
    """Grids narrower than the window too, and layers of as many channels as take matrix products."""
    x, w, g = operands(*shape, features=2 * shape[-1], dtype=dtype)
    wanted = with_gradients(by_xla, *(a.astype(jnp.float32) for a in (x, w, g)))
    for found, want in zip(with_gradients(_by_kernel, x, w, g), wanted, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, want.astype(dtype))


@pytest.mark.parametrize("filters", [None, 0])
def test_the_kernel_under_vmap(filters):
    x, w, g = operands(2, 3, 4, 4, 2)
    many = jnp.stack([x, 2 * x]), w if filters is None else jnp.stack([w, w + 1]), jnp.stack([g, g])
    mapped = jax.vmap(with_gradients_of_kernel, (0, filters, 0))(*many)
    for at in range(2):
        alone = with_gradients_of_kernel(many[0][at], w + at * (filters == 0), g)
        for found, want in zip(mapped, alone, strict=True):
            np.testing.assert_array_equal(found[at], want)


def with_gradients_of_kernel(*operands):
    return with_gradients(_by_kernel, *operands)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("remat", [False, True])
def test_flax_takes_it(rank, remat, backend):
    """Catches a wrong form, arguments that Flax does not pass, and the kernel where nobody wants it."""
    layers = [
        nnx.Conv(2, 3, (3,) * rank, rngs=nnx.Rngs(0), **options)
        for options in ({}, {"conv_general_dilated": conv_general_dilated})
    ]
    x = jax.random.normal(jax.random.key(0), (2, *(5, 6, 4)[:rank], 2))
    call = nnx.remat(lambda m, x: m(x)) if remat else lambda m, x: m(x)
    plain, ours = (
        nnx.value_and_grad(lambda m: jnp.sum(call(m, x) ** 2))(layer) for layer in layers
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, ours)
    native = backend == "native" and rank == 3 and samples.platform() == "cpu"
    program = jax.jit(lambda x: layers[1](x)).lower(x).as_text()
    assert ("ilajax_submanifold_fwd" in program) == native


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 7, 4, 2), (2, 4, 5, 6, 3)])
def test_max_pool_is_flax_s(shape, dtype):
    """Ties too, of which small integers have many."""

    def flax_s(x):
        window = (2,) * (x.ndim - 2)
        return nnx.max_pool(x, window, strides=window)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, shape), dtype).at[0, 0].set(-jnp.inf)
    g = jnp.asarray(rng.integers(1, 9, flax_s(x).shape), dtype)
    for found, want in zip(
        with_gradients(max_pool, x, g), with_gradients(flax_s, x, g), strict=True
    ):
        np.testing.assert_array_equal(found, want)


@pytest.mark.nans
@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_max_pool_passes_nan_on(at):
    x = jnp.ones((1, 2, 2, 1)).at[0, at[0], at[1], 0].set(jnp.nan)
    y, gradient = with_gradients(max_pool, x, jnp.full((1, 1, 1, 1), 3.0))
    assert np.isnan(y).all()
    np.testing.assert_array_equal(gradient, 3.0 * np.isnan(x))
