"""The networks of the paper."""

from ilajax.models.octnet3 import OctNet3

__all__ = ["OctNet3"]
