"""Checks on four devices, run by test_ffi.py in a process of its own: prints {check: error or null}.

They run on a mesh of Auto axes, or on one of Explicit axes, which is what `jax.make_mesh` makes: the first
argument says which. More arguments name the checks to run; without any, all are.
"""

import dataclasses
import functools
import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ilajax
import samples
import sharding_shard_map
from four_devices import (
    BATCH,
    BIAS,
    GRID,
    KERNEL,
    KIND,
    chain,
    close,
    context,
    conv,
    mesh,
    split,
    submanifold_total,
    tensor,
    total,
)


def no_gather(f, *arguments):
    """f's result from a program that moves no samples between devices."""
    compiled = jax.jit(f).lower(*arguments).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        found = re.findall(rf".*{collective}.*", text)
        assert not found, f"{collective} in the compiled program: {found[0][:300]}"
    return compiled(*arguments)


def check_plain_jit_does_not_gather():
    """Catches a batch that is gathered around a custom call, and results of the wrong shards."""
    x = tensor(7)
    got = no_gather(chain, split(x), KERNEL.values, BIAS)
    assert got.sharding.spec == P("data") or got.sharding.spec == P("data", None), got.sharding
    close(got, jax.jit(chain)(x, KERNEL.values, BIAS))


def check_plain_jit_to_dense():
    """Catches a batch that is gathered in a conversion."""
    x = tensor(17)
    dense = no_gather(ilajax.to_dense, split(x))
    close(dense, jax.jit(ilajax.to_dense)(x))
    close(no_gather(lambda d: ilajax.from_dense(d, 4), split(dense)), ilajax.from_dense(dense, 4))


def check_plain_jit_gradients():
    """Catches weight gradients of one shard only, and a batch that is gathered for the backward pass."""
    x = tensor(8)
    want = jax.jit(jax.grad(total, (0, 1)))(KERNEL.values, BIAS, x)
    close(no_gather(jax.grad(total, (0, 1)), KERNEL.values, BIAS, split(x)), want)


def check_plain_jit_gradients_submanifold():
    """Catches the same under support="input"."""
    x = tensor(9, shared=True)
    want = jax.jit(jax.grad(submanifold_total, (0, 1)))(KERNEL.values, BIAS, x)
    close(no_gather(jax.grad(submanifold_total, (0, 1)), KERNEL.values, BIAS, split(x)), want)


def check_plain_jit_gradients_onto_a_support():
    """Catches the same, or a support that is gathered, where a convolution goes to given sites."""
    x, support = tensor(27, shared=True), tensor(28, shared=True)

    def f(weights, x, support):
        kernel = dataclasses.replace(KERNEL, values=weights)
        return (ilajax.conv(x, kernel, support=support).features.values ** 2).sum()

    want = jax.jit(jax.grad(f))(KERNEL.values, x, support)
    close(no_gather(jax.grad(f), KERNEL.values, split(x), split(support)), want)


def check_plain_jit_gradients_of_values():
    """Catches cotangents of the features that end up on another device."""
    x = tensor(10)

    def f(x):
        return jax.grad(lambda v: total(KERNEL.values, BIAS, x.with_values(v)))(x.values)

    close(no_gather(f, split(x)), jax.jit(f)(x))


def check_plain_jit_of_vmap():
    """Catches a mapped, sharded batch: four devices, two samples each, one by one."""
    x = tensor(11)
    ones = jax.tree.map(lambda a: a[:, None], x)
    f = jax.vmap(chain, (0, None, None))
    close(jax.jit(f)(split(ones), KERNEL.values, BIAS), jax.jit(f)(ones, KERNEL.values, BIAS))

    def g(weights, x):
        return jax.grad(lambda w: (f(x, w, BIAS) ** 2).sum())(weights)

    close(jax.jit(g)(KERNEL.values, split(ones)), jax.jit(g)(KERNEL.values, ones))


def check_unsharded_input_on_several_devices():
    """Catches an operation that needs a mesh as soon as there are several devices."""
    x = tensor(12)
    close(
        jax.jit(jax.value_and_grad(total))(KERNEL.values, BIAS, x),
        jax.value_and_grad(total)(KERNEL.values, BIAS, x),
    )


def check_replicated_input_in_plain_jit():
    """Catches samples that are counted once for each device."""
    x = tensor(13)
    everywhere = jax.device_put(x, NamedSharding(mesh(), P()))
    want = jax.jit(jax.value_and_grad(total))(KERNEL.values, BIAS, x)
    close(jax.jit(jax.value_and_grad(total))(KERNEL.values, BIAS, everywhere), want)


def check_a_batch_that_does_not_divide():
    """Catches a constraint on the batch where nothing is sharded."""
    x = samples.tensor(14, 3, 2, GRID)
    close(jax.jit(chain)(x, KERNEL.values, BIAS), chain(x, KERNEL.values, BIAS))


