"""The workspace of every call: as large as what the kernel carves out of it, and no byte larger."""

import functools

import jax
import jax.numpy as jnp
import pytest

import ilajax
import samples
from ilajax.ffi import plans

GRID = (6, 7, 5)


def conv(x, **options):
    kernel = samples.kernel(0, (3, 3, 3), x.channels, 9)
    return ilajax.conv(x, kernel, jnp.ones(9), **options).features.values


CALLS = {
    "conv": lambda x, _: conv(x, capacity=20),
    "submanifold": lambda _, shared: conv(shared, support="input"),
    "max_pool": lambda x, _: ilajax.max_pool(x, 2).values,
    "max_pool-cut": lambda x, _: ilajax.max_pool(x, 2, capacity=3).values,
    "avg_pool-shared": lambda _, shared: ilajax.avg_pool(shared, 2).values,
    "k_select": lambda x, _: ilajax.k_select(x, 4).values,
    "from_dense": lambda x, _: ilajax.from_dense(ilajax.to_dense(x), 9).values,
}


def run(call, batch, dtype):
    x, shared = (
        samples.tensor(1, batch, 4, GRID, capacity=60, density=0.3, dtype=dtype, shared=shared)
        for shared in (False, True)
    )

    def loss(values, shared_values):
        out = call(x.with_values(values), shared.with_values(shared_values))
        return jnp.sum(out.astype(jnp.float32))

    return jax.block_until_ready(jax.grad(loss, (0, 1))(x.values, shared.values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_allocated_is_what_is_carved(backend, name, batch, dtype, monkeypatch):
    """Catches a plan with bytes that no kernel uses, and a kernel that goes by other sizes than its plan."""
    if backend == "reference":
        pytest.skip("has no workspace")
    allocated = {}

    def record(platform, target, *problem, short_of=None, make=plans.plan):
        plan = make(platform, target, *problem)
        if plan is None:
            return None
        allocated[target] = plan.workspace
        return plan._replace(workspace=plan.workspace - (target == short_of))

    monkeypatch.setattr(plans, "plan", record)
    run(CALLS[name], batch, dtype)
    assert allocated
    for target, size in dict(allocated).items():
        if size == 0:
            continue
        monkeypatch.setattr(plans, "plan", functools.partial(record, short_of=target))
        said = f"the workspace has {size - 1} bytes, but needs {size}"
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            run(CALLS[name], batch, dtype)
