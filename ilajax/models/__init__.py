"""The paper's networks, and residual ones on shared supports."""

from ilajax.models.octnet3 import OctNet3
from ilajax.models.resnet import ResNet
from ilajax.models.unet import UNet

__all__ = ["OctNet3", "ResNet", "UNet"]
