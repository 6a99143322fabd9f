"""Garbage in keys: every native target, forward and backward, on any int32, never leaves its buffers.

Without a sanitizer this catches crashes and endless loops; built with ILAJAX_SANITIZE="address;undefined"
and run by itself it catches each stray read or write.

The calls are found by tracing the public operations and then repeated with garbage in every integer
operand, also in those that only the library fills, such as the output keys that a backward pass reads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import ilajax
import samples
from ilajax.ffi import plans, registry, routes


def gradients(f, x, *weights):
    """f's result and its gradient, so that the trace has the forward and the backward call."""
    value, pull = jax.vjp(lambda v, *w: f(x.with_values(v), *w), x.values, *weights)
    return value, pull(jax.tree.map(jnp.ones_like, value))


def conv_program(
    seed,
    grid,
    window,
    cin,
    cout,
    capacity,
    *,
    slots=40,
    density=0.7,
    shared=False,
    dtype="float32",
    tuning=(),
    **options,
):
    x = samples.tensor(seed, 2, cin, grid, capacity=slots, shared=shared, dtype=dtype)
    kernel = samples.kernel(seed, window, cin, cout, density=density)
    bias = jnp.ones(cout)
    if capacity:
        options["capacity"] = capacity

    def f(x, weights, bias):
        kernel_ = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
        return ilajax.conv(x, kernel_, bias, **options).features.values

    def program():
        with plans.tuned("cpu", **dict(tuning)):
            return gradients(f, x, kernel.values, bias)

    return program


def submanifold_program(*sizes, **options):
    return conv_program(*sizes, None, shared=True, support="input", **options)


def conv_at_program(seed, reads, writes, window, cin, cout, operation=ilajax.conv, **options):
    """A program of conv_at: strides of 2, from one grid to another."""
    x = samples.tensor(seed, 2, cin, reads, capacity=60, shared=True)
    support = samples.tensor(seed + 1, 2, 1, writes, capacity=50, shared=True)
    kernel = samples.kernel(seed, window, cin, cout)
    tuning = options.pop("tuning", {})

    def f(x, weights):
        kernel_ = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
        return operation(x, kernel_, strides=2, support=support, **options).features.values

    def program():
        with plans.tuned("cpu", **tuning):
            return gradients(f, x, kernel.values)

    return program


def pointwise_program(f, seed=0, grid=(9, 10), **options):
    return lambda: gradients(
        lambda x: jax.tree.leaves(f(x))[-1],
        samples.tensor(seed, 2, 3, grid, capacity=40, **options),
    )


PRODUCTS = {"products": 0}  # see Tuning; the others go by lines, or as it is best

