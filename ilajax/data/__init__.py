"""From raw data to batches, in NumPy alone: for the workers of a data loader."""

from ilajax.data.voxelize import Voxels, voxelize

__all__ = ["Voxels", "voxelize"]
