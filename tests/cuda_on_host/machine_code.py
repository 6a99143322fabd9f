"""Gives the build "machine" what it runs: the machine code of each kernel, from nvcc and nvdisasm."""

import re
import subprocess
from typing import Any

from benchmarks import sass
from cuda_on_host import build


def load(module: Any) -> dict[int, sass.Kernel]:
    """Adds the code of all kernels to the module of the build; returns them, by their number there."""
    kernels = {_common(kernel.code.name): kernel for kernel in sass.kernels()}
    command = ["nm", "--defined-only", str(build.MACHINE.module)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for offset, name in re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", listing, re.MULTILINE):
        if kernel := kernels.get(_common(name)):
            found[int(offset, 16)] = kernel
            module.add_code(int(offset, 16), kernel.text, kernel.resources["shared"])
    missing = set(kernels) - {_common(kernel.code.name) for kernel in found.values()}
    assert not missing, f"not in {build.MACHINE.module}: {missing}"
    return found


def _common(mangled: str) -> str:
    """A mangled name without what a compiler calls its anonymous namespace."""
    for length in re.findall(r"(\d+)_GLOBAL__N_", mangled):
        at = mangled.index(f"{length}_GLOBAL__N_")
        mangled = mangled[:at] + "@" + mangled[at + len(length) + int(length) :]
    return mangled
