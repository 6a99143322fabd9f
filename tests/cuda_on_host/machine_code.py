"""Gives the plain build what its machine runs: the code of each kernel, from nvcc and nvdisasm.

The plugin does so where CUDA_ON_HOST_MACHINE is set; then no kernel runs as fibers.
"""

import functools
import os
import re
import subprocess
from typing import Any

from benchmarks import sass
from cuda_on_host import build

WANTED = bool(os.environ.get("CUDA_ON_HOST_MACHINE"))


def load(module: Any) -> dict[int, sass.Kernel]:
    """Adds the code of all kernels to the module of the build; returns them, by their number there."""
    for number, kernel in kernels().items():
        add(module, number, kernel)
    return kernels()


def add(module: Any, number: int, kernel: sass.Kernel) -> None:
    module.add_code(number, kernel.text, kernel.resources["shared"])


@functools.cache
def kernels() -> dict[int, sass.Kernel]:
    """The kernels, by where the host function of each is in the module."""
    of_name: dict[str, sass.Kernel] = {}
    for kernel in sass.kernels():
        # A header's kernel is in several files, whose functions the module does not tell apart.
        same = of_name.setdefault(_common(kernel.code.name), kernel)
        assert same.digest == kernel.digest, (
            f"{same.file} and {kernel.file} differ in {kernel.name}"
        )
    command = ["nm", "--defined-only", str(build.PLAIN.module)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", listing, re.MULTILINE)
    found = {int(at, 16): of_name[_common(n)] for at, n in symbols if _common(n) in of_name}
    missing = set(of_name) - {_common(kernel.code.name) for kernel in found.values()}
    assert not missing, f"not in {build.PLAIN.module}: {missing}"
    return found


def _common(mangled: str) -> str:
    """A mangled name without what a compiler calls its anonymous namespace."""
    for length in re.findall(r"(\d+)_GLOBAL__N_", mangled):
        at = mangled.index(f"{length}_GLOBAL__N_")
        mangled = mangled[:at] + "@" + mangled[at + len(length) + int(length) :]
    return mangled
