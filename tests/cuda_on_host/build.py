"""Builds the CUDA kernels for the host into build/cuda_on_host/, in one of several ways.

    python tests/cuda_on_host/build.py [plain] [sanitized] [covered] [watched]

CMakeLists.txt says how; only what has changed is compiled again.
"""

import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
KERNELS = REPOSITORY / "xla_kernels"

CXX = os.environ.get("CXX", "g++")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=PATH)


@dataclasses.dataclass(frozen=True)
class Build:
    """One way to compile all kernels: a KIND of CMakeLists.txt."""

    name: str

    @property
    def folder(self) -> Path:
        return REPOSITORY / "build" / "cuda_on_host" / self.name

    @property
    def module(self) -> Path:
        """The Python module with the handlers and plans of all targets."""
        return next(self.folder.glob("_cuda_on_host*.so"))

    def make(self, *targets: str) -> None:
        """Brings some targets of CMakeLists.txt up to date; all of them where none is named."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time, whichever processes test
            generator = ["-GNinja"] if shutil.which("ninja", path=PATH) else []
            _run(
                *(CMAKE, "-S", HERE, "-B", self.folder, *generator, f"-DCMAKE_CXX_COMPILER={CXX}"),
                *(f"-DPython_EXECUTABLE={sys.executable}", f"-DKIND={self.name}"),
            )
            chosen = [argument for target in targets for argument in ("--target", target)]
            jobs = str(len(os.sched_getaffinity(0)))
            _run(CMAKE, "--build", self.folder, "--parallel", jobs, *chosen)


PLAIN, SANITIZED, COVERED = Build("plain"), Build("sanitized"), Build("covered")
WATCHED = Build("watched")
BUILDS = {build.name: build for build in (PLAIN, SANITIZED, COVERED, WATCHED)}


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": PATH}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or BUILDS:
        BUILDS[chosen].make()
