"""The CUDA kernels on the CPU, see cuda_on_host/README.md; no GPU is needed, but a C++ compiler is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_on_host import build

pytestmark = pytest.mark.skipif(
    shutil.which(build.CXX) is None or sys.platform != "linux", reason="needs g++ on Linux"
)

TESTS = Path(__file__).resolve().parent
# Every n-th case of these files.
EVERY = 6
FILES = sorted((TESTS / "ops").glob("test_*.py"))


@pytest.fixture(scope="module", autouse=True)
def _built():
    build.build()


PLANTED = {
    "none": "nothing wrong",
    "missing_syncthreads": "depends on the order of threads",
    "missing_syncwarp": "depends on the order of threads",
    "shared_index": "index 64 out of bounds for type 'int [64]'",
    "shared_pointer": "AddressSanitizer: global-buffer-overflow",
    "dynamic_shared_index": "AddressSanitizer: heap-buffer-overflow",
    "global_index": "AddressSanitizer: heap-buffer-overflow",
    "divergent_block": "divergent barrier: thread 0 waits for its block at",
    "divergent_warp": "divergent barrier: thread 0 waits for its warp at",
    "missing_thread": "thread 7 has returned",
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug):
    """Catches a harness that has gone blind."""
    command = [str(build.PLANTED), bug]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert PLANTED[bug] in done.stdout + done.stderr


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
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "cuda_on_host.plugin",
        "-p",
        "no:cacheprovider",
    ]
    if shutil.which("pytest-xdist") or "PYTEST_XDIST_WORKER" not in os.environ:
        command += ["-n", "2"]
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
