"""All CUDA kernels, run on the CPU by a harness that sees planted bugs; see cuda_on_host/README.md.

`make cuda-on-host` runs more cases, those of the tests of the ops.
"""

import os
import shutil
import subprocess
import sys

import pytest

from cuda_on_host import build, kernels, run

pytestmark = pytest.mark.skipif(
    shutil.which(build.CXX) is None or sys.platform != "linux", reason="needs g++ on Linux"
)

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


@pytest.fixture(scope="module")
def programs():
    """The folder of the sanitized programs."""
    build.SANITIZED.make("launches", "planted_bugs")
    return build.SANITIZED.folder


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(programs, bug):
    """Catches a harness that has gone blind."""
    command = [str(programs / "planted_bugs"), bug]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert PLANTED[bug] in done.stdout + done.stderr


def test_launches(programs):
    """Catches an opt-in to shared memory that another thread lowers, and blocks that are left out."""
    done = subprocess.run([str(programs / "launches")], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == "nothing wrong\n"


def test_every_kernel_runs(tmp_path):
    """Catches a kernel that is wrong, depends on the order of threads, or is run by no test.

    `make sanitize` does the same with CUDA_ON_HOST_BUILD=sanitized: an index out of bounds, too.
    """
    chosen = build.BUILDS[os.environ.get("CUDA_ON_HOST_BUILD", "plain")]
    log = tmp_path / "executed"
    run.run(chosen, run.cases(), log)

    lines = log.read_text().splitlines()
    log.write_text("\n".join(line for line in lines if int(line, 16) != int(lines[0], 16)))
    assert kernels.not_run(chosen, log) == [kernels.compiled(chosen)[int(lines[0], 16)]]
