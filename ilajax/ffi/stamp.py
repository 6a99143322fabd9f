"""Which GPUs the CUDA kernels have been checked on: `python -m ilajax check` leaves a stamp for each.

A stamp is a file in the user's cache folder. It holds for one kind of GPU, one driver, one build of the
kernels and one version of JAX; with any other the kernels are to be checked again.
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import jax

from ilajax.ffi.registry import extensions

# Whether the kernels are on without a stamp: True from their first clean `make gpu-check` on.
PROVEN = False


def unchecked() -> str:
    """Why the kernels are not used on this machine's GPUs until they have been checked; "" if they have."""
    if PROVEN:
        return ""
    for device in sorted({device.device_kind for device in jax.devices("cuda")}):
        if not _path(device).exists():
            return (
                f"The kernels have not been checked on {device} yet. Check them once, in about a minute: "
                f"python -m ilajax check"
            )
    return ""


def write(facts: dict[str, object]) -> list[Path]:
    """Stamps this machine's GPUs; returns the stamps."""
    paths = [_path(kind) for kind in sorted({d.device_kind for d in jax.devices("cuda")})]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(fresh, path)
    return paths


def _path(device: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    module = extensions["cuda"].module
    facts = [device, str(module.driver_version()), jax.__version__, _digest(module.__file__)]
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return Path(cache) / "ilajax" / f"checked-{name}.json"


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
