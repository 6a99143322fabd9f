"""ilajax: convolutional networks on sparse data in JAX."""

from ilajax import data, export, models, nn, optim
from ilajax.ffi.routes import Backend, Route, backend
from ilajax.geometry import capacity
from ilajax.ops.add import add
from ilajax.ops.concatenate import concatenate
from ilajax.ops.conv import ConvResult, conv
from ilajax.ops.conv_transpose import conv_transpose
from ilajax.ops.convert import from_dense, to_dense
from ilajax.ops.k_select import k_select
from ilajax.ops.points import from_points
from ilajax.ops.pointwise import relu
from ilajax.ops.pool import avg_pool, global_avg_pool, global_max_pool, max_pool, sum_pool
from ilajax.ops.sample import sample
from ilajax.ops.upsample import upsample
from ilajax.plotting import plot
from ilajax.sparse_kernel import SparseKernel
from ilajax.sparse_tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "ConvResult",
    "Route",
    "SparseKernel",
    "SparseTensor",
    "add",
    "avg_pool",
    "backend",
    "capacity",
    "concatenate",
    "conv",
    "conv_transpose",
    "data",
    "export",
    "from_dense",
    "from_points",
    "global_avg_pool",
    "global_max_pool",
    "k_select",
    "max_pool",
    "models",
    "nn",
    "optim",
    "plot",
    "relu",
    "sample",
    "sum_pool",
    "to_dense",
    "upsample",
]
