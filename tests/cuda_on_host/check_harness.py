"""All CUDA kernels, run on the CPU by a harness that sees planted bugs.

CUDA_ON_HOST_BUILD says in which build: "plain", or "sanitized", which sees an index out of bounds too.
"""

import functools
import os
import re
import shutil
import subprocess
import sys

import pytest

from cuda_on_host import build, kernels, run

pytestmark = pytest.mark.skipif(
    shutil.which(build.CXX) is None or sys.platform != "linux", reason="needs g++ on Linux"
)

CHOSEN = build.BUILDS[os.environ.get("CUDA_ON_HOST_BUILD", "plain")]
# What the harness says of them; where an array ends only the sanitizers know.
PLANTED = {
    "none": "nothing wrong",
    "none_in_chain": "nothing wrong",
    "missing_syncthreads": "depends on the order of threads",
    "missing_syncwarp": "depends on the order of threads",
    "shared_index": "index 64 out of bounds for type 'int [64]'",
    "shared_pointer": "AddressSanitizer: global-buffer-overflow",
    "dynamic_shared_index": "AddressSanitizer: heap-buffer-overflow",
    "global_index": "AddressSanitizer: heap-buffer-overflow",
    "divergent_block": "divergent barrier: thread 0 waits for its block at",
    "divergent_warp": "divergent barrier: thread 0 waits for its warp at",
    "missing_thread": "thread 7 has returned",
    "helper_in_both_branches": "divergent barrier: thread 0 waits for its warp at",
    "unwritten_shared": "or on what stood in it or in shared memory before",
    "endless_wait": "takes too long, in block (0, 0, 0)",
    "other_stream": "a launch on another stream than XLA's",
    "old_flags": "depends on the order of threads (forward or random)",
    "no_ticket": "takes too long, in block",
}


@functools.cache
def said(of: build.Build, program: str, *arguments: str) -> str:
    """What a program of a build prints."""
    of.make(program)
    done = subprocess.run(
        [str(of.folder / program), *arguments],
        env=os.environ | {"CUDA_ON_HOST_SECONDS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def planted_here():
    sanitized = CHOSEN is build.SANITIZED
    return [
        "none",
        *(b for b in PLANTED if ("index" in b or "pointer" in b) == sanitized and b != "none"),
    ]


@pytest.mark.parametrize("bug", planted_here())
def test_planted_bugs(bug):
    """Catches a harness that has gone blind."""
    assert PLANTED[bug] in said(CHOSEN, "planted_bugs", bug)


def test_a_report_tells_the_calls():
    """Catches reports without the calls that led to a barrier, and without what a thread is busy with."""
    report = said(CHOSEN, "planted_bugs", "helper_in_both_branches")
    calls = re.findall(r"OfNeighbour.*\n +.*Reverse.*planted_bugs.cu:(\d+)", report)
    assert len(set(calls)) == 2, report
    report = said(CHOSEN, "planted_bugs", "endless_wait")
    assert re.search(r"thread 9 runs\n.*Reverse.*planted_bugs.cu:\d+", report), report


def test_launches():
    """Catches an opt-in that another thread lowers, blocks that are left out, and another stream."""
    assert said(CHOSEN, "launches") == "nothing wrong\n"


def test_every_kernel_runs(tmp_path):
    """Catches a kernel that is wrong, depends on the order of threads, or is run by no test."""
    log = tmp_path / "executed"
    run.run(CHOSEN, run.cases(), log, processes=2)

    lines = log.read_text().splitlines()
    log.write_text("\n".join(line for line in lines if int(line, 16) != int(lines[0], 16)))
    assert kernels.not_run(CHOSEN, log) == [kernels.compiled(CHOSEN)[int(lines[0], 16)]]
