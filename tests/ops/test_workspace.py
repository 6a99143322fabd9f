"""The workspace of every call: as large as what the kernel carves out of it, and no byte larger."""

import functools

import jax
import pytest

from ilajax import check
from ilajax.ffi import plans, routes


def elements(case):
    return sum(a.size for a in jax.tree.leaves(case.operands))


def smallest(operation, count=3):
    """The smallest cases of `python -m ilajax check`."""
    return sorted((c for c in check.cases() if c.operation == operation), key=elements)[:count]


@pytest.mark.parametrize("operation", routes.OPERATIONS)
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
