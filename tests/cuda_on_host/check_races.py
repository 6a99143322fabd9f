"""The CUDA kernels under ThreadSanitizer, on the CPU: run by `make sanitize`.

The calls of check_kernels.py and check_sizes.py are recorded, and made again by the program of races.cc.
"""

import subprocess

import pytest

from cuda_on_host import build, run

# What it says, in a source line; each lies in planted_bugs.cu.
PLANTED = {
    "sum_without_atomic": "threads += 1;",
    "no_fence_before_flag": "chain->sums[place] = sum;",
    "no_fence_behind_flag": "sum += chain->sums[place - 1];",
    "missing_syncthreads": "const int other = shared[kThreads - 1 - i];",
    "missing_syncwarp": "const int neighbour = dynamic[i ^ 1];",
}


def watched(program: str, *arguments: str) -> tuple[int, str]:
    """Runs a program of the watched build; its status, and what it prints."""
    build.WATCHED.make(program)
    command = [str(build.WATCHED.folder / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if "unexpected memory mapping" in done.stderr:
        # libtsan before GCC 14 knows addresses of 28 random bits; a kernel may have vm.mmap_rnd_bits = 32.
        command = ["setarch", "--addr-no-randomize", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_races(bug):
    """Catches a check that has gone blind, and reports without the line."""
    status, output = watched("planted_bugs", bug)
    assert status == 66, output
    source = (build.HERE / "planted_bugs.cu").read_text().splitlines()
    number = next(n for n, line in enumerate(source, 1) if PLANTED[bug] in line)
    assert f"planted_bugs.cu:{number}" in output, output


@pytest.mark.parametrize("program", ["none", "none_in_chain"])
def test_no_race_where_none_is_planted(program):
    assert watched("planted_bugs", program) == (0, "nothing wrong\n")


def test_kernels(tmp_path, monkeypatch):
    """Catches threads of a block, or blocks of a launch, that touch one place in no order."""
    calls = tmp_path / "calls"
    calls.mkdir()
    monkeypatch.setenv("CUDA_ON_HOST_CALLS", str(calls))
    files = [*run.cases(), build.HERE / "check_sizes.py"]
    run.run(build.PLAIN, files, tmp_path / "executed", processes=2)
    status, output = watched("races", str(calls))
    assert status == 0, output[:20000]
