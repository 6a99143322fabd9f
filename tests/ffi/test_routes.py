"""What runs where, why, and what is said of it."""

import importlib.metadata
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

import ilajax
from ffi.fakes import cuda_module, extension, gpu
from ilajax.ffi import gpus, registry, routes, stamp


def to_dense(x):
    """Traced anew in each call: the variables are read then."""
    return jax.jit(lambda x: ilajax.to_dense(x))(x)


X = ilajax.SparseTensor(jnp.array([[[1, 4]]]), jnp.ones((1, 1, 2)), (6,))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No choice, and nothing said yet."""
    monkeypatch.delenv("ILAJAX_BACKEND", raising=False)
    monkeypatch.delenv("ILAJAX_REFERENCE", raising=False)
    monkeypatch.setattr(routes, "_warned", set())


@pytest.fixture
def no_kernels(monkeypatch):
    """An installation without extensions."""
    for platform in registry.PLATFORMS:
        monkeypatch.setitem(registry.extensions, platform, extension(missing="It was not built."))


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A machine with a GPU that the extension fits; returns the stamp's cache folder."""
    library = tmp_path / "_cuda.so"
    library.write_bytes(b"kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(registry.extensions, "cuda", extension(cuda_module(library)))
    monkeypatch.setattr(stamp.jax, "devices", lambda platform=None: [gpu()])
    monkeypatch.setattr(routes, "default_platform", lambda: "cuda")
    return tmp_path / "ilajax"


def test_a_missing_kernel_is_told_once(no_kernels):
    """Catches a slow reference that nobody is told of, and a warning for each operation and step."""
    with pytest.warns(UserWarning, match="It was not built") as told:
        jax.jit(lambda x: (ilajax.to_dense(x), ilajax.k_select(x, 1).values))(X)
    assert len(told) == 1
    for part in ("much slower", "python -m ilajax", "ILAJAX_BACKEND=reference"):
        assert part in str(told[0].message)


@pytest.mark.parametrize(
    ("name", "value"), [("ILAJAX_BACKEND", "reference"), ("ILAJAX_REFERENCE", "to_dense")]
)
def test_no_warning_where_the_reference_is_asked_for(no_kernels, monkeypatch, name, value):
    """Catches a warning about what the user wants."""
    monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_dense(X)


def test_native_raises(no_kernels, monkeypatch):
    """Catches ILAJAX_BACKEND=native that runs the reference."""
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"to_dense has no kernel here. It was not built."):
        to_dense(X)


def test_single_operations(monkeypatch):
    """Catches ILAJAX_REFERENCE that does not choose by operation, or takes a name that it does not know."""
    monkeypatch.setitem(registry.extensions, "cpu", extension())
    monkeypatch.setenv("ILAJAX_REFERENCE", "conv, pool")
    found = ilajax.backend().operations["cpu"]
    assert {name for name, route in found.items() if route.runs == "reference"} == {"conv", "pool"}
    monkeypatch.setenv("ILAJAX_REFERENCE", "max_pool")
    with pytest.raises(ValueError, match=r"ILAJAX_REFERENCE must list some of .*max_pool is none"):
        ilajax.backend()


@pytest.mark.skipif("cpu" not in routes.native_platforms(), reason="no kernels for the CPU")
def test_single_operations_are_dispatched(monkeypatch):
    """Catches a report that says one thing while dispatch does another."""

    def text():
        return jax.jit(lambda x: ilajax.to_dense(x)).lower(X).as_text()

    assert "ilajax_to_dense_fwd" in text()
    monkeypatch.setenv("ILAJAX_REFERENCE", "to_dense")
    assert "ilajax_to_dense_fwd" not in text()


def test_a_wrong_choice(monkeypatch):
    """Catches a misspelt variable that is passed over in silence."""
    monkeypatch.setenv("ILAJAX_BACKEND", "kernel")
    with pytest.raises(ValueError, match=r"ILAJAX_BACKEND must be one of .*'kernel'"):
        ilajax.backend()


def test_a_platform_without_kernels():
    """Catches ROCm that is taken for CUDA."""
    assert routes.route("conv", "rocm") == routes.Route(
        "reference", "ilajax has no kernels for rocm."
    )


def test_an_old_extension(monkeypatch):
    """Catches an operation whose kernel the installed extension does not have yet."""
    old = registry.Extension(frozenset({"ilajax_pool_fwd"}), None, "")
    monkeypatch.setitem(registry.extensions, "cpu", old)
    assert routes.route("pool", "cpu").runs == "kernel"
    assert "install it again" in routes.route("conv", "cpu").why


def test_a_gpu_without_a_stamp(on_gpu, monkeypatch):
    """Catches kernels that are on unchecked, or off although asked for, and a hint without the command."""
    found = routes.route("conv", "cuda")
    assert found.runs == "reference"
    assert "python -m ilajax check" in found.why
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    assert routes.route("conv", "cuda").runs == "kernel"


def test_a_gpu_with_a_stamp(on_gpu):
    """Catches a stamp that does not switch the kernels on."""
    (path,) = stamp.write({"device": "x"})
    assert path.parent == on_gpu
    assert routes.route("conv", "cuda") == routes.Route("kernel")


def test_what_a_kernel_cannot_do(on_gpu):
    """Catches a call beyond a device's limits that fails at run time, and one that goes unsaid."""
    stamp.write({})
    assert routes.kernel_runs("conv", "cuda", lambda: "")
    with pytest.warns(UserWarning, match=r"This conv runs its reference on cuda.* 131 KB"):
        assert not routes.kernel_runs("conv", "cuda", lambda: "It needs 131 KB of shared memory.")


def test_a_gpu_that_the_kernels_were_not_built_for(on_gpu, monkeypatch):
    """Catches a launch without code for the device."""
    monkeypatch.setattr(gpus.jax, "devices", lambda platform=None: [gpu("Tesla T4", "7.5")])
    stamp.write({})
    assert "Tesla T4 is of compute capability 7.5" in routes.route("conv", "cuda").why


def test_all_platforms_count():
    """Catches a GPU that is overlooked where it is not the default."""
    assert set(routes.platforms()) == set(jax.extend.backend.backends())
    assert routes.default_platform() in routes.platforms()


def test_the_command_prints_the_data():
    """Catches `python -m ilajax` and `ilajax.backend()` that differ, or a report without its parts."""
    done = subprocess.run(
        [sys.executable, "-m", "ilajax"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(f"ilajax {ilajax.__version__}, jax {jax.__version__}")
    for name in routes.OPERATIONS:
        assert f"  {name} " in done.stdout
    assert "devices: " in done.stdout


def test_a_copy_that_is_not_installed(monkeypatch):
    """Catches a report that fails where ilajax is just a folder on the path."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(routes, "version", version)
    assert str(ilajax.backend()).startswith("ilajax not installed, ")


def test_what_is_installed_for_other_platforms(monkeypatch):
    """Catches a login node, without a GPU, that does not tell whether the GPU's kernels are there."""
    monkeypatch.setitem(registry.extensions, "cuda", extension(missing="nvcc was not found."))
    monkeypatch.setattr(routes, "platforms", lambda: ("cpu",))
    assert "no device of cuda here. nvcc was not found." in str(ilajax.backend())
    monkeypatch.setitem(registry.extensions, "cuda", extension())
    assert "no device of cuda here. Its kernels are installed." in str(ilajax.backend())
