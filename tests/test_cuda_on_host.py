"""The harness that runs CUDA kernels on the CPU sees planted bugs; see cuda_on_host/README.md.

`make cuda-on-host` runs the kernels themselves through the tests of the ops.
"""

import shutil
import subprocess
import sys

import pytest

from cuda_on_host import build

pytestmark = pytest.mark.skipif(
    shutil.which(build.CXX) is None or sys.platform != "linux", reason="needs g++ on Linux"
)


@pytest.fixture(scope="module", autouse=True)
def _built():
    build.build(kernels=False)


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
