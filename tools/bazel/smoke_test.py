#!/usr/bin/env python3
"""Loads the extension that Bazel built, registers its handlers and makes one real call."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    registrations = module.registrations()
    for target, capsule in registrations.items():
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")

    keys = jnp.array([[[0, 3, 5]]], jnp.int32)  # 5 is padding: the grid has 5 sites
    values = jnp.array([[[1.0, 2.0, 3.0]]])
    to_dense = jax.ffi.ffi_call("ilajax_to_dense_fwd", jax.ShapeDtypeStruct((1, 1, 5), jnp.float32))
    np.testing.assert_array_equal(jax.jit(to_dense)(keys, values), [[[1, 0, 0, 2, 0]]])
    print(f"{path}: {len(registrations)} targets, ilajax_to_dense_fwd is right")


if __name__ == "__main__":
    main(sys.argv[1])
