"""The CPU handlers under ThreadSanitizer: run by `make sanitize`, once it has built this folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thread_sanitizer.plugin import BUILD, EVERY

ROOT = Path(__file__).resolve().parents[2]


def replay(*arguments: str) -> tuple[int, str]:
    """Runs the program of replay.cc, and returns its status and what it prints."""
    command = [str(BUILD / "replay"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        # libtsan before GCC 14 knows addresses of 28 random bits; a kernel may have vm.mmap_rnd_bits = 32.
        command = ["setarch", "--addr-no-randomize", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, with_lines(done.stdout + done.stderr)


def with_lines(report: str) -> str:
    """The report with those lines of the sources that libtsan does not find: those of templates."""
    places = sorted(set(re.findall(r"<null> \(replay\+(0x\w+)\)", report)))
    if places:
        command = ["addr2line", "-e", str(BUILD / "replay"), *places]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for place, line in zip(places, lines.splitlines(), strict=True):
            report = report.replace(f"<null> (replay+{place})", line)
    return report


# Status 66 is ThreadSanitizer's.
PLANTED = {
    "none": (0, ""),
    "race_of_tasks": (66, "WARNING: ThreadSanitizer: data race"),
    "race_of_calls": (66, "WARNING: ThreadSanitizer: data race"),
    "order_of_threads": (1, "result 0 differs from the first time's"),
    "unwritten_result": (1, "result 0 differs from the recorded one"),
    "written_operand": (1, "writes to operand 0"),
    "error": (1, "fails: a planted error"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug):
    """Catches a check that has gone blind."""
    status, output = replay("-", bug)
    assert status == PLANTED[bug][0], output
    assert PLANTED[bug][1] in output


def test_handlers(tmp_path):
    """Catches threads that race, in one call or from call to call, and a result that depends on them.

    And a target that no test calls with several tasks, or in each dtype.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "THREAD_SANITIZER_CALLS": str(tmp_path),
    }
    options = ["-q", "-p", "thread_sanitizer.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *EVERY]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    status, output = replay(str(tmp_path))
    assert status == 0, output[:20000]
