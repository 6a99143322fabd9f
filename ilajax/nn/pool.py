"""Pooling modules, for models built as a list of layers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from ilajax import geometry
from ilajax.geometry import Padding, check_padding, pool_window
from ilajax.ops.pool import (
    avg_pool,
    check_over,
    global_avg_pool,
    global_max_pool,
    max_pool,
    sum_pool,
)
from ilajax.sparse_tensor import SparseTensor, check_sparse


class _Pool(nnx.Module):
    """Windows, and a bound on the output's density."""

    _pool: Callable[..., SparseTensor]

    def __init__(
        self,
        window: int | Sequence[int],
        density_bound: float | None = None,
        *,
        strides: int | Sequence[int] | None = None,
        padding: Padding | None = None,
    ):
        self.window = _hashable(window)
        self.strides = None if strides is None else _hashable(strides)
        rank = len(padding) if isinstance(padding, list | tuple) else 1
        self.padding = None if padding is None else check_padding(padding, rank)
        if density_bound is not None:
            geometry.capacity(density_bound, (1,))
        self.density_bound = density_bound

    def __call__(self, x: SparseTensor) -> SparseTensor:
        check_sparse("x", x)
        capacity = None
        if self.density_bound is not None:
            windows = pool_window(x.spatial_shape, self.window, self.strides, self.padding)
            capacity = geometry.capacity(self.density_bound, windows.output_shape)
        where = {"strides": self.strides, "padding": self.padding}
        return self._pool(x, self.window, **where, capacity=capacity)


def _hashable(sizes: int | Sequence[int]) -> int | tuple[int, ...]:
    return sizes if isinstance(sizes, int) else tuple(sizes)


class MaxPool(_Pool):
    """Maximum over the stored entries of each window, `ilajax.max_pool` as a module.

    Args:
      window: sites of a window along each axis; one integer for all.
      density_bound: the largest share of output sites that each channel may store, in (0, 1]. None: as many
        slots as can be needed, so that nothing is ever cut.
      strides, padding: as in `ilajax.max_pool`; without them windows are cells side by side.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor [B, *ceil(S / window), C], or on the grid of windows.

    Raises:
      TypeError, ValueError: if the bound lies outside (0, 1] or the window does not fit the grid's rank.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> ilajax.nn.MaxPool(2)(x).shape, ilajax.nn.MaxPool(3, strides=2)(x).shape
      ((1, 4, 4, 1), (1, 4, 4, 1))

    Source: Hackel et al., section 3, "Pooling layer".
    """

    _pool = staticmethod(max_pool)


class SumPool(_Pool):
    """Sum over the stored entries of each window, `ilajax.sum_pool` as a module.

    Args:
      window, density_bound, strides, padding: as in `MaxPool`.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor [B, *ceil(S / window), C], or on the grid of windows.

    Raises:
      TypeError, ValueError: if the bound lies outside (0, 1] or the window does not fit the grid's rank.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> ilajax.nn.SumPool(2)(x).values
      Array([[[2., 2., 2., 2.]]], dtype=float32)
    """

    _pool = staticmethod(sum_pool)


class AvgPool(_Pool):
    """Mean over each window, `ilajax.avg_pool` as a module.

    Args:
      window, density_bound, strides, padding: as in `MaxPool`.
      count: what a sum is divided by: the "sites" of the window inside the grid, as in dense average pooling,
        or its "stored" entries.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor [B, *ceil(S / window), C], or on the grid of windows.

    Raises:
      TypeError, ValueError: if the bound lies outside (0, 1] or the window does not fit the grid's rank.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(8)[None, ..., None], capacity=8)
      >>> ilajax.nn.AvgPool(2)(x).values
      Array([[[0.5, 0.5, 0.5, 0.5]]], dtype=float32)
    """

    def __init__(
        self,
        window: int | Sequence[int],
        density_bound: float | None = None,
        *,
        strides: int | Sequence[int] | None = None,
        padding: Padding | None = None,
        count: str = "sites",
    ):
        super().__init__(window, density_bound, strides=strides, padding=padding)
        check_over(count, "count")
        self.count = count

    def _pool(self, x: SparseTensor, window: int | Sequence[int], **options: Any) -> SparseTensor:
        return avg_pool(x, window, count=self.count, **options)


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
