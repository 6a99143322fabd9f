"""Builds the CUDA kernels for the host into build/cuda_on_host/: plain, or with AddressSanitizer and UBSan.

    python tests/cuda_on_host/build.py [plain] [sanitized]

An object is compiled again only when its source or a header has changed.
"""

import concurrent.futures
import dataclasses
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

CXX = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *(f"-I{HERE}", f"-I{REPOSITORY}", "-isystem", str(Path(jaxlib.__path__[0]) / "include")),
]


@dataclasses.dataclass(frozen=True)
class Build:
    """One way to compile all kernels.

    Attributes:
      name: of its folder under build/cuda_on_host/.
      flags: the compiler's.
      optimise: its level of optimisation for kernels; what runs their threads always has -O2.
    """

    name: str
    flags: tuple[str, ...]
    optimise: str

    @property
    def folder(self) -> Path:
        return REPOSITORY / "build" / "cuda_on_host" / self.name

    @property
    def library(self) -> Path:
        """The handlers of all targets, for the process that JAX runs in."""
        return self.folder / "kernels.so"

    def make_library(self) -> None:
        """Brings the library up to date."""
        self._make(self.library, ["-shared"], [*cuda_sources(), HERE / "handlers.cc"])

    def make_program(self, source: str) -> Path:
        """Brings the program of a .cu file of this folder up to date."""
        out = self.folder / source.removesuffix(".cu")
        self._make(out, [], [HERE / source])
        return out

    def _make(self, out: Path, flags: list[str], sources: list[Path]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time, whichever processes test
            with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = list(pool.map(self._compile, [HERE / "block.cc", *sources]))
            stamp, text = out.with_suffix(".stamp"), _stamp([str(path) for path in objects])
            if not (out.exists() and stamp.exists() and stamp.read_text() == text):
                _run([CXX, *self.flags, *flags, *map(str, objects), "-o", str(out), "-ldl"])
                stamp.write_text(text)

    def _compile(self, source: Path) -> Path:
        headers = [
            *HERE.glob("*.h"),
            *KERNELS.glob("*.h"),
            *KERNELS.glob("common/*.*h"),
            *KERNELS.glob("*.def"),
        ]
        optimise = "-O2" if source.name == "block.cc" else self.optimise
        command = [CXX, *FLAGS, *self.flags, optimise]
        files = (f"{path} {_digest(path)}" for path in sorted([source, *headers]))
        out = self.folder / f"{source.stem}-{_stamp([*command, *files])}.o"
        if not out.exists():
            for old in self.folder.glob(f"{source.stem}-*.o"):
                old.unlink()
            _run([*command, "-x", "c++", "-c", "-", "-o", f"{out}.tmp"], _on_host(source))
            os.replace(f"{out}.tmp", out)
        return out


PLAIN = Build("plain", (), "-O1")
SANITIZED = Build(
    "sanitized",
    (
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        # They cost half of the compile time, and AddressSanitizer sees most of that.
        *("-fno-sanitize=null,object-size,vptr", "-g1"),
    ),
    "-O0",
)
BUILDS = {build.name: build for build in (PLAIN, SANITIZED)}


def cuda_sources() -> list[Path]:
    """The .cu files, as xla_kernels/sources.bzl lists them."""
    return [
        KERNELS / name for name in re.findall(r'"(\w+\.cu)"', (KERNELS / "sources.bzl").read_text())
    ]


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
    for chosen in sys.argv[1:] or BUILDS:
        for program in HERE.glob("*.cu"):
            BUILDS[chosen].make_program(program.name)
        BUILDS[chosen].make_library()
