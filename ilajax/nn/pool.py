"""Pooling modules, for models built as a list of layers."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from ilajax import geometry
from ilajax.geometry import pool_window
from ilajax.ops.pool import avg_pool, check_over, global_avg_pool, global_max_pool, max_pool
from ilajax.sparse_tensor import SparseTensor, check_sparse


class _Pool(nnx.Module):
    """Cells of `window` sites, and a bound on the output's density."""

    _pool: Callable[..., SparseTensor]

    def __init__(self, window: int | Sequence[int], density_bound: float | None = None):
        self.window = window if isinstance(window, int) else tuple(window)
        if density_bound is not None:
            geometry.capacity(density_bound, (1,))
        self.density_bound = density_bound

    def __call__(self, x: SparseTensor) -> SparseTensor:
        check_sparse("x", x)
        capacity = None
        if self.density_bound is not None:
            output_shape = pool_window(x.spatial_shape, self.window).output_shape
            capacity = geometry.capacity(self.density_bound, output_shape)
        return type(self)._pool(x, self.window, capacity=capacity)


class MaxPool(_Pool):
    """Maximum over the stored entries of non-overlapping cells, `ilajax.max_pool` as a module.

    Args:
      window: sites of a cell along each axis; one integer for all.
      density_bound: the largest share of output sites that each channel may store, in (0, 1]. None: as many
        slots as the input has (or output sites, if fewer), so that nothing is ever cut.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor [B, *ceil(S / window), C].

    Raises:
      TypeError, ValueError: if the bound lies outside (0, 1] or the window does not fit the grid's rank.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> ilajax.nn.MaxPool(2)(x).shape
      (1, 4, 4, 1)

    Source: Hackel et al., section 3, "Pooling layer".
    """

    _pool = staticmethod(max_pool)


class AvgPool(_Pool):
    """Mean over non-overlapping cells, `ilajax.avg_pool` as a module.

    The sum over a cell's stored entries is divided by the number of the cell's sites inside the grid, so the
    result equals dense average pooling.

    Args:
      window: sites of a cell along each axis; one integer for all.
      density_bound: as in `MaxPool`.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor [B, *ceil(S / window), C].

    Raises:
      TypeError, ValueError: if the bound lies outside (0, 1] or the window does not fit the grid's rank.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> ilajax.nn.AvgPool(2)(x).shape
      (1, 4, 4, 1)
    """

    _pool = staticmethod(avg_pool)


class GlobalPool(nnx.Module):
    """Mean or maximum over the whole grid: the way from sparse layers to dense ones.

    Args:
      mode: "avg", `ilajax.global_avg_pool`, or "max", `ilajax.global_max_pool`.
      over: of "avg", what the sum is divided by: "stored" entries (the default here, as in other sparse
        libraries), or all "sites".

    Call:
      x: SparseTensor [B, *S, C]. Returns an array [B, C].

    Raises:
      TypeError, ValueError: if an argument has a wrong type or value.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> ilajax.nn.GlobalPool()(x)
      Array([[1.]], dtype=float32)
    """

    def __init__(self, mode: str = "avg", *, over: str = "stored"):
        if mode not in ("avg", "max"):
            raise ValueError(f"mode must be 'avg' or 'max', got {mode!r}.")
        check_over(over)
        self.mode, self.over = mode, over

    def __call__(self, x: SparseTensor) -> jax.Array:
        return global_max_pool(x) if self.mode == "max" else global_avg_pool(x, over=self.over)
