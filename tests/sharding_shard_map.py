"""The checks of sharding.py inside `jax.shard_map`, where types say what differs between devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import ilajax
from four_devices import (
    BIAS,
    KERNEL,
    chain,
    close,
    conv,
    mesh,
    split,
    submanifold_total,
    tensor,
    total,
)


def check_shard_map_forward():
    """Catches shards that see another's samples."""
    x = tensor()
    run = jax.jit(
        jax.shard_map(chain, mesh=mesh(), in_specs=(P("data"), P(), P()), out_specs=P("data"))
    )
    close(run(split(x), KERNEL.values, BIAS), jax.jit(chain)(x, KERNEL.values, BIAS))


def gradients_in_shard_map(loss, x):
    """The gradient of a mean over devices, without any pcast of the user's."""

    def step(weights, bias, x):
        def mean(weights, bias):
            return jax.lax.psum(loss(weights, bias, x), "data")

        return jax.grad(mean, (0, 1))(weights, bias)

    sharded = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    return jax.jit(sharded)(KERNEL.values, BIAS, split(x))


def check_gradients_of_replicated_weights():
    """Catches a weight gradient of one shard only, or a sum counted four times."""
    x = tensor(1)
    want = jax.jit(jax.grad(total, (0, 1)))(KERNEL.values, BIAS, x)
    close(gradients_in_shard_map(total, x), want)


def check_gradients_of_replicated_weights_submanifold():
    """Catches the same under support="input"."""
    x = tensor(2, shared=True)
    want = jax.jit(jax.grad(submanifold_total, (0, 1)))(KERNEL.values, BIAS, x)
    close(gradients_in_shard_map(submanifold_total, x), want)


def check_gradient_without_psum():
    """Catches a local loss whose gradient with respect to replicated weights is not summed over devices."""
    x = tensor(3)

    def step(weights, x):
        return jax.grad(lambda w: total(w, BIAS, x))(weights)

    got = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P()))(
        KERNEL.values, split(x)
    )
    close(got, jax.jit(jax.grad(total))(KERNEL.values, BIAS, x))


def false_out_specs(f):
    """Fails unless JAX refuses to return device-dependent data of f as if it were replicated."""
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=P("data"), out_specs=P()))(split(tensor()))


def check_false_out_specs_of_conv():
    """Catches results of a custom call that lose their varying type."""
    false_out_specs(lambda x: conv(x, KERNEL.values, BIAS))


def check_false_out_specs_of_k_select():
    """Catches the same in k_select."""
    false_out_specs(lambda x: ilajax.k_select(x, 3))


def check_false_out_specs_of_pooling():
    """Catches the same in pooling."""
    false_out_specs(lambda x: (ilajax.max_pool(x, 2), ilajax.avg_pool(x, 2)))


def check_false_out_specs_of_to_dense():
    """Catches the same in to_dense."""
    false_out_specs(ilajax.to_dense)


def check_false_out_specs_of_from_dense():
    """Catches the same in from_dense."""
    false_out_specs(lambda x: ilajax.from_dense(x.values, 3))


def check_false_out_specs_of_submanifold():
    """Catches the same under support="input"."""

    def f(x):
        shared = ilajax.SparseTensor(x.keys[:, :1], x.values, x.spatial_shape)
        return conv(shared, KERNEL.values, BIAS, capacity=None, select=None, support="input")

    false_out_specs(f)


def check_replicated_data_stays_replicated():
    """Catches a cast to varying where nothing varies, so that a true out_specs=P() is refused."""
    x = tensor(4)
    run = jax.jit(jax.shard_map(chain, mesh=mesh(), in_specs=(P(), P(), P()), out_specs=P()))
    close(run(x, KERNEL.values, BIAS), jax.jit(chain)(x, KERNEL.values, BIAS))


def check_vmap_inside_shard_map():
    """Catches a mapped axis and a mesh axis that get in each other's way."""
    xs = jax.tree.map(lambda *a: jnp.stack(a), tensor(5), tensor(6))
    f = jax.vmap(chain, (0, None, None))
    run = jax.jit(
        jax.shard_map(
            f, mesh=mesh(), in_specs=(P(None, "data"), P(), P()), out_specs=P(None, "data")
        )
    )
    placed = split(xs, P(None, "data"))
    close(run(placed, KERNEL.values, BIAS), jax.jit(f)(xs, KERNEL.values, BIAS))
