"""The one door to native code: what is installed, what runs where, and how calls are mapped and sharded."""

from ilajax.ffi.calls import SiteMap, dispatch, result
from ilajax.ffi.meshes import Outputs, place, split_by_type, vary_together
from ilajax.ffi.routes import Backend, Route, backend, declare

__all__ = [
    "Backend",
    "Outputs",
    "Route",
    "SiteMap",
    "backend",
    "declare",
    "dispatch",
    "place",
    "result",
    "split_by_type",
    "vary_together",
]
