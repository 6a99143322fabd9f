"""Builds the CUDA kernels for the host, under AddressSanitizer and UBSan, into build/cuda_on_host/.

    python tests/cuda_on_host/build.py

An object is compiled again only when its source or a header has changed.
"""

import concurrent.futures
import fcntl
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxlib

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
KERNELS = REPOSITORY / "xla_kernels"
BUILD = REPOSITORY / "build" / "cuda_on_host"
LIBRARY = BUILD / "kernels.so"
PLANTED = BUILD / "planted_bugs"

CXX = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++20", "-O0", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    # They cost half of the compile time, and AddressSanitizer sees most of that.
    "-fno-sanitize=null,object-size,vptr",
    *(f"-I{HERE}", f"-I{REPOSITORY}", "-isystem", str(Path(jaxlib.__path__[0]) / "include")),
]


def cuda_sources() -> list[Path]:
    """The .cu files, as xla_kernels/sources.bzl lists them."""
    return [
        KERNELS / name for name in re.findall(r'"(\w+\.cu)"', (KERNELS / "sources.bzl").read_text())
    ]


def build(*, kernels: bool = True) -> None:
    """Brings the program with the planted bugs up to date, and the library of all kernels if asked for."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time, whichever processes test
        runtime, planted = HERE / "block.cc", HERE / "planted_bugs.cu"
        handlers = [*cuda_sources(), HERE / "handlers.cc"] if kernels else []
        sources = [runtime, planted, *handlers]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = dict(zip(sources, pool.map(_compile, sources), strict=True))
        if kernels:
            _link(LIBRARY, ["-shared"], [objects[source] for source in [runtime, *handlers]])
        _link(PLANTED, [], [objects[runtime], objects[planted]])


def _compile(source: Path) -> Path:
    headers = [
        *HERE.glob("*.h"),
        *KERNELS.glob("*.h"),
        *KERNELS.glob("common/*.*h"),
        *KERNELS.glob("*.def"),
    ]
    stamp = _stamp(
        [CXX, *FLAGS, *(f"{path} {_digest(path)}" for path in sorted([source, *headers]))]
    )
    out = BUILD / f"{source.stem}-{stamp}.o"
    if not out.exists():
        for old in BUILD.glob(f"{source.stem}-*.o"):
            old.unlink()
        _run([CXX, *FLAGS, "-x", "c++", "-c", "-", "-o", f"{out}.tmp"], _on_host(source))
        os.replace(f"{out}.tmp", out)
    return out


def _link(out: Path, flags: list[str], objects: list[Path]) -> None:
    stamp, text = out.with_suffix(".stamp"), _stamp([str(path) for path in objects])
    if not (out.exists() and stamp.exists() and stamp.read_text() == text):
        _run([CXX, *FLAGS, *flags, *map(str, objects), "-o", str(out), "-ldl"])
        stamp.write_text(text)


def _on_host(source: Path) -> str:
    """The source, with the one construct that no macro can turn into C++: dynamic shared memory."""
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(cuda_on_host::DynamicShared());",
        source.read_text(),
    )
    return f'#line 1 "{source}"\n{text}'


def _run(command: list[str], source: str | None = None) -> None:
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stamp(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    build()
