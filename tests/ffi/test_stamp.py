"""Stamps of checked GPUs."""

import json

import pytest

from ffi.fakes import cuda_module, extension, gpu
from ilajax.ffi import registry, stamp


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that sets what a stamp holds for: GPU, driver, kernels, JAX."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def change(kinds=("NVIDIA H100",), driver=13000, kernels=b"kernels", jax="0.10.2"):
        library = tmp_path / kernels.decode()
        library.write_bytes(kernels)
        module = cuda_module(library, driver=driver)
        monkeypatch.setitem(registry.extensions, "cuda", extension(module))
        monkeypatch.setattr(stamp.jax, "devices", lambda platform=None: [gpu(k) for k in kinds])
        monkeypatch.setattr(stamp.jax, "__version__", jax)

    change()
    return change


@pytest.mark.parametrize(
    "changed",
    [{"kinds": ("NVIDIA L4",)}, {"driver": 13010}, {"kernels": b"newer"}, {"jax": "0.11.0"}],
    ids=str,
)
def test_a_stamp_holds_for_what_was_checked(machine, changed):
    """Catches a stamp that outlives the GPU, the driver, the build or the JAX that it was made with."""
    assert "have not been checked on NVIDIA H100 yet" in stamp.unchecked()
    (path,) = stamp.write({"cases": 3})
    assert json.loads(path.read_text()) == {"cases": 3}
    assert stamp.unchecked() == ""
    machine(**changed)
    assert stamp.unchecked()
    machine()
    assert stamp.unchecked() == ""


def test_every_kind_of_gpu_counts(machine):
    """Catches a second, unchecked kind of GPU in the same machine."""
    stamp.write({})
    machine(kinds=("NVIDIA H100", "NVIDIA L4"))
    assert "NVIDIA L4" in stamp.unchecked()
    assert len(stamp.write({})) == 2
    assert stamp.unchecked() == ""


def test_proven_kernels_need_no_stamp(machine, monkeypatch):
    """Catches a switch that does nothing."""
    monkeypatch.setattr(stamp, "PROVEN", True)
    assert stamp.unchecked() == ""
