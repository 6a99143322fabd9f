"""Stand-ins for extensions and devices that this machine does not have."""

import types

from ilajax.ffi import registry, routes

TARGETS = frozenset(f"ilajax_{name}_fwd" for name in routes.OPERATIONS)


def cuda_module(file, *, driver=13000, runtime=13000, architectures=("80-real", "90-real", "120")):
    """What bind_cuda.cc tells, without its handlers."""
    return types.SimpleNamespace(
        __file__=str(file),
        driver_version=lambda: driver,
        runtime_version=lambda: runtime,
        architectures=lambda: list(architectures),
        devices=lambda: [{"name": "GPU", "capability": (9, 0), "max_shared": 232448}],
        registrations=dict,
    )


def gpu(kind="NVIDIA H100", capability="9.0"):
    """A device as JAX describes it."""
    return types.SimpleNamespace(device_kind=kind, compute_capability=capability)


def extension(module=None, missing=""):
    """One that has all targets, or none."""
    return registry.Extension(frozenset() if missing else TARGETS, module, missing)
