"""The workspace of every call: as large as what the kernel carves out of it, and no byte larger."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

import ilajax
import samples
from ilajax import check
from ilajax.ffi import plans, routes

GRID, COARSE = (9, 8), (5, 4)
STRIDE = {"strides": 2}


def cases():
    """Two small calls of each operation with what they are called on, for a machine that runs them slowly."""
    own, shared = (samples.tensor(n, 2, 2, GRID, capacity=20, shared=n == 1) for n in (0, 1))
    wide = samples.tensor(2, 3, 9, GRID, capacity=30, shared=True, dtype="bfloat16")
    coarse = samples.tensor(3, 3, 1, COARSE, capacity=12, shared=True)
    narrow_filter, wide_filter = (samples.kernel(0, (3, 3), *c) for c in ((2, 3), (9, 17)))
    by_site = {"capacity": 7, "select_by": "site"}
    back = functools.partial(ilajax.conv_transpose, **STRIDE, output_shape=GRID)
    dense = jnp.asarray(samples.integers(1, (2, *GRID, 3), "float32"))
    calls = {
        "conv": [
            (lambda x, k: ilajax.conv(x, k, capacity=9), own, narrow_filter),
            (lambda x, k: ilajax.conv(x, k, capacity=40, **STRIDE), wide, wide_filter),
        ],
        "conv_at": [
            (lambda x, k: ilajax.conv(x, k, support=coarse, **STRIDE), wide, wide_filter),
            (lambda x, k: ilajax.conv(x, k, support=shared), shared, narrow_filter),
        ],
        "conv_by_site": [
            (lambda x, k: ilajax.conv(x, k, **by_site), shared, narrow_filter),
            (lambda x, k: back(x, k, **by_site), coarse, samples.kernel(1, (3, 3), 1, 9)),
        ],
        "submanifold": [
            (lambda x, k: ilajax.conv(x, k, support="input"), shared, narrow_filter),
            (lambda x, k: ilajax.conv(x, k, support="input"), wide, wide_filter),
        ],
        "k_select": [
            (lambda x, _: ilajax.k_select(x, 5), own, None),
            (lambda x, _: ilajax.k_select(x, 50), wide, None),
        ],
        "from_dense": [
            (lambda x, _: ilajax.from_dense(x, 6), dense, None),
            (lambda x, _: ilajax.from_dense(x, 90), dense, None),
        ],
        "to_dense": [(lambda x, _: ilajax.to_dense(x), x, None) for x in (own, shared)],
        "pool": [
            (lambda x, _: ilajax.max_pool(x, 2, capacity=4), own, None),
            (lambda x, _: ilajax.avg_pool(x, 3, **STRIDE), wide, None),
        ],
    }
    return {
        operation: [check.Case(operation, "", function, (x, k)) for function, x, k in two]
        for operation, two in calls.items()
    }


# What is called, and how it is planned: narrow submanifold convolutions go by lines otherwise.
CALLS = {operation: (operation, {}) for operation in routes.OPERATIONS} | {
    "submanifold-products": ("submanifold", {"products": 0})
}


@pytest.fixture(params=CALLS)
def operation(request):
    """An operation, one after the other, with the plans of its forms."""
    name, numbers = CALLS[request.param]
    with plans.tuned("cpu", **numbers):
        yield name


def test_what_is_allocated_is_what_is_carved(backend, operation, monkeypatch):
    """Catches a plan with bytes that no kernel uses, and a kernel that goes by other sizes than its plan."""
    if backend == "reference":
        pytest.skip("has no workspace")
    for case in cases()[operation]:
        allocated = {}

        def record(platform, target, *problem, short_of=None, make=plans.plan, allocated=allocated):
            plan = make(platform, target, *problem)
            if plan is None:
                return None
            allocated[target] = plan.workspace
            return plan._replace(workspace=plan.workspace - (target == short_of))

        with monkeypatch.context() as patch:
            patch.setattr(plans, "plan", record)
            check.results(case, "native")
            for target, size in dict(allocated).items():
                if size == 0:
                    continue
                patch.setattr(plans, "plan", functools.partial(record, short_of=target))
                said = f"the workspace has {size - 1} bytes, but needs {size}"
                with pytest.raises(jax.errors.JaxRuntimeError, match=said):
                    check.results(case, "native")


@pytest.mark.nans
def test_a_plan_from_outside(backend, operation, monkeypatch):
    """Catches a crash where an exported program has other numbers in a plan than Python would pass."""
    if backend == "reference":
        pytest.skip("has no plan")
    case = cases()[operation][0]
    sizes = {}

    def count(platform, target, *problem, make=plans.plan):
        plan = make(platform, target, *problem)
        sizes[target] = 0 if plan is None else plan.numbers.size
        if operation == "submanifold" and plan.numbers[0] > 0:
            sizes[target] = min(7, plan.numbers.size)  # by products: a CPU's others are the lines'
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(plans, "plan", count)
        check.results(case, "native")
    for target, index, number in (
        (target, index, number)
        for target, size in sizes.items()
        for index in range(size)
        for number in (-1, 0, 2**31 - 1, 2**62)
    ):

        def changed(platform, name, *problem, make=plans.plan, at=(target, index, number)):
            plan = make(platform, name, *problem)
            if name == at[0]:
                plan.numbers[at[1]] = at[2]
            return plan

        with monkeypatch.context() as patch:
            patch.setattr(plans, "plan", changed)
            # An error, or a plan that happens to do as well.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                check.results(case, "native")
