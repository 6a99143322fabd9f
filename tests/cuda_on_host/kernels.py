"""Which kernels there are: every instantiation of every __global__ function in the library of a build."""

import re
import subprocess
from pathlib import Path

from cuda_on_host import build

# A __global__ function's name, behind launch bounds that may hold a call.
_GLOBAL = r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)"
_NAMESPACES = r"\(anonymous namespace\)::|\bilajax::|\bselect_kernels::|^void "


def names() -> set[str]:
    """The __global__ functions in the sources."""
    files = [*build.KERNELS.glob("*/*.cu"), *build.KERNELS.glob("*/*.cuh")]
    return set().union(*(re.findall(_GLOBAL, path.read_text()) for path in files))


def compiled(of: build.Build) -> dict[int, str]:
    """Offset in the library -> name, for every instantiation."""
    command = ["nm", "--demangle", str(of.module)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = names()
    found = {}
    for offset, function in re.findall(r"^([0-9a-f]+) [tTwW] (.*\))$", listing, re.MULTILINE):
        kernel = re.match(r"(\w+)(<[^()]*(\(\w+\)\d+)?>)?\(", re.sub(_NAMESPACES, "", function))
        if kernel and kernel[1] in expected:
            found[int(offset, 16)] = kernel[0].removesuffix("(")
    missing = expected - {name.partition("<")[0] for name in found.values()}
    assert not missing, f"not in {of.module}: {missing}"
    return found


def not_run(of: build.Build, log: Path) -> list[str]:
    """The names of the kernels that are not in `log`, which the library wrote as it was unloaded.

    A header's kernel has a copy in each file that includes it, which an optimizer may drop: one has to run.
    """
    ran = {int(line, 16) for line in log.read_text().split()}
    kernels = compiled(of)
    return sorted(
        set(kernels.values()) - {name for offset, name in kernels.items() if offset in ran}
    )
