"""Memory of the compiled programs, as XLA plans it: outputs and workspaces stay within their bounds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import ilajax
import samples
from ilajax.ffi import routes


def temporaries(f, *arguments):
    """Bytes of temporary buffers, the workspace included, as XLA plans them."""
    return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def abstract(batch, channels, grid, capacity):
    shape = (batch, channels, capacity)
    return ilajax.SparseTensor(
        jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32), grid
    )


def filters(window, cin, cout):
    return jax.eval_shape(
        ilajax.SparseKernel.from_dense, jax.ShapeDtypeStruct((*window, cin, cout), jnp.float32)
    )


@pytest.fixture
def on_kernels(monkeypatch):
    """The kernels of the default device; there is nothing to test where it has none."""
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    platform = samples.platform()
    if platform not in routes.native_platforms():
        pytest.skip(f"no kernels on {platform}")
    monkeypatch.setattr(routes, "platforms", lambda: (platform,))
    return platform


@pytest.mark.parametrize("r", [16, 64, 256])
def test_memory_is_bounded(on_kernels, r):
    """Catches outputs or a workspace beyond the bound: max(8 sites, 32 MiB), on a GPU 256 MiB."""
    grid, batch, channels, capacity = (r, r, r), 32, 8, max(1, r**2)
    x, kernel = abstract(batch, 1, grid, capacity), filters((3, 3, 3), 1, channels)
    bound = max(8 * r**3, 256 << 20 if on_kernels == "cuda" else 32 << 20)

    def forward(x, kernel):
        return ilajax.conv(x, kernel, capacity=capacity)

    compiled = jax.jit(forward).lower(x, kernel).compile().memory_analysis()
    entries = batch * channels * capacity
    assert compiled.output_size_in_bytes <= 8 * entries + 4 * batch * channels + 1024
    assert compiled.temp_size_in_bytes <= bound

    def backward(x, kernel, output_keys, g):
        _, pull = jax.vjp(
            lambda v, w: (
                forward(x.with_values(v), dataclasses.replace(kernel, values=w)).features.values
            ),
            x.values,
            kernel.values,
        )
        return pull(g)

    g = jax.ShapeDtypeStruct((batch, channels, capacity), jnp.float32)
    # The forward pass runs too, and what it hands on are its outputs.
    assert (
        temporaries(backward, x, kernel, g, g) <= bound + 8 * entries + 4 * batch * channels + 1024
    )


def test_the_workspace_does_not_multiply_under_vmap(on_kernels):
    """Catches a workspace for each mapped item: over samples it is that of one larger batch."""
    grid, capacity = (64, 64, 64), 2000
    kernel = filters((3, 3, 3), 2, 8)

    def values(x, kernel):
        return ilajax.conv(x, kernel, capacity=capacity).features.values

    folded = abstract(16, 2, grid, capacity)
    one = abstract(1, 2, grid, capacity)
    mapped = jax.tree.map(lambda a: jax.ShapeDtypeStruct((16, *a.shape), a.dtype), one)
    bound = temporaries(values, folded, kernel)
    slack = 1 << 16
    assert temporaries(jax.vmap(values, (0, None)), mapped, kernel) <= bound + slack
    kernels = jax.tree.map(lambda a: jax.ShapeDtypeStruct((16, *a.shape), a.dtype), kernel)
    entries = 16 * 8 * capacity
    # Filters of their own: one after the other, in one workspace, next to the results as they come in.
    limit = temporaries(values, one, kernel) + 12 * entries + slack
    assert temporaries(jax.vmap(values), mapped, kernels) <= limit


def test_layers_share_one_workspace(on_kernels):
    """Catches a workspace for each layer: XLA reuses it along a chain."""
    grid, capacity = (64, 64, 64), 1000

    def chain(x, kernel, layers):
        for _ in range(layers):
            x, _ = ilajax.conv(x, kernel, capacity=capacity)
        return x.values

    x, kernel = abstract(4, 4, grid, capacity), filters((3, 3, 3), 4, 4)
    entries = 4 * 4 * capacity
    limit = (
        temporaries(functools.partial(chain, layers=1), x, kernel) + 4 * 12 * entries + (1 << 16)
    )
    assert temporaries(functools.partial(chain, layers=6), x, kernel) <= limit
