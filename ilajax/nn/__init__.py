"""Flax NNX modules whose feature maps are sparse tensors."""

from ilajax.nn.conv import Conv, ConvTranspose, Density, KernelKeys, iter_convs
from ilajax.nn.load_spconv import load_spconv
from ilajax.nn.load_state import load_state
from ilajax.nn.norm import BatchNorm, GroupNorm, LayerNorm
from ilajax.nn.pointwise import Dropout, ReLU
from ilajax.nn.pool import AvgPool, GlobalPool, MaxPool, SumPool
from ilajax.nn.refill import refill

__all__ = [
    "AvgPool",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Density",
    "Dropout",
    "GlobalPool",
    "GroupNorm",
    "KernelKeys",
    "LayerNorm",
    "MaxPool",
    "ReLU",
    "SumPool",
    "iter_convs",
    "load_spconv",
    "load_state",
    "refill",
]
