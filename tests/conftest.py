"""Fixtures of the whole suite: the backends, and NaN as an error."""

import jax
import pytest

from ilajax import _ffi


def pytest_configure(config):
    config.addinivalue_line("markers", "nans: NaN is expected here, so it does not raise")


def pytest_generate_tests(metafunc):
    # test_ffi.py says where kernels must be installed.
    native = ["native"] if _ffi.native_platforms() else []
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [*native, "reference"], indirect=True)
    if "native" in metafunc.fixturenames:
        metafunc.parametrize("native", native, indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that a test runs on, each in turn: "native" where kernels are installed, "reference".

    It is read at trace time: jit a fresh function in each test, or keep one for each backend.
    """
    # "native" raises where a kernel is missing; "auto" would quietly run the reference.
    monkeypatch.setenv("ILAJAX_BACKEND", request.param)
    return request.param


@pytest.fixture
def native(request, monkeypatch):
    """As `backend`, without the reference."""
    monkeypatch.setenv("ILAJAX_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _nans_raise(request):
    """A NaN that no test expects raises where it arises."""
    with jax.debug_nans(request.node.get_closest_marker("nans") is None):
        yield
