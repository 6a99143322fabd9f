"""Prints what is tested as JSON; fails where the extension for the default device cannot be loaded."""

import importlib
import json

import jax

from benchmarks import timing

if __name__ == "__main__":
    name = "_cuda" if jax.default_backend() == "gpu" else "_cpu"
    targets = sorted(importlib.import_module(f"ilajax.{name}").registrations())
    print(json.dumps(timing.provenance("benchmarks.gpu_check.probe", None) | {"targets": targets}))
