"""The comparison of the CPU convolution's forms, on a small layer."""

import json

import jax
import numpy as np
import pytest

from benchmarks import dense_form
from ilajax.ffi import plans, routes

CASE = dense_form.Case(6, 8, "random", 0.5, 0.2)

pytestmark = pytest.mark.skipif(
    "cpu" not in routes.native_platforms(), reason="no kernels for the CPU"
)


def test_all_forms_compute_the_same():
    """Catches a way that times another function, or a patch of the plan that does not reach the kernel."""
    calls = dense_form.candidates(dense_form.make_layer(CASE))
    for direction in ("forward", "backward"):
        without, dense, chosen = (
            jax.tree.leaves(calls[direction, way]()) for way in dense_form.WAYS
        )
        for other in (dense, chosen):
            for one, two in zip(without, other, strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_the_ways_are_other_programs():
    """Catches three times the same plan."""
    texts = set()
    for tuning in dense_form.WAYS.values():
        with plans.tuned("cpu", **tuning):
            layer = dense_form.make_layer(CASE)
            jax.clear_caches()
            texts.add(jax.jit(layer.function).lower(*layer.operands).as_text())
    assert len(texts) == len(dense_form.WAYS)


def test_it_measures_and_writes(tmp_path):
    """Catches a report without its figures."""
    records = dense_form.main(["--budget", "0.01", "--report", str(tmp_path)], [CASE])
    assert [record["direction"] for record in records] == ["forward", "backward"]
    assert all(record[way] > 0 for record in records for way in dense_form.WAYS)
    assert json.loads((tmp_path / "dense_form.json").read_text())["records"] == records
    assert CASE.name in (tmp_path / "dense_form.md").read_text()
