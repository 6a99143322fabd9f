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


def shared(batch, channels, grid, capacity):
    x = abstract(batch, channels, grid, capacity)
    keys = jax.ShapeDtypeStruct((batch, 1, capacity), jnp.int32)
    return ilajax.SparseTensor(keys, x.values, grid)


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


BY_SITE = {"strides": 2, "select_by": "site", "select": "magnitude"}
# Of a fine map x, a coarse one y, both with shared supports, and a filter.
ON_SHARED_SUPPORTS = {
    "submanifold": lambda x, y, k: ilajax.conv(x, k, support="input").features,
    "strided": lambda x, y, k: ilajax.conv(x, k, strides=2, support=y).features,
    "inverse": lambda x, y, k: ilajax.conv_transpose(y, k, strides=2, support=x).features,
    "by_site": lambda x, y, k: ilajax.conv(x, k, capacity=y.capacity, **BY_SITE).features,
    "up_by_site": lambda x, y, k: (
        ilajax.conv_transpose(y, k, capacity=x.capacity, **BY_SITE).features
    ),
    "k_select": lambda x, y, k: ilajax.k_select(x, x.capacity // 2, select_by="site"),
    "max_pool": lambda x, y, k: ilajax.max_pool(x, 3, strides=2, capacity=x.capacity),
    "avg_pool": lambda x, y, k: ilajax.avg_pool(x, 3, strides=1, count="stored"),
    "upsample": lambda x, y, k: ilajax.upsample(y, 2),
    "upsample_given": lambda x, y, k: ilajax.upsample(y, 2, support=x),
    "add": lambda x, y, k: ilajax.upsample(y, 2, support=x) + x,
    "add_own": lambda x, y, k: x.unshare() + x.unshare().map(jnp.square),
}


@pytest.mark.parametrize("r", [64, 256])
@pytest.mark.parametrize("operation", ON_SHARED_SUPPORTS)
def test_memory_on_shared_supports_is_bounded(on_kernels, operation, r):
    """Catches a workspace beyond the bound, next to what the forward pass hands on to the backward pass."""
    batch, channels, capacity = 8, 16, 2 * r**2
    x = shared(batch, channels, (r,) * 3, capacity)
    y = shared(batch, channels, (r // 2,) * 3, capacity // 2)
    kernel = filters((3, 3, 3), channels, channels)
    bound = max(8 * r**3, 256 << 20 if on_kernels == "cuda" else 32 << 20)
    run = ON_SHARED_SUPPORTS[operation]
    z = jax.eval_shape(run, x, y, kernel)
    outputs = 4 * (z.keys.size + z.values.size)
    # A sum takes both maps over the union of their supports.
    maps = 2 if operation.startswith("add") else 0
    assert temporaries(run, x, y, kernel) <= bound + maps * outputs

    def backward(x, y, kernel, g):
        def values(v, u, w):
            own = dataclasses.replace(kernel, values=w)
            return run(x.with_values(v), y.with_values(u), own).values

        return jax.vjp(values, x.values, y.values, kernel.values)[1](g)

    assert temporaries(backward, x, y, kernel, z.values) <= bound + 2 * outputs


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
