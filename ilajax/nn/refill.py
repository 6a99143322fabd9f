"""Makes the filters of a pruned model full again."""

from typing import Any

import jax

from ilajax.nn.conv import Conv, iter_convs
from ilajax.nn.slots import dotted
from ilajax.sparse_kernel import SparseKernel, check_kernel_keys


def refill(model: Any) -> None:
    """Puts the removed weights of every `Conv` in a model back, at 0 and live.

    Pruning finds a pattern that suits one training set. Refill the filters before you tune a pruned model to
    other data. The network's output stays the same, up to the order in which its float32 sums are formed.
    Create a new optimizer afterwards: the state of the old one belongs to the pruned weights, and would hold
    them at 0.

    Args:
      model: the NNX module, changed in place.

    Raises:
      ValueError: if `kernel_keys` are out of order. Inside `nnx.jit`, where they are not known yet, this is
        not checked.

    Example:
      >>> layer = ilajax.nn.Conv(1, 2, (3,), density_bound=1.0, kernel_density=0.5, rngs=nnx.Rngs(0))
      >>> ilajax.nn.refill(layer)
      >>> layer.kernel.shape
      (6,)

    Source: Hackel et al., section 4, "Regularisation and pruning", last paragraph.
    """
    for path, conv in iter_convs(model):
        if not isinstance(conv.kernel_keys[...], jax.core.Tracer):
            name = dotted((*path, "kernel_keys"))
            check_kernel_keys(name, conv.kernel_keys[...], conv.kernel_shape)

        def full(keys: jax.Array, values: jax.Array, conv: Conv = conv) -> Any:
            kernel = SparseKernel(keys, values, conv.kernel_shape).refill(conv.feature_group_count)
            return kernel.keys, kernel.values

        # Layers that nnx.vmap stacked, say for nnx.scan, have leading axes.
        for _ in range(conv.kernel.ndim - 1):
            full = jax.vmap(full)
        keys, values = full(conv.kernel_keys[...], conv.kernel[...])
        conv.kernel_keys.set_value(keys)
        conv.kernel.set_value(values)
