"""Processes with a limit, and how they report. What takes too long is killed: a kernel that hangs is deaf."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
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
    """How a process ended: its exit status, None where it took too long, its time, stdout and stderr."""

    code: int | None
    seconds: float
    output: str

    @property
    def status(self) -> str:
        return {None: "stopped at its limit", 0: "passed"}.get(self.code, "failed")

    def tail(self, lines: int = 25) -> list[str]:
        return self.output.splitlines()[-lines:]


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    limit: float,
    patience: float = float("inf"),
    env: Mapping[str, str] | None = None,
    each: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Runs a command in the root of the project, in a session of its own.

    It may take `limit` seconds, and be silent for `patience`. Its output goes to the end of `log` as well,
    and `each` is given every line of it as it comes.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    code, output, rest = None, b"", b""
    try:
        with process.stdout as pipe, log.open("ab") as file:
            file.write(f"$ {' '.join(map(str, command))}\n".encode())
            while (left := start + limit - time.monotonic()) > 0:
                if not select.select([pipe], [], [], min(patience, left))[0]:
                    break
                new = os.read(pipe.fileno(), 1 << 16)
                file.write(new)
                file.flush()
                output += new
                *lines, rest = (rest + new).split(b"\n")
                for line in lines:
                    each(line.decode(errors="replace"))
                if not new:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(max(1.0, left))
                    break
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(code, time.monotonic() - start, output.decode(errors="replace"))


def together(
    commands: Mapping[str, Sequence[str | Path]], *, folder: Path, **options: Any
) -> dict[str, Ended]:
    """Runs commands at the same time, each with a log of its name in `folder`."""

    def one(name: str) -> Ended:
        return run(commands[name], log=folder / f"{name}.log", **options)

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(one, commands), strict=True))
