"""What is installed, and what is said of what is not."""

import subprocess
import sys
import types

import pytest

from ffi.fakes import cuda_module
from ilajax.ffi import registry, routes


@pytest.fixture
def module(monkeypatch):
    """A function that puts a module, or None for one that is missing, in the place of an extension."""

    def put(name, module):
        monkeypatch.setitem(sys.modules, name, module)

    return put


def test_an_extension_that_was_not_built(module):
    """Catches a missing extension that does not say what the build said."""
    module("ilajax._cpu", None)
    module("ilajax._build", types.SimpleNamespace(MISSING={"cpu": "No CMAKE_CXX_COMPILER"}))
    found = registry._load("cpu")
    assert not found.targets
    for part in ("C++ kernels are not installed", "No CMAKE_CXX_COMPILER", "C++20 compiler"):
        assert part in found.missing


def test_a_copy_that_was_never_built(module):
    """Catches a source tree on the path that fails for want of ilajax._build."""
    module("ilajax._cpu", None)
    module("ilajax._build", None)
    assert "never built" in registry._load("cpu").missing


def test_an_extension_that_does_not_load(module, monkeypatch):
    """Catches an extension for other libraries that takes `import ilajax` down."""

    def import_module(name):
        raise ImportError("GLIBCXX_3.4.99 not found")

    monkeypatch.setattr(registry, "importlib", types.SimpleNamespace(import_module=import_module))
    found = registry._load("cpu")
    assert not found.targets
    assert "GLIBCXX_3.4.99" in found.missing


def test_an_extension_of_an_older_ilajax(module):
    """Catches an extension from before an update, which takes `import ilajax` down."""
    module("ilajax._cuda", types.SimpleNamespace(registrations=dict))
    assert "older than ilajax: install it again" in registry._load("cuda").missing


@pytest.mark.parametrize(
    ("driver", "runtime", "said"),
    [
        (0, 13000, "no NVIDIA driver"),
        (12040, 13000, "supports CUDA 12.4 at most"),
        (13000, 13010, ""),
        (13010, 13000, ""),
        (14000, 13000, ""),
    ],
)
def test_the_driver(module, driver, runtime, said):
    """Catches kernels that are registered although the driver is too old, or not although it fits."""
    module("ilajax._cuda", cuda_module(__file__, driver=driver, runtime=runtime))
    found = registry._load("cuda")
    assert bool(found.missing) == bool(said)
    assert said in found.missing


@pytest.mark.skipif("cpu" not in routes.native_platforms(), reason="no kernels for the CPU")
def test_import_registers(tmp_path):
    """Catches an exported program that finds no kernels where nothing but the import has happened."""
    path = tmp_path / "exported"
    write = (
        "import jax, ilajax, pathlib, jax.numpy as jnp\n"
        "f = jax.jit(lambda x: ilajax.from_dense(x, 4).values)\n"
        "safe = [jax.export.DisabledSafetyCheck.custom_call('ilajax_from_dense_fwd')]\n"
        "done = jax.export.export(f, disabled_checks=safe)(jnp.arange(6.0).reshape(1, 6, 1))\n"
        f"pathlib.Path({str(path)!r}).write_bytes(done.serialize())"
    )
    read = (
        "import jax, ilajax, pathlib, jax.numpy as jnp\n"
        f"f = jax.export.deserialize(pathlib.Path({str(path)!r}).read_bytes())\n"
        "print(f.call(jnp.arange(6.0).reshape(1, 6, 1)))"
    )
    for script in (write, read):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[[2. 3. 4. 5.]]]"


def test_import_does_not_start_jax():
    """Catches an import that chooses the devices, before the user has had a chance to."""
    script = (
        "import ilajax, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # raises once there are devices
        "print(jax.device_count())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
