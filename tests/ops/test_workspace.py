"""The workspace of every call: as large as what the kernel carves out of it, and no byte larger."""

import contextlib
import functools

import jax
import pytest

from ilajax import check
from ilajax.ffi import plans, routes

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


def elements(case):
    return sum(a.size for a in jax.tree.leaves(case.operands))


def smallest(operation, count=2):
    """The smallest cases of `python -m ilajax check`."""
    return sorted((c for c in check.cases() if c.operation == operation), key=elements)[:count]


def test_what_is_allocated_is_what_is_carved(backend, operation, monkeypatch):
    """Catches a plan with bytes that no kernel uses, and a kernel that goes by other sizes than its plan."""
    if backend == "reference":
        pytest.skip("has no workspace")
    for case in smallest(operation):
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
    (case,) = smallest(operation, 1)
    sizes = {}

    def count(platform, target, *problem, make=plans.plan):
        plan = make(platform, target, *problem)
        sizes[target] = 0 if plan is None else plan.numbers.size
        if operation == "submanifold" and plan.numbers[0] > 0:
            sizes[target] = min(6, plan.numbers.size)  # by products: a CPU's others are the lines'
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
