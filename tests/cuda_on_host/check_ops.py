"""The tests of the ops on the CUDA kernels, compiled for the CPU: run by `make cuda-on-host`.

Not part of `make test` while kernels are unproven (see xla_kernels/targets.def): it takes minutes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_on_host import build

TESTS = Path(__file__).resolve().parents[1]
# Every n-th case of these files.
EVERY = 6
FILES = sorted((TESTS / "ops").glob("test_*.py"))


@pytest.fixture(scope="module", autouse=True)
def _built():
    build.build()


def test_the_ops_on_cuda_kernels(tmp_path):
    """Catches a kernel that is wrong, reads or writes where it must not, or depends on the order of threads.

    And a kernel that no test reaches. Runs every EVERY-th case of the tests of the ops, in a process of its
    own with libasan in front.
    """
    executed = tmp_path / "executed"
    preload = [
        subprocess.run(
            [build.CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_ON_HOST_EXECUTED": str(executed),
        "CUDA_ON_HOST_EVERY": str(EVERY),
    }
    options = ["-q", "-p", "cuda_on_host.plugin", "-p", "no:cacheprovider", "-n", "2"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(
        [*command, *map(str, FILES)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    missing = kernels() - {int(line, 16) for line in executed.read_text().split()}
    assert not missing, f"no test runs {sorted(kernels_by_offset()[offset] for offset in missing)}"


def kernels() -> set[int]:
    return set(kernels_by_offset())


def kernels_by_offset() -> dict[int, str]:
    """Offset in the library -> name, for every instantiation of every __global__ function."""
    sources = [*build.cuda_sources(), *build.KERNELS.glob("common/*.cuh")]
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)"
    names = {name for source in sources for name in re.findall(pattern, source.read_text())}
    assert names
    listing = subprocess.run(
        ["nm", "-C", str(build.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listing.splitlines():
        match = re.match(r"([0-9a-f]+) [tTwW] (.*)", line)
        if match and re.search(r"::(\w+)(<.*>)?\(", match[2]):
            name = re.search(
                r"(\w+)(<[^(]*(\([^)]*\)[^(]*)*>)?\(",
                match[2].replace("(anonymous namespace)::", ""),
            )
            if name and name[1] in names and "lambda" not in match[2]:
                found[int(match[1], 16)] = match[2]
    return found
