"""The one door to native code: what is installed, what runs where, and how calls are mapped and sharded."""

from ilajax.ffi.calls import Outputs, call, dispatch, vary_together, window_attributes
from ilajax.ffi.routes import Backend, Route, backend

__all__ = [
    "Backend",
    "Outputs",
    "Route",
    "backend",
    "call",
    "dispatch",
    "vary_together",
    "window_attributes",
]
