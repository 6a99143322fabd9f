"""The check of the kernels: what it compares, and that it sees what is wrong."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

import ilajax
from ilajax import check
from ilajax.ffi import routes

native = pytest.mark.skipif(not routes.native_platforms(), reason="no kernels are installed")


def test_every_kernel_is_compared():
    """Catches an operation, a dtype or a rank that the check passes over."""
    found = check.cases()
    assert {case.operation for case in found} == set(routes.OPERATIONS)
    dtypes = {jax.tree.leaves(case.operands[0])[-1].dtype.name for case in found}
    assert dtypes == {"float32", "bfloat16", "float16"}
    ranks = {len(c.operands[0].spatial_shape) for c in found if c.operation == "conv"}
    assert ranks == {1, 2, 3, 4}


@native
def test_a_wrong_kernel_is_seen(monkeypatch):
    """Catches a comparison that compares nothing: here the kernel's way adds one to a number."""

    def function(x, _):
        wrong = 1.0 if routes.choice() == "native" else 0.0
        return ilajax.to_dense(x).at[0, 2, 0].add(wrong)

    x = ilajax.SparseTensor(jnp.array([[[1, 4]]]), jnp.ones((1, 1, 2)), (6,))
    assert (
        check.compare(check.Case("to_dense", "", lambda x, _: ilajax.to_dense(x), (x, None))) == ""
    )
    said = check.compare(check.Case("to_dense", "", function, (x, None)))
    assert said.startswith("1 of 6 numbers of a float32[1, 6, 1] differ; at (0, 2, 0)")


@native
@pytest.mark.nans
@pytest.mark.parametrize("exact", [True, False])
def test_a_nan_is_seen(exact):
    """Catches a NaN that passes for a zero."""

    def function(x, _):
        return ilajax.to_dense(x).at[0, 2, 0].add(jnp.nan if routes.choice() == "native" else 0.0)

    x = ilajax.SparseTensor(jnp.array([[[1, 4]]]), jnp.ones((1, 1, 2)), (6,))
    case = check.Case("to_dense", "", function, (x, None), exact=exact)
    assert "the kernel has nan, the reference 0.0" in check.compare(case)


@native
def test_a_wrong_gradient_is_seen():
    """Catches a comparison of results only."""

    def function(x, _):
        factor = 2.0 if routes.choice() == "native" else 1.0
        stopped = jax.lax.stop_gradient(x.values)
        return stopped + factor * (x.values - stopped)

    x = ilajax.SparseTensor(jnp.array([[[1, 4]]]), jnp.ones((1, 1, 2)), (6,))
    assert "differ" in check.compare(check.Case("to_dense", "", function, (x, None)))


@native
def test_the_command(monkeypatch):
    """Catches a check that fails on this machine, or says nothing."""
    monkeypatch.setattr(check, "_COMMAND", "from ilajax import check; check.cases = lambda: "
                        "[*check._dense_cases()]; check.run()")  # fmt: skip
    assert check.supervise() == 0


def test_a_hang_is_stopped(monkeypatch, capfd):
    """Catches a kernel that hangs, in the middle of a line as all do, and takes the check with it."""
    script = (
        "import time; print('begun', flush=True); time.sleep(1);"
        "print('  conv ', end='', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(check, "_COMMAND", script)
    start = time.monotonic()
    assert check.supervise(limit=5) == 1
    assert time.monotonic() - start < 30
    said = capfd.readouterr().out
    assert said.startswith("begun\n  conv ")
    assert "FAILED: stopped after 5 s, in: conv" in said


def test_a_crash_is_told(monkeypatch):
    """Catches a process that ends in a signal and counts as passed."""
    monkeypatch.setattr(check, "_COMMAND", "import os; os.abort()")
    assert check.supervise() != 0


def test_nothing_to_check():
    """Catches a check without kernels that passes."""
    script = (
        "import sys; sys.modules['ilajax._cpu'] = None\n"
        "from ilajax import check; check.run()"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED: nothing to check" in done.stdout
