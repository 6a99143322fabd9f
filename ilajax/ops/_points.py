"""Points in one list [N, ...], or in one for each sample [B, N, ...]: what the operations on them share."""

from typing import Any

import jax
import numpy as np


def as_array(a: Any) -> Any:
    """As NumPy, unless it is JAX's."""
    return a if isinstance(a, jax.Array) else np.asarray(a)


def as_batch_index(batch_index: Any, points: tuple[int, ...]) -> Any:
    """The sample of each point as an array; by default, for points [B, N, d], the number of its row."""
    if batch_index is not None:
        return as_array(batch_index)
    if len(points) == 3:
        return rows(points[:2])
    raise TypeError(
        "batch_index is required for points in one list, got None. It may be left out where points have a "
        "batch axis in front, [B, N, d]."
    )


def rows(shape: tuple[int, ...]) -> np.ndarray:
    """int32[B, N], each row's own number."""
    return np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1)


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
        wrong, expected = real & (batch_index != rows(batch_index.shape)), "be its row's number"
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
