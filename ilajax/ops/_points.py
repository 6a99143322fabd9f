"""Points in one list [N, ...], or in one for each sample [B, N, ...]: what the operations on them share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilajax import ffi


def as_array(a: Any) -> Any:
    """As NumPy, unless it is JAX's."""
    return a if isinstance(a, jax.Array) else np.asarray(a)


def as_batch_index(batch_index: Any, points: Any) -> Any:
    """The sample of each point as an array; by default, for points [B, N, d], the number of its row."""
    if batch_index is not None:
        return as_array(batch_index)
    if points.ndim == 3:
        of_library = jnp if isinstance(points, jax.Array) else np
        return of_library.broadcast_to(rows(points), points.shape[:2])
    raise TypeError(
        "batch_index is required for points in one list, got None. It may be left out where points have a "
        "batch axis in front, [B, N, d]."
    )


def rows(array: Any) -> Any:
    """int32[B, 1], the number of each row; of JAX where the array is."""
    of_library = jnp if isinstance(array, jax.Array) else np
    return of_library.arange(array.shape[0], dtype=np.int32)[:, None]


def by_sample(
    function: Callable[..., Any], arrays: Sequence[Any], batch_index: jax.Array | np.ndarray
) -> Any:
    """`function(*arrays, index)` of each sample by itself, on the device that the sample lies on.

    Args:
      function: of one sample's arrays and an index [N], which is 0, or -1 at padding points.
      arrays: [B, ...].
      batch_index: int32[B, N], where a point counts if it holds the number of its row.
    """

    def of_samples(numbers, batch_index, *arrays):
        return (jax.vmap(function)(*arrays, jnp.where(batch_index == numbers, 0, -1)),)

    operands = [jnp.asarray(a) for a in (rows(batch_index), batch_index, *arrays)]
    return ffi.split_by_type(of_samples, operands, [True] * len(operands))[0]


def as_int32(a: Any) -> Any:
    """Narrowed. What does not fit saturates, outside of every grid: wrapped around it might lie inside."""
    if a.dtype == np.int32:
        return a
    own, narrow = np.iinfo(a.dtype), np.iinfo(np.int32)
    return a.clip(max(own.min, narrow.min), min(own.max, narrow.max)).astype(np.int32)


def first(mask: np.ndarray) -> str:
    """The first point under a mask, for an error: "3", or "3 of sample 1"."""
    *sample, point = np.argwhere(mask)[0].tolist()
    return f"{point} of sample {sample[0]}" if sample else f"{point}"


def check_batch_index(batch_index: np.ndarray, batch_size: int) -> None:
    """Raises ValueError unless each point is in the batch, in the sample of its row if it has one, or -1."""
    real = batch_index != -1
    wrong = real & ((batch_index < 0) | (batch_index >= batch_size))
    expected = f"lie in [0, {batch_size})"
    if batch_index.ndim == 2 and not wrong.any():
        wrong, expected = real & (batch_index != rows(batch_index)), "be its row's number"
    if wrong.any():
        raise ValueError(
            f"batch_index of point {first(wrong)} is {int(batch_index[wrong][0])}, but must {expected}, or "
            f"be -1 for a padding point, which does not count."
        )


def check_not_split(argument: str, array: Any) -> None:
    """Raises ValueError where types say that what goes with one list of points is sharded."""
    spec = () if isinstance(array, np.ndarray) else jax.typeof(array).sharding.spec
    if spec and spec[0] is not None:
        raise ValueError(
            f"{argument} is sharded over {spec[0]!r}, and one list of points does not say which device needs "
            f"which point. Give the points with a batch axis in front, [B, N, d], sharded as the batch is."
        )
