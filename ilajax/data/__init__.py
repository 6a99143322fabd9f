"""From raw data to batches, in NumPy only: for the workers of a data loader."""

from ilajax.data.meshes import mesh_voxels
from ilajax.data.voxelize import Voxels, voxelize

__all__ = ["Voxels", "mesh_voxels", "voxelize"]