PROGRAMS = {
    "conv-1d": conv_program(0, (50,), (4,), 2, 3, 20, strides=3),
    "conv-2d": conv_program(1, (9, 10), (3, 3), 2, 3, 20),
    "conv-2d-shared": conv_program(2, (9, 10), (3, 3), 3, 20, 200, shared=True, select="value"),
    "conv-2d-half": conv_program(3, (9, 10), (2, 5), 2, 5, 7, dtype="bfloat16", select="magnitude"),
    "conv-3d": conv_program(4, (6, 5, 7), (3, 3, 3), 2, 4, 1, strides=2, kernel_dilation=2),
    "conv-4d": conv_program(5, (3, 4, 3, 4), (2, 2, 2, 2), 1, 2, 60, padding="VALID"),
    "conv-slabs": conv_program(6, (300, 700), (3, 3), 2, 7, 500, select="value"),
    # Nearly full lines and few weights; most of the channels at each site; both: see conv_dense.h.
    "conv-dense": conv_program(10, (9, 40), (3, 3), 5, 9, 300, slots=360, density=0.1),
    "conv-dense-odd": conv_program(
        12, (2, 7, 3), (1, 4, 3), 3, 2, 42, slots=42, density=0.3, padding="VALID"
    ),
    "conv-rows": conv_program(11, (9, 130), (3, 3), 9, 9, 300, shared=True, slots=200),
    "conv-many-channels": conv_program(7, (9, 10), (1, 1), 40, 50, 20),
    "submanifold-2d": submanifold_program(8, (9, 10), (3, 3), 2, 3),
    "submanifold-3d": submanifold_program(9, (40, 30, 50), (3, 3, 3), 3, 9, dtype="float16"),
    "products-1d": submanifold_program(13, (95,), (5,), 9, 3, tuning=PRODUCTS, kernel_dilation=2),
    "products-2d": submanifold_program(14, (9, 10), (3, 3), 9, 17, tuning=PRODUCTS),
    # One part of several chunks; backward one sample at a time.
    "products-chunks": submanifold_program(
        15, (60, 70), (3, 3), 8, 24, slots=1200, tuning=PRODUCTS | {"tasks": 1}, dtype="bfloat16"
    ),
    "products-waves": submanifold_program(
        16, (9, 10), (3, 3), 16, 16, slots=1200, tuning=PRODUCTS | {"workspace": 400_000}
    ),
    # The index of the sites is filled by two tasks.
    "products-slices": submanifold_program(
        24, (1300, 900), (3, 3), 9, 17, slots=1200, tuning=PRODUCTS
    ),
    "conv_at-1d": conv_at_program(17, (95,), (48,), (67,), 3, 9, kernel_dilation=2),
    "conv_at-3d": conv_at_program(18, (6, 5, 7), (3, 3, 4), (3, 3, 3), 9, 17),
    "conv_at-up": conv_at_program(
        19, (9, 10), (18, 20), (3, 3), 2, 3, ilajax.conv_transpose, padding="SAME"
    ),
    "conv_by_site-2d": conv_program(21, (9, 70), (3, 4), 3, 9, 12, shared=True, select_by="site"),
    "conv_by_site-fits": conv_program(
        22, (6, 5, 7), (3, 3, 3), 9, 17, 300, shared=True, select_by="site", dtype="float16"
    ),
    "conv_by_site-parts": conv_program(
        23,
        (90, 100),
        (3, 3),
        2,
        3,
        900,
        shared=True,
        select_by="site",
        strides=2,
        slots=1200,
        tuning={"workspace": 1},
    ),
    "conv_at-gathered": conv_at_program(
        20, (9, 10), (5, 5), (3, 3), 9, 17, tuning={"workspace": 1}
    ),
    "k_select": pointwise_program(lambda x: ilajax.k_select(x, 7)),
    "k_select-wide": pointwise_program(lambda x: ilajax.k_select(x, 90, select="magnitude")),
    "relu": pointwise_program(ilajax.relu, shared=True, dtype="bfloat16"),
    "max_pool": pointwise_program(lambda x: ilajax.max_pool(x, 2)),
    "max_pool-shared": pointwise_program(lambda x: ilajax.max_pool(x, 4), shared=True),
    "max_pool-3d": pointwise_program(
        lambda x: ilajax.max_pool(x, (2, 3, 1), capacity=5), 1, (5, 6, 7)
    ),
    "max_pool-overlapping": pointwise_program(
        lambda x: ilajax.max_pool(x, 3, strides=2), 2, (7, 9)
    ),
    "avg_pool-overlapping": pointwise_program(
        lambda x: ilajax.avg_pool(x, (5, 2), strides=(1, 3), count="stored"), 2, (400, 90)
    ),
    "upsample": pointwise_program(lambda x: ilajax.upsample(x, 2), shared=True),
    "avg_pool": pointwise_program(lambda x: ilajax.avg_pool(x, 3, capacity=3), shared=True),
    "avg_pool-slabs": pointwise_program(lambda x: ilajax.avg_pool(x, 2), 2, (400, 900)),
    "to_dense": pointwise_program(ilajax.to_dense),
    "to_dense-shared": pointwise_program(ilajax.to_dense, 3, (200, 300), shared=True),
    "from_dense": lambda: jax.vjp(
        lambda d: ilajax.from_dense(d, 9, select="value").values, jnp.ones((2, 9, 10, 3))
    )[1](jnp.ones((2, 3, 9))),
}


