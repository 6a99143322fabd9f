"""Makes the filters of a pruned model full again."""

from typing import Any

import jax

from ilajax.nn.conv import iter_convs
from ilajax.sparse_kernel import SparseKernel


def refill(model: Any) -> None:
    """Re-enters the removed weights of every `Conv` in a model at 0, where they are live again.

    Pruning finds the pattern that suits one training set; before a pruned model is tuned to other data, its
    filters are made full. The network's output stays the same. Create the optimizer anew afterwards: the old
    one's state belongs to the pruned weights, and would hold them at 0.

    Args:
      model: the NNX module, changed in place.

    Example:
      >>> layer = ilajax.nn.Conv(1, 2, (3,), density_bound=1.0, kernel_density=0.5, rngs=nnx.Rngs(0))
      >>> ilajax.nn.refill(layer)
      >>> layer.kernel.shape
      (6,)

    Source: Hackel et al., section 4, "Regularisation and pruning", last paragraph.
    """
    for _, conv in iter_convs(model):

        def full(keys: jax.Array, values: jax.Array, shape: Any = conv.kernel_shape) -> Any:
            kernel = SparseKernel(keys, values, shape).refill()
            return kernel.keys, kernel.values

        # Layers that nnx.vmap stacked, say for nnx.scan, have leading axes.
        for _ in range(conv.kernel.ndim - 1):
            full = jax.vmap(full)
        keys, values = full(conv.kernel_keys[...], conv.kernel[...])
        conv.kernel_keys.set_value(keys)
        conv.kernel.set_value(values)
