"""Prints as JSON what is tested: versions, commit, and the FFI targets that are registered on this platform.

python -m benchmarks.gpu_check.probe [arguments of the check]
"""

import importlib
import json
import sys

import jax

from benchmarks import timing


def main() -> None:
    """Fails where the extension for the default device cannot be loaded."""
    name = "_cuda" if jax.default_backend() == "gpu" else "_cpu"
    targets = sorted(importlib.import_module(f"ilajax.{name}").registrations())
    provenance = timing.provenance("benchmarks.gpu_check", sys.argv[1:])
    print(json.dumps(provenance | {"targets": targets}))


if __name__ == "__main__":
    main()
