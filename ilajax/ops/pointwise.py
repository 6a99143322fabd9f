"""Operations on each stored entry by itself."""

from ilajax.ops.k_select import k_select
from ilajax.sparse_tensor import SparseTensor, check_sparse


def relu(x: SparseTensor) -> SparseTensor:
    """Drops the stored entries that are 0 or less and closes the gaps; NaN is kept.

    The same as a k-selection by "positive" that cuts nothing, and computed as one. The gradient flows to
    the entries that stay. A shared support does not stay shared, since channels lose different sites:
    `x.map(jax.nn.relu)` sets them to 0 instead and keeps it.

    Args:
      x: the tensor.

    Returns:
      A SparseTensor of the same capacity, with keys for each channel.

    Raises:
      TypeError: if x is not a SparseTensor.

    Example:
      >>> x = ilajax.from_dense(jnp.array([[3.0, -5.0, 0.0, 1.0]])[..., None], capacity=4)
      >>> ilajax.relu(x).counts
      Array([[2]], dtype=int32)
    """
    check_sparse("x", x)
    return k_select(x, x.capacity, select="positive")
