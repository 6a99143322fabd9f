"""The build: what goes wrong with one extension costs neither the other nor the installation, and is told.

Each test builds a copy of the sources with one operation in it.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(
    not CMAKE or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs CMake and a C++ compiler",
)


@pytest.fixture
def build(tmp_path):
    """A function that builds with some settings; returns the process, and the package's new files."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "xla_kernels", source / "xla_kernels")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for folder in (source / "xla_kernels").iterdir():
        if folder.is_dir() and folder.name not in ("common", "to_dense"):
            shutil.rmtree(folder)
    listed = source / "xla_kernels" / "targets.def"
    lines = listed.read_text().splitlines(keepends=True)
    other = r"(CPU_)?TARGET\((?!ilajax_to_dense)"
    listed.write_text("".join(line for line in lines if not re.match(other, line)))

    def run(*, nvcc=None, compiler=None, **settings):
        binary = tmp_path / "build"
        environment = {
            k: v for k, v in os.environ.items() if k not in ("CXX", "CUDACXX", "CUDAARCHS")
        }
        environment["CMAKE_BUILD_TYPE"] = "Debug"  # compiles in half the time
        environment |= {"CUDACXX": str(nvcc)} if nvcc else {}
        environment |= {"CXX": str(compiler)} if compiler else {}
        defined = [f"-D{name}={value}" for name, value in settings.items()]
        python = f"-DPython_EXECUTABLE={sys.executable}"
        # As scikit-build-core hands on what it knows.
        binary.mkdir(exist_ok=True)
        (binary / "CMakeInit.txt").write_text(
            f'set(Python_EXECUTABLE "{sys.executable}" CACHE PATH "" FORCE)\n'
        )
        configure = [CMAKE, "-S", source, "-B", binary, python, *defined]
        subprocess.run(configure, env=environment, check=True, capture_output=True)
        command = [CMAKE, "--build", binary]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, binary / "package"

    return run


def missing(package):
    """MISSING of the _build.py that was written."""
    found = {}
    exec((package / "_build.py").read_text(), found)
    return found["MISSING"]


@pytest.fixture
def broken(tmp_path):
    """A compiler that is there and fails."""
    path = tmp_path / "broken-compiler"
    path.write_text(
        '#!/bin/sh\necho "fatal error: the \\"broken\\" compiler\\\\ fails; [always" >&2\nexit 1\n'
    )
    path.chmod(0o755)
    return path


def test_a_broken_nvcc_costs_nothing_else(build, broken):
    """Catches a CUDA compiler that CMake stumbles over and that takes the CPU's kernels with it."""
    done, package = build(nvcc=broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(package.glob("_cpu.*so"))
    assert not list(package.glob("_cuda.*so"))
    said = missing(package)
    assert set(said) == {"cuda"}
    assert f'"{broken}"' in said["cuda"]


def test_no_compiler_at_all(build, broken):
    """Catches an installation without a compiler that fails, or keeps no reason."""
    done, package = build(compiler=broken, nvcc=broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in package.iterdir()] == ["_build.py"]
    assert set(missing(package)) == {"cpu", "cuda"}
    assert ast.get_docstring(ast.parse((package / "_build.py").read_text()))


def test_cuda_that_is_asked_for_has_to_be_built(build, broken):
    """Catches ILAJAX_CUDA=ON that is passed over in silence."""
    done, _ = build(compiler=broken, nvcc=broken, ILAJAX_CUDA="ON")
    assert done.returncode != 0
    assert "the cuda extension could not be built" in done.stdout + done.stderr


def test_cuda_that_is_left_out(build, broken):
    """Catches ILAJAX_CUDA=OFF that builds it all the same, and an old extension that stays."""
    _, package = build(compiler=broken, nvcc=broken)
    (package / "_cuda.old.so").touch()
    done, package = build(compiler=broken, nvcc=broken, ILAJAX_CUDA="OFF")
    assert done.returncode == 0
    assert "ILAJAX_CUDA=OFF" in missing(package)["cuda"]
    assert not list(package.glob("_cuda*"))


def test_a_sanitized_build_has_to_work(build, broken):
    """Catches `make sanitize` that runs on a build without sanitizers."""
    done, _ = build(compiler=broken, ILAJAX_CUDA="OFF", ILAJAX_SANITIZE="address;undefined")
    assert done.returncode != 0