def check_two_mesh_axes():
    """Catches a batch over two mesh axes, gradients included."""
    x = tensor(15)
    want = jax.jit(jax.grad(total, (0, 1)))(KERNEL.values, BIAS, x)
    square = mesh((2, 2), ("a", "b"))
    placed = jax.device_put(x, NamedSharding(square, P(("a", "b"))))
    half = jax.device_put(x, NamedSharding(square, P("b")))
    with context(square):
        close(no_gather(jax.grad(total, (0, 1)), KERNEL.values, BIAS, placed), want)
        close(jax.jit(jax.grad(total, (0, 1)))(KERNEL.values, BIAS, half), want)


def sums(x, y):
    """What adds and joins feature maps, [B, C]."""
    x = ilajax.concatenate([x + y, 2 * x - y])
    return ilajax.global_avg_pool(x, over="stored") + x.density.mean()


def check_sums_and_joins():
    """Catches a batch that is gathered to find the union of two supports."""
    for shared in (False, True):
        x, y = tensor(18, shared=shared), tensor(19, shared=shared)
        close(no_gather(sums, split(x), split(y)), jax.jit(sums)(x, y))

        def f(x, y):
            return jax.grad(lambda v: (sums(x.with_values(v), y) ** 2).sum())(x.values)

        close(no_gather(f, split(x), split(y)), jax.jit(f)(x, y))


def check_windows_and_upsampling():
    """Catches a batch that is gathered to go down by windows that overlap, and up again."""

    def down_and_up(x):
        y = ilajax.max_pool(x, 3, strides=2)
        return ilajax.upsample(y, 2), ilajax.upsample(y, 2, support=x)

    for shared in (False, True):
        x = tensor(20, shared=shared)
        close(no_gather(down_and_up, split(x)), jax.jit(down_and_up)(x))

        def f(x):
            values = lambda v: [y.values for y in down_and_up(x.with_values(v))]  # noqa: E731
            return jax.grad(lambda v: sum((y**2).sum() for y in values(v)))(x.values)

        close(no_gather(f, split(x)), jax.jit(f)(x))


def check_keys_that_all_samples_have():
    """Catches values that are gathered, or an error, where the keys are a constant, or on every device."""
    y = tensor(23, shared=True)

    def f(keys, values):
        x = ilajax.SparseTensor(keys, values, GRID)
        other = ilajax.concatenate([x, x + y, ilajax.k_select(x, 20)])
        return chain(x, KERNEL.values, BIAS) + ilajax.global_max_pool(x * 2)[:, :1], other.values

    def g(keys, values):
        return jax.grad(lambda v: sum((a**2).sum() for a in f(keys, v)))(values)

    x = tensor(22, shared=True)
    everywhere = jax.device_put(x.keys, NamedSharding(mesh(), P()))
    close(no_gather(f, everywhere, split(x.values)), jax.jit(f)(x.keys, x.values))
    want = jax.jit(g)(x.keys, x.values)
    close(no_gather(g, everywhere, split(x.values)), want)
    constant = functools.partial(g, np.asarray(x.keys))
    close(jax.jit(constant)(split(x.values)), want)
    close(jax.jit(g)(x.keys, split(x.values)), want)
    close(jax.jit(g)(split(x.keys), x.values), want)


def check_a_mesh_that_no_argument_names():
    """Catches a program that compiles only where an argument lies on the mesh of `jax.set_mesh`."""
    x = tensor(24)
    run = jax.jit(jax.value_and_grad(total))
    want = run(KERNEL.values, BIAS, x)
    with jax.set_mesh(mesh()):
        close(run(KERNEL.values, BIAS, x), want)

        def inside(weights, bias, x):
            x = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, P("data")), x)
            return jax.value_and_grad(total)(weights, bias, x)

        if KIND is AxisType.Auto:
            close(jax.jit(inside)(KERNEL.values, BIAS, x), want)


def read_at(points):
    """A map made of points, and read beside them."""
    x = ilajax.from_points(points, 1.0 * points, spatial_shape=GRID, capacity=9)
    return x, ilajax.sample(x, points + 0.8, method="linear")


def check_step_by_step_without_a_mesh_around():
    """Catches operations that find the mesh of their arguments under `jit` or `jax.set_mesh` alone."""
    x, y = tensor(25, shared=True), tensor(26, shared=True)
    points = jnp.asarray(np.random.default_rng(26).integers(0, 5, (BATCH, 9, 2)), jnp.int32)

    def operations(x, y, points):
        return conv(x, KERNEL.values, BIAS), ilajax.k_select(x, 3), x + y, read_at(points)

    want = jax.jit(operations)(x, y, points)
    if KIND is AxisType.Explicit:
        with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
            close(operations(*split((x, y, points))), want)
            close(split(x) + y, want[2])


