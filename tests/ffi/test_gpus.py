"""Which GPUs the kernels fit."""

import types

import pytest

from ffi.fakes import extension
from ilajax.ffi import gpus, registry


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (("90-real",), "9.0", True),
        (("80-real",), "8.6", True),
        (("86-real",), "8.0", False),
        (("80-real",), "9.0", False),
        (("80-real", "90-real", "100-real", "120"), "7.5", False),
        (("120",), "12.1", True),
        (("90",), "10.0", True),
        (("90-virtual",), "10.3", True),
        (("100-virtual",), "9.0", False),
        (("90a-real",), "9.0", True),
        ((), "9.0", False),
    ],
)
def test_runs_on(built, capability, runs):
    """Catches machine code that is taken to run on another generation, or PTX on an older one."""
    assert gpus.runs_on(built, capability) == runs


def test_the_smallest_shared_memory_counts(monkeypatch):
    """Catches a plan for the larger of two GPUs that the smaller one cannot run."""
    module = types.SimpleNamespace(devices=lambda: [{"max_shared": 232448}, {"max_shared": 101376}])
    monkeypatch.setitem(registry.extensions, "cuda", extension(module))
    assert gpus.shared_memory() == 101376
