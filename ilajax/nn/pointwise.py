"""Modules that treat each stored entry by itself: ReLU and Dropout."""

from typing import Any

import jax
from flax import nnx

from ilajax.sparse_tensor import SparseTensor, check_sparse


class ReLU(nnx.Module):
    """max(x, 0) of the stored entries, `x.map(jax.nn.relu)` as a module; the support stays as it is.

    `ilajax.relu` drops what is not above 0 instead, after which each channel has keys of its own. A `Conv`
    with `select="positive"` needs no ReLU behind it.

    Call:
      x: SparseTensor [B, *S, C]. Returns a SparseTensor with the keys of x.

    Raises:
      TypeError: if x is not a SparseTensor.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[3.0, -5.0, 0.0, 1.0]])[..., None], capacity=3)
      >>> ilajax.nn.ReLU()(x).values
      Array([[[3., 0., 1.]]], dtype=float32)
    """

    def __call__(self, x: SparseTensor) -> SparseTensor:
        check_sparse("x", x)
        return x.map(jax.nn.relu)


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout` of the stored entries: some become 0, the rest grow by 1 / (1 - rate).

    Args:
      rate, deterministic, rng_collection, rngs: as in `flax.nnx.Dropout`. `broadcast_dims` are those of the
        values [B, C, K]: (1,) drops whole sites of a shared support, (2,) whole channels of a sample.

    Call:
      x: SparseTensor [B, *S, C].
      deterministic, rngs: as in `flax.nnx.Dropout`.

      Returns a SparseTensor with the keys of x.

    Raises:
      TypeError: if x is not a SparseTensor.

    Example:
      >>> x = ilajax.from_dense(jnp.ones((1, 4, 1)), capacity=4)
      >>> drop = ilajax.nn.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> set(drop(x).values.ravel().tolist()) <= {0.0, 2.0}
      True
    """

    def __call__(self, x: SparseTensor, **options: Any) -> SparseTensor:  # type: ignore[override]
        check_sparse("x", x)
        return x.with_values(super().__call__(x.values, **options))
