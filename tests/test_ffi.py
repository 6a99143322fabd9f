"""Transformations: every operation under jit, grad, vmap, checkpoint, scan and shard_map, on each backend."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import samples
from ilajax.ffi import routes

HERE = pathlib.Path(__file__).parent
GRID = (5, 6)


def up_onto(x, kernel):
    """Down to a coarser grid, and back to the sites of x."""
    down = ilajax.max_pool(x, 2)
    return ilajax.conv_transpose(down, kernel, jnp.ones(3), strides=2, support=x).features


def by_site(x, kernel):
    return ilajax.conv(x, kernel, jnp.ones(3), capacity=7, strides=2, select_by="site").features


# Each takes (x, kernel), and uses the kernel where it has a use for one. x has a shared support in the
# operations that need it, and its own supports in the others.
OPERATIONS = {
    "conv": lambda x, k: ilajax.conv(x, k, jnp.ones(3), capacity=7, select="value").features.values,
    "submanifold": lambda x, k: ilajax.conv(x, k, jnp.ones(3), support="input").features.values,
    "conv_at": lambda x, k: up_onto(x, k).values,
    "conv_by_site": lambda x, k: by_site(x, k).values,
    "k_select": lambda x, k: ilajax.k_select(x, 5).values,
    "k_select-site": lambda x, k: ilajax.k_select(x, 5, select_by="site").values,
    "relu": lambda x, k: ilajax.relu(x).values,
    "max_pool": lambda x, k: ilajax.max_pool(x, 2, capacity=4).values,
    "avg_pool": lambda x, k: ilajax.avg_pool(x, 2).values,
    "sum_pool": lambda x, k: ilajax.sum_pool(x, 3, strides=1).values,
    "upsample": lambda x, k: ilajax.upsample(x, 2).values,
    "to_dense": lambda x, k: ilajax.to_dense(x),
    "from_dense": lambda x, k: ilajax.from_dense(ilajax.to_dense(x) + 1, 9).values,
    "global_pools": lambda x, k: ilajax.global_max_pool(x) + ilajax.global_avg_pool(x),
}
AT_SITES = ("conv_at", "conv_by_site", "submanifold")
CONVOLUTIONS = ("conv", *AT_SITES)


def data(name, seed=0):
    """x, and the weights of a kernel whose keys are fixed."""
    return samples.tensor(seed, shared=name in AT_SITES), samples.kernel(seed)


def loss(name):
    """A scalar function of (values, weights) for given keys."""

    def f(values, weights, x, kernel):
        out = OPERATIONS[name](x.with_values(values), dataclasses.replace(kernel, values=weights))
        return (out * (1 + jnp.arange(out.size).reshape(out.shape) % 5)).sum()

    return f


def gradient(name):
    """(x, kernel) -> cotangents of values and weights."""
    return lambda x, kernel: jax.grad(loss(name), (0, 1))(x.values, kernel.values, x, kernel)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_kernels_are_here():
    """Catches an installation that lost its extension, with which all else would test the reference only."""
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        assert "cpu" in routes.native_platforms()
    if jax.default_backend() == "gpu":
        assert "cuda" in routes.native_platforms()


@pytest.mark.parametrize(("name", "scope"), [("conv", "conv"), ("max_pool", "pool")])
def test_profiles_name_the_operation(backend, name, scope):
    """Catches a profile in which every operation is called ffi_call, or is a heap of XLA's instructions."""
    x, kernel = data(name)

    def compiled(f):
        return jax.jit(f).lower(x, kernel).compile().as_text()

    assert f"/ilajax.{scope}/" in compiled(OPERATIONS[name])
    assert f"transpose(jvp(ilajax.{scope}))/" in compiled(gradient(name))


@pytest.mark.nans
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_debug_nans_names_the_operation(backend, jit):
    """Catches a NaN that is reported for the next operation, or under the name of all custom calls."""
    x, kernel = data("conv")
    infinite = x.with_values(jnp.where(x.values != 0, jnp.inf, 0.0))
    run = lambda x: OPERATIONS["conv"](x, kernel).sum()  # noqa: E731
    with (
        jax.debug_nans(True),
        pytest.raises(FloatingPointError, match=r"\(nan\) encountered in ilajax\.conv"),
    ):
        (jax.jit(run) if jit else run)(infinite)


