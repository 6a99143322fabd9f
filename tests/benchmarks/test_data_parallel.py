"""Data-parallel training: on one device or several, in one process or two, and from one to the other."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import data_parallel

ROOT = Path(__file__).parents[2]


def start(out, *arguments):
    """The program in a process of its own, on one step an epoch."""
    command = [sys.executable, "-m", "benchmarks.data_parallel", "--solids", "16", "--out", out]
    # This process plays one device: the program chooses its own.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    """What it printed, or a failed test that shows why it stopped."""
    try:
        printed, errors = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-3000:]
    return printed


def rows(printed):
    """{epoch: [loss, densities...]}"""
    lines = re.findall(r"^epoch (\d+)/.*?  (loss .*)$", printed, re.MULTILINE)
    return {int(epoch): [float(n) for n in re.findall(r" (\d\.\d+)", row)] for epoch, row in lines}


def two_processes(out, *arguments):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    options = ("--cpu-devices", 1, "--processes", 2, "--coordinator", coordinator, *arguments)
    first, second = (start(out, *options, "--process", i) for i in range(2))
    printed = finished(first)
    assert not rows(finished(second))
    return rows(printed)


def test_processes_and_checkpoints(tmp_path, capsys):
    """Catches a process that trains on its own part only, or a checkpoint that fits one number of processes.

    Two processes train one epoch, one process with two devices goes on.
    """
    got = two_processes(tmp_path, "--epochs", 1)
    assert list(got) == [1]
    resumed = rows(finished(start(tmp_path, "--cpu-devices", 2, "--resume")))
    assert list(resumed) == [2]
    # One process with one device, this one.
    kept = tmp_path / "one" / "kept"
    kept.mkdir(parents=True)
    data_parallel.main(["--solids", "16", "--out", str(tmp_path / "one")])
    assert kept.exists()  # a new run removes nothing but checkpoints
    one_device = rows(capsys.readouterr().out)
    for epoch, row in (got | resumed).items():
        np.testing.assert_allclose(row, one_device[epoch], rtol=2e-3, atol=2e-4)


def test_the_page_quotes_the_program():
    """Catches docs/scaling_out.md after the program has changed."""
    page = (ROOT / "docs/scaling_out.md").read_text()
    program = (ROOT / "benchmarks/data_parallel.py").read_text()
    quotes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(quotes) >= 3
    for quote in quotes:
        for line in filter(str.strip, quote.splitlines()):
            assert line.strip() in program, f"{line!r} is not in benchmarks/data_parallel.py"