@functools.cache
def calls(program):
    """The FFI calls of a program, as (target, jitted call, operand types), on this platform only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILAJAX_BACKEND", "native")
        here = (samples.platform(),)
        patch.setattr(routes, "platforms", lambda: here)
        jaxpr = jax.make_jaxpr(PROGRAMS[program])()
    return [
        (
            eqn.params["target_name"],
            jax.jit(functools.partial(eqn.primitive.bind, **eqn.params)),
            [v.aval for v in eqn.invars],
        )
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "ffi_call"
    ]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for parameter in jax.tree.leaves(
            eqn.params, is_leaf=lambda p: isinstance(p, core.ClosedJaxpr | core.Jaxpr)
        ):
            if isinstance(parameter, core.ClosedJaxpr):
                yield from equations(parameter.jaxpr)
            elif isinstance(parameter, core.Jaxpr):
                yield from equations(parameter)


LIMITS = np.iinfo(np.int32)

GARBAGE = {
    "any-int32": lambda rng, shape: rng.integers(LIMITS.min, LIMITS.max, shape, endpoint=True),
    "sorted-any-int32": lambda rng, shape: np.sort(
        rng.integers(LIMITS.min, LIMITS.max, shape, endpoint=True), axis=-1
    ),
    "near-the-grid": lambda rng, shape: rng.integers(-5, 110, shape),
    "large": lambda rng, shape: rng.integers(0, 400_000, shape),
    "larger": lambda rng, shape: rng.integers(0, 1_300_000, shape),
    "sorted-with-duplicates": lambda rng, shape: np.sort(rng.integers(0, 95, shape), axis=-1),
    "descending": lambda rng, shape: -np.sort(-rng.integers(0, 95, shape), axis=-1),
    "padding-in-front": lambda rng, shape: np.roll(np.sort(rng.integers(60, 120, shape)), 9, -1),
    "all-0": lambda rng, shape: np.zeros(shape),
    "all-1": lambda rng, shape: np.ones(shape),
    "all-minus-1": lambda rng, shape: np.full(shape, -1),
    "all-max": lambda rng, shape: np.full(shape, LIMITS.max),
    "all-min": lambda rng, shape: np.full(shape, LIMITS.min),
    "alternating": lambda rng, shape: (
        np.where(np.arange(shape[-1]) % 2, LIMITS.max, LIMITS.min) + np.zeros(shape)
    ),
}

NATIVE = [] if not routes.native_platforms() else list(PROGRAMS)


def operand(rng, aval, garbage):
    if aval.dtype == jnp.int32:
        keys = GARBAGE[garbage](rng, aval.shape or (1,))
        return jnp.asarray(np.asarray(keys, np.int64).astype(np.int32).reshape(aval.shape))
    values = rng.normal(size=aval.shape)
    kind = rng.random(aval.shape)
    values = np.where(kind < 0.1, np.nan, np.where(kind < 0.2, np.inf, values))
    values = np.where(kind > 0.9, 0.0, np.where(kind > 0.8, -np.inf, values))
    return jnp.asarray(values.astype(np.float32), aval.dtype)


@pytest.mark.nans
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("program", NATIVE)
def test_garbage_keys(program, garbage):
    """Catches a key used as an index, a loop bound or a shift before it is checked."""
    rng = np.random.default_rng(0)
    for _, call, avals in calls(program):
        jax.block_until_ready(call(*(operand(rng, aval, garbage) for aval in avals)))


SELECTING = ("conv-2d", "conv_by_site-2d", "k_select", "max_pool-3d", "from_dense")


@pytest.mark.parametrize("program", [name for name in SELECTING if name in NATIVE])
def test_a_selection_of_nothing_is_refused(program):
    """Catches a handler that looks for the weakest of no entries for ever; Python asks for one or more."""
    _, forward, avals = calls(program)[0]
    # With a side effect, or XLA drops a call whose results are all empty.
    bind = forward.__wrapped__.func
    parameters = forward.__wrapped__.keywords | {"has_side_effect": True}
    parameters["result_avals"] = tuple(
        aval.update(shape=(*aval.shape[:2], 0)) if aval.ndim == 3 else aval
        for aval in parameters["result_avals"]
    )
    rng = np.random.default_rng(0)
    operands = [operand(rng, aval, "near-the-grid") for aval in avals]
    with pytest.raises(jax.errors.JaxRuntimeError, match="the capacity is 0"):
        jax.block_until_ready(jax.jit(functools.partial(bind, **parameters))(*operands))


def test_no_target_is_left_out():
    """Catches a new target that this file does not reach."""
    reached = {target for program in NATIVE for target, _, _ in calls(program)}
    assert reached == set(registry.extensions[samples.platform()].targets)


@functools.cache
def network(backend):
    """jit of a small network of all operations, and its gradients."""

    @jax.jit
    def run(x, kernel, bias):
        def f(values, weights):
            kernel_ = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
            y, _ = ilajax.conv(x.with_values(values), kernel_, bias, capacity=9)
            y = ilajax.max_pool(ilajax.k_select(y, 7), 2, capacity=5)
            joined = ilajax.concatenate([y, ilajax.relu(ilajax.avg_pool(x.with_values(values), 2))])
            joined = joined.map(jnp.exp)
            return ilajax.to_dense(joined), ilajax.global_max_pool(joined)

        out, pull = jax.vjp(f, x.values, kernel.values)
        return out, pull(out)

    return run


@pytest.mark.nans
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_through_the_public_operations(backend, garbage):
    """Catches a crash, or an output shape that depends on the keys, in all of a small network."""
    rng = np.random.default_rng(1)

    def broken(tree):
        return jax.tree.map(lambda a: operand(rng, jax.typeof(a), garbage), tree)

    (dense, pooled), (x_bar, w_bar) = network(backend)(
        broken(samples.tensor(0)), broken(samples.kernel(0)), jnp.ones(3)
    )
    jax.block_until_ready(dense)
    assert dense.shape == (2, 3, 3, 5)
    assert pooled.shape == (2, 5)
    assert x_bar.shape == (2, 2, 12)
    assert w_bar.shape == (56,)


@functools.cache
def weights_only(backend):
    """jit of a convolution as a function of its kernel, with the weights' gradient."""
    x = samples.tensor(1)

    @jax.jit
    def run(kernel):
        def f(weights):
            kernel_ = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
            return ilajax.conv(x, kernel_, capacity=30, select="value").features.values

        values, pull = jax.vjp(f, kernel.values)
        return values, pull(jnp.ones_like(values))[0], kernel.to_dense(), kernel.mask()

    return run


@pytest.mark.nans
@pytest.mark.parametrize("key", [-1, 54, LIMITS.max, LIMITS.min])
def test_a_broken_weight_is_no_weight(backend, key):
    """Catches a filter key outside the filter that counts as some weight of it, in either direction."""
    good = samples.kernel(1, padding=1)
    keys = np.array(good.keys)
    keys[-1] = key
    bad = ilajax.SparseKernel(jnp.asarray(keys), good.values.at[-1].set(1e6), good.shape)
    want, got = weights_only(backend)(good), weights_only(backend)(bad)
    jax.tree.map(np.testing.assert_array_equal, got, want)
