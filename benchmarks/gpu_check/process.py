"""Processes with a limit, and how they report. What takes too long is killed: a kernel that hangs is deaf."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "gpu-check: "


def to_line(record: Any) -> str:
    """The line by which a process reports; `from_line` reads it."""
    return MARK + json.dumps(record)


def from_line(line: str) -> Any:
    """What a line of output reports, wherever in it; None: nothing."""
    _, mark, record = line.partition(MARK)
    return json.loads(record) if mark else None


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
      code: its exit status; None: it was killed, since it took too long.
      seconds: how long it ran.
      output: stdout and stderr.
    """

    code: int | None
    seconds: float
    output: str

    @property
    def status(self) -> str:
        return {None: "stopped at its limit", 0: "passed"}.get(self.code, "failed")

    def check(self) -> None:
        """Raises where it has not passed."""
        if self.status != "passed":
            raise RuntimeError(
                "\n".join([*self.tail(), f"{self.status} after {self.seconds:.0f} s"])
            )

    def tail(self, lines: int = 25) -> list[str]:
        """The end of the output."""
        return self.output.splitlines()[-lines:]


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    limit: float,
    patience: float | None = None,
    env: Mapping[str, str] | None = None,
    each: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Runs a command in the root of the project, in a session of its own.

    Args:
      command: program and arguments.
      log: where its output goes as well, at the end of what is there.
      limit: seconds that it may take.
      patience: seconds that it may be silent.
      env: variables to set.
      each: is given every line of output as it comes.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    incoming: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, incoming), daemon=True)
    reader.start()
    code, lines = None, []
    try:
        with log.open("a") as file:
            print("$", *command, file=file, flush=True)
            # Queue.get() times out with Empty, wait() with TimeoutExpired.
            with contextlib.suppress(queue.Empty, subprocess.TimeoutExpired):
                while True:
                    left = max(0.0, start + limit - time.monotonic())
                    line = incoming.get(timeout=left if patience is None else min(left, patience))
                    if line is None:
                        code = process.wait(timeout=max(1.0, left))
                        break
                    lines.append(line)
                    file.write(line)
                    file.flush()
                    each(line.rstrip("\n"))
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)
    return Ended(code, time.monotonic() - start, "".join(lines))


def together(
    commands: Mapping[str, Sequence[str | Path]],
    *,
    folder: Path,
    limit: float,
    env: Mapping[str, str] | None = None,
) -> dict[str, Ended]:
    """Runs commands at the same time, each with a log of its name in `folder`."""
    with ThreadPoolExecutor(len(commands)) as pool:
        running = {
            name: pool.submit(run, command, log=folder / f"{name}.log", limit=limit, env=env)
            for name, command in commands.items()
        }
        return {name: future.result() for name, future in running.items()}


def _read(process: subprocess.Popen[str], incoming: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            incoming.put(line)
    incoming.put(None)
