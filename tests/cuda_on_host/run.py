"""Runs tests of the ops through the CUDA kernels of a build, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cuda_on_host import build, kernels

TESTS = Path(__file__).resolve().parents[1]


def run(
    of: build.Build, files: Sequence[Path], log: Path, *, every: int = 1, processes: int = 0
) -> None:
    """Runs every n-th case of `files` and asserts that all pass, and that all kernels have run.

    Args:
      of: the build.
      files: test files that take the `backend` fixture.
      log: a file that does not exist yet, for the kernels that ran.
      every: n; of the harness' own cases, all run.
      processes: to run them in, beside the first.
    """
    of.make("_cuda_on_host")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cpu",
        "CUDA_ON_HOST_BUILD": of.name,
        "CUDA_ON_HOST_EVERY": str(every),
        "CUDA_ON_HOST_EXECUTED": str(log),
    }
    if of is build.SANITIZED:
        libraries = [_library(name) for name in ("libasan.so", "libstdc++.so")]
        environment |= {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    options = ["-q", "-p", "cuda_on_host.plugin", "-p", "no:cacheprovider", f"-n{processes}"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    missing = kernels.not_run(of, log)
    assert not missing, f"no case runs {', '.join(missing)}"


def cases() -> list[Path]:
    """Files that between them run every kernel: chosen cases, and the tests of ops that have none there."""
    chosen = build.HERE / "check_kernels.py"
    tests = [
        TESTS / "ops" / f"test_{path.stem}.py"
        for path in (build.REPOSITORY / "ilajax" / "ops").glob("*.py")
        if "ffi.declare(" in path.read_text() and f"test_{path.stem}," not in chosen.read_text()
    ]
    return [chosen, TESTS / "ops" / "test_workspace.py", *tests]


def _library(name: str) -> str:
    """The full path of one of the compiler's libraries."""
    command = [build.CXX, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