@pytest.mark.nans
def test_debug_nans_names_the_gradient(backend):
    """Catches a NaN of the backward pass that is taken for one of the forward pass, or for none."""
    x, _ = data("k_select")
    selected, pull = jax.vjp(lambda v: ilajax.k_select(x.with_values(v), 3).values, x.values)
    nan = jnp.full_like(selected, jnp.nan)
    with (
        jax.debug_nans(True),
        pytest.raises(FloatingPointError, match=r"in the gradient of ilajax\.k_select"),
    ):
        pull(nan)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_batch(backend, name):
    """Catches a division by the number of samples, and sums over none that are not 0."""
    x, kernel = samples.tensor(0, 0, 2, GRID, shared=name in AT_SITES), samples.kernel(0)

    def total(values, weights):
        y = OPERATIONS[name](x.with_values(values), dataclasses.replace(kernel, values=weights))
        assert y.shape[0] == 0
        return y.sum()

    gradients = jax.jit(jax.grad(total, (0, 1)))(x.values, kernel.values)
    assert gradients[0].shape == x.values.shape
    np.testing.assert_array_equal(gradients[1], 0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_eager_is_jit(backend, name):
    """Catches an operation that works, or gives its result, under jit only."""
    x, kernel = data(name)
    eager, jitted = OPERATIONS[name](x, kernel), jax.jit(OPERATIONS[name])(x, kernel)
    np.testing.assert_allclose(eager, jitted, rtol=1e-6)


@pytest.mark.crossed(5)
@pytest.mark.parametrize("over", ["x", "kernel", "both"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_vmap_of_convolutions(backend, name, over):
    """Catches mapped axes that get mixed: samples with filters, or gradients of one item in another."""
    xs, kernels = zip(*(data(name, seed) for seed in range(3)), strict=True)
    axes = (0 if over != "kernel" else None, 0 if over != "x" else None)
    chosen_xs = xs if axes[0] == 0 else [xs[0]] * 3
    chosen_kernels = kernels if axes[1] == 0 else [kernels[0]] * 3

    def both(x, kernel):
        return OPERATIONS[name](x, kernel), gradient(name)(x, kernel)

    run = jax.jit(both)
    want = stack([run(x, k) for x, k in zip(chosen_xs, chosen_kernels, strict=True)])
    got = jax.jit(jax.vmap(both, axes))(
        stack(xs) if axes[0] == 0 else xs[0], stack(kernels) if axes[1] == 0 else kernels[0]
    )
    assert_equal(got, want)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in CONVOLUTIONS])
def test_vmap(backend, name):
    """Catches a mapped axis that ends up anywhere but in front."""
    xs = [data(name, seed)[0] for seed in range(3)]

    def both(x):
        return OPERATIONS[name](x, None), jax.grad(
            lambda v: OPERATIONS[name](x.with_values(v), None).sum()
        )(x.values)

    run = jax.jit(both)
    assert_equal(jax.jit(jax.vmap(both))(stack(xs)), stack([run(x) for x in xs]))


def test_vmap_over_other_axes(backend):
    """Catches a rule that takes the mapped axis to be the first."""
    xs = stack([data("conv", seed)[0] for seed in range(3)])
    _, kernel = data("conv")
    moved = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), xs)

    def run(x):
        return OPERATIONS["conv"](x, kernel)

    got = jax.jit(jax.vmap(run, in_axes=2, out_axes=1))(moved)
    assert_equal(jnp.moveaxis(got, 1, 0), jax.jit(jax.vmap(run))(xs))


def test_nested_vmap(backend):
    """Catches rules that do not compose: samples inside filters, and a grid of samples, with gradients."""
    xs = [[data("conv", 2 * i + j)[0] for j in range(2)] for i in range(3)]
    kernels = [data("conv", i)[1] for i in range(3)]
    run = jax.jit(gradient("conv"))
    grid = stack([stack(row) for row in xs])
    got = jax.jit(jax.vmap(jax.vmap(gradient("conv"), (0, None)), (0, 0)))(grid, stack(kernels))
    want = stack([stack([run(x, k) for x in row]) for row, k in zip(xs, kernels, strict=True)])
    assert_equal(got, want)
    one = kernels[0]
    got = jax.jit(jax.vmap(jax.vmap(gradient("conv"), (0, None)), (0, None)))(grid, one)
    assert_equal(got, stack([stack([run(x, one) for x in row]) for row in xs]))


def test_vmap_over_a_cotangent_only(backend):
    """Catches a backward rule that expects its residuals mapped, as in a Jacobian."""
    x, kernel = data("conv")

    @jax.jit
    def jacobian(values, weights):
        def f(v, w):
            out = OPERATIONS["conv"](x.with_values(v), dataclasses.replace(kernel, values=w))
            return out[0].reshape(-1)

        return jax.jacrev(f, (0, 1))(values, weights)

    by_values, by_weights = jacobian(x.values, kernel.values)
    out = OPERATIONS["conv"](x, kernel)[0].reshape(-1)
    stored = np.asarray(out) != 0
    # Bilinear: both Jacobians give the response back, less the bias of 1.
    contracted = (np.asarray(by_values) * np.asarray(x.values)).sum((1, 2, 3))
    np.testing.assert_allclose(
        contracted[stored], np.asarray(out)[stored] - 1, rtol=1e-5, atol=1e-5
    )
    contracted = np.asarray(by_weights) @ np.asarray(kernel.values)
    np.testing.assert_allclose(
        contracted[stored], np.asarray(out)[stored] - 1, rtol=1e-5, atol=1e-5
    )