def check_points():
    """Catches points that are gathered on their way into a grid, and out of it."""
    rng = np.random.default_rng(20)
    places = jnp.asarray(rng.integers(0, 5, (BATCH, 30, 2)), jnp.int32)
    features = jnp.asarray(rng.normal(size=(BATCH, 30, 2)), jnp.float32)

    def f(places, features):
        x, slots = ilajax.from_points(
            places, features, spatial_shape=GRID, capacity=20, return_slots=True
        )
        read = ilajax.sample(x, places + 0.3, method="linear")
        return x, slots, read, x.coordinates()

    def g(places, features):
        return jax.grad(lambda features: (f(places, features)[2] ** 2).sum())(features)

    for program in (f, g):
        want = jax.jit(program)(places, features)
        close(no_gather(program, split(places), split(features)), want)


def check_one_list_of_points():
    """Catches a list of points that is gathered, or dropped, though its type says that it is sharded."""
    if KIND is AxisType.Explicit:
        places, index = split((jnp.zeros((16, 2), jnp.int32), jnp.zeros(16, jnp.int32)))
        options = {"spatial_shape": GRID, "batch_size": 1, "capacity": 3}
        with pytest.raises(ValueError, match=r"sharded over 'data'.*\[B, N, d\]"):
            jax.jit(lambda c, i: ilajax.from_points(c, 1.0 * c, i, **options))(places, index)
        with pytest.raises(ValueError, match="x is sharded over 'data'"):
            ilajax.sample(split(tensor()), jnp.ones((3, 2)), jnp.zeros(3, int))


def net(axis_name=None):
    """Two sparse layers, of which one cuts, and a dense one."""
    rngs = nnx.Rngs(0)
    options = {"axis_name": axis_name, "rngs": rngs}
    return nnx.Sequential(
        ilajax.nn.Conv(2, 3, (3, 3), density_bound=0.2, **options),
        ilajax.nn.MaxPool(2),
        ilajax.nn.Conv(3, 4, (3, 3), density_bound=0.9, **options),
        ilajax.global_avg_pool,
        nnx.Linear(4, 3, rngs=rngs),
    )


def optimizer_of(net):
    recipe = ilajax.optim.sparse_training(net, optax.sgd(0.1), scale=0.1, b1=0.2, threshold=0.05)
    return nnx.Optimizer(net, recipe, wrt=nnx.Param)


def train_step(net, optimizer, x, labels, mean=lambda loss: loss):
    def loss_of(net):
        wanted = jax.nn.one_hot(labels, 3)
        return mean(optax.softmax_cross_entropy(net(x), wanted).mean())

    loss, gradients = nnx.value_and_grad(loss_of)(net)
    excess = ilajax.optim.excess_density(net)
    optimizer.update(net, gradients, excess_density=excess, epoch_end=True)
    return loss


def trained(step, net, x, labels):
    """Losses of three steps, and all variables behind them: weights, keys, densities."""
    optimizer = optimizer_of(net)
    losses = [step(net, optimizer, x, labels) for _ in range(3)]
    return losses, nnx.to_pure_dict(nnx.state(net))


X, LABELS = tensor(21), jnp.arange(BATCH) % 3


@functools.cache
def on_one_device():
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        return trained(nnx.jit(train_step), net(), X, LABELS)


def check_a_training_step():
    """Catches losses, weights or densities that differ from one device's, and a gathered batch."""
    placed = split((X, LABELS))
    model = net()
    graph, state = nnx.split((model, optimizer_of(model)))

    def step(state, x, labels):
        modules = nnx.merge(graph, state)
        return train_step(*modules, x, labels), nnx.state(modules)

    no_gather(step, split(state, P()), *placed)
    close(trained(nnx.jit(train_step), net(), *placed), on_one_device())


def check_a_training_step_in_shard_map():
    """Catches densities of one device only, and gradients that are counted once for each."""
    mean = functools.partial(jax.lax.pmean, axis_name="data")

    def mapped(model, optimizer, x, labels):
        everywhere = nnx.StateSharding({...: P()})
        return nnx.shard_map(
            functools.partial(train_step, mean=mean),
            mesh=mesh(),
            in_specs=(everywhere, everywhere, P("data"), P("data")),
            out_specs=P(),
        )(model, optimizer, x, labels)

    close(trained(nnx.jit(mapped), net("data"), *split((X, LABELS))), on_one_device())


def main():
    assert jax.device_count() == 4, "run with XLA_FLAGS=--xla_force_host_platform_device_count=4"
    checks = vars(sharding_shard_map) | globals()
    results = {}
    for name in sys.argv[2:] or [name for name in checks if name.startswith("check_")]:
        try:
            with context(mesh()):
                checks[name]()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
