"""Flax NNX modules whose feature maps are sparse tensors."""

from ilajax.nn.conv import Conv, ConvTranspose, Density, KernelKeys, iter_convs
from ilajax.nn.load_state import load_state
from ilajax.nn.pool import AvgPool, MaxPool
from ilajax.nn.refill import refill

__all__ = [
    "AvgPool",
    "Conv",
    "ConvTranspose",
    "Density",
    "KernelKeys",
    "MaxPool",
    "iter_convs",
    "load_state",
    "refill",
]