def test_grad_of_vmap_sums_over_the_mapped_axis(backend):
    """Catches the gradient of an unmapped filter that comes from the last item only, or one for each."""
    xs = stack([data("conv", seed)[0] for seed in range(4)])
    _, kernel = data("conv")
    f = loss("conv")

    @jax.jit
    def mapped(weights):
        return jax.grad(lambda w: jax.vmap(lambda x: f(x.values, w, x, kernel))(xs).sum())(weights)

    run = jax.jit(gradient("conv"))
    want = sum(run(jax.tree.map(lambda a, i=i: a[i], xs), kernel)[1] for i in range(4))
    assert_equal(mapped(kernel.values), want)


def network(weights, x, kernel):
    """Two convolutions with pooling, of one channel count, as a scalar."""
    kernel = dataclasses.replace(kernel, values=weights)
    for _ in range(2):
        x, _ = ilajax.conv(x, kernel, capacity=12, select="positive")
    return (ilajax.global_avg_pool(ilajax.max_pool(x, 2)) ** 2).sum()


SQUARE = samples.kernel(3, (3, 3), 2, 2, exact=False)


def test_checkpoint(backend):
    """Catches an operation whose recomputation gives another gradient."""
    x = samples.tensor(3, exact=False)
    run = jax.jit(jax.value_and_grad(network))
    again = jax.jit(jax.value_and_grad(jax.checkpoint(network)))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        again(SQUARE.values, x, SQUARE),
        run(SQUARE.values, x, SQUARE),
    )


def test_scan(backend):
    """Catches an operation that a loop cannot carry: layers of a network, and its gradient."""
    x = samples.tensor(4, exact=False)
    layers = stack([SQUARE.values, SQUARE.values * 0.5, -SQUARE.values])

    def layer(x, weights):
        kernel = dataclasses.replace(SQUARE, values=weights)
        return ilajax.conv(x, kernel, capacity=x.capacity, select="magnitude")

    def scanned(layers):
        out, responses = jax.lax.scan(layer, x, layers)
        return out.values.sum(), responses

    def unrolled(layers):
        out, responses = x, []
        for weights in layers:
            out, counts = layer(out, weights)
            responses.append(counts)
        return out.values.sum(), jnp.stack(responses)

    got = jax.jit(jax.value_and_grad(scanned, has_aux=True))(layers)
    want = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(layers)
    assert_equal(got[0][1], want[0][1])
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_cond_and_while(backend):
    """Catches an operation that control flow cannot hold."""
    x, _ = data("conv")

    @jax.jit
    def run(n):
        def step(_, x):
            return ilajax.k_select(x.map(lambda v: v + 1), x.capacity)

        looped = jax.lax.fori_loop(0, n, step, x)
        return jax.lax.cond(n > 2, lambda: looped, lambda: x)

    np.testing.assert_array_equal(run(3).values, jnp.where(x.keys < 30, x.values + 3, 0))
    np.testing.assert_array_equal(run(1).values, x.values)


@pytest.mark.crossed(5)
@pytest.mark.parametrize("name", OPERATIONS)
def test_bounded_retracing(backend, name):
    """Catches an operation that traces again when the contents change, and not only the shapes."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(x, kernel):
        return OPERATIONS[name](x, kernel)

    for seed in range(4):
        run(*data(name, seed))


@pytest.mark.crossed(5)
@pytest.mark.parametrize("name", OPERATIONS)
def test_two_runs_give_the_same_bits(backend, name):
    """Catches sums whose order depends on scheduling."""
    x, kernel = data(name)
    x = x.with_values(
        jnp.where(x.keys < 30, jax.random.normal(jax.random.key(0), x.values.shape), 0)
    )
    run = jax.jit(lambda x, k: (OPERATIONS[name](x, k), gradient(name)(x, k)))
    first = run(x, kernel)
    for _ in range(5):
        assert_equal(run(x, kernel), first)


# --- Other processes -------------------------------------------------------------------------------


def python(*arguments, threads=None, devices=None, backend="native"):
    """Runs a script of this folder on the CPU and returns what it printed."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", ILAJAX_BACKEND=backend)
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
    if threads:
        environment["NPROC"] = str(threads)  # the size of XLA's thread pool
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif("cpu" not in routes.native_platforms(), reason="no kernels for the CPU")
def test_the_number_of_threads_does_not_show():
    """Catches sums, or cuts through a problem, that depend on how many threads there are."""
    printed = {python(HERE / "digest.py", threads=n) for n in (1, 2, 7)}
    assert len(printed) == 1
    assert len(json.loads(printed.pop())) > 5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_several_devices(backend, kind, request):
    """Catches what goes wrong on several devices only; sharding.py says what, check by check."""
    chosen = []
    if backend == "reference" and not request.config.getoption("--full"):
        # It compiles for minutes, and JAX shards its plain jax.numpy.
        chosen = ["check_plain_jit_to_dense", "check_plain_jit_gradients_submanifold"]
        if kind == "Auto":
            chosen.append("check_gradients_of_replicated_weights")
    printed = python(HERE / "sharding.py", kind, *chosen, devices=4, backend=backend)
    results = json.loads(printed.splitlines()[-1])
    failed = {name: error for name, error in results.items() if error}
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
    assert len(results) >= len(chosen or [0])
