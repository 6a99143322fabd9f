"""OctNet3: the classification networks of the paper's experiments, sparse and dense."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ilajax.geometry import sites
from ilajax.models import _dense_conv
from ilajax.nn.conv import Conv, Initializer
from ilajax.nn.pool import MaxPool
from ilajax.ops.convert import to_dense
from ilajax.ops.pointwise import relu
from ilajax.sparse_tensor import SparseTensor, check_sparse


class Architecture(NamedTuple):
    """One column of the paper's table 2.

    Attributes:
      input_shape: the grid.
      sparse: channels of the sparse blocks.
      dense: channels of the dense blocks that follow.
    """

    input_shape: tuple[int, ...]
    sparse: tuple[int, ...]
    dense: tuple[int, ...] = ()


# "24" is the paper's name of the network for the 28 x 28 pixels of MNIST.
TABLE_2 = {
    16: Architecture((16,) * 3, (8, 16)),
    24: Architecture((28,) * 2, (8, 16)),
    32: Architecture((32,) * 3, (8, 16, 24)),
    64: Architecture((64,) * 3, (8, 16, 24), (32,)),
    128: Architecture((128,) * 3, (8, 16, 24), (32, 40)),
    256: Architecture((256,) * 3, (8, 16, 24), (32, 40, 48)),
}

HIDDEN_FEATURES = 1024


class Block(nnx.Module):
    """Three convolutions, each with its activation; the first one changes the number of channels."""

    def __init__(
        self, layer: Callable[..., nnx.Module], in_features: int, features: int, activation: Any
    ):
        self.conv1 = layer(in_features, features)
        self.conv2 = layer(features, features)
        self.conv3 = layer(features, features)
        self.activation = activation

    def __call__(self, x: Any) -> Any:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.activation(conv(x))
        return x


class OctNet3(nnx.Module):
    """A classifier of blocks of three 3^d convolutions, max pooling between them, and two dense layers.

    | resolution | input | sparse blocks | dense blocks |
    |---|---|---|---|
    | 16 | 16^3 | 8, 16 | |
    | 24 | 28^2 (MNIST) | 8, 16 | |
    | 32 | 32^3 | 8, 16, 24 | |
    | 64 | 64^3 | 8, 16, 24 | 32 |
    | 128 | 128^3 | 8, 16, 24 | 32, 40 |
    | 256 | 256^3 | 8, 16, 24 | 32, 40, 48 |

    Sparse blocks keep positive responses up to their density bound, which contains the ReLU; the other blocks
    are Flax's convolutions with a ReLU. Pooling has a window of 2 and as many slots as its input, at most one
    for each site, so that it never cuts. Then follow dropout, a dense layer of 1024 with a ReLU, and one of
    `num_classes`.

    `dense=True` gives the equal dense network. Both draw their weights in the same order: the same seed gives
    the same start, and with bounds of 1 and biases of 0 the same outputs.

    Attributes:
      blocks: list of `Block`, each with conv1, conv2 and conv3; the sparse ones first.
      num_sparse_blocks: how many of them are sparse.
      hidden, logits: the dense layers.

    Args:
      resolution: 16, 24, 32, 64, 128 or 256.
      num_classes: number of outputs.
      density_bounds: one bound in (0, 1] for each sparse block; ignored with dense=True.
      rngs: random streams, `params` and `dropout`.
      dense: whether to build the dense twin.
      dropout: rate of the dropout before the dense layers, in [0, 1).
      in_features: channels of the input.
      select: the selection of the sparse blocks, see `ilajax.conv`; "value" and "magnitude" get an
        `ilajax.relu` behind it.
      kernel_density: share of the sparse blocks' weights that exist at the start, see `ilajax.nn.Conv`.
      kernel_init: initialiser of all layers with a ReLU behind them. The default, He's, keeps the responses'
        scale from layer to layer; Flax's own halves their variance each time, and a network under a strict
        bound then takes several epochs longer to learn.
      axis_name: over which devices the sparse layers measure their densities, see `ilajax.nn.Conv`.
      dtype: dtype of the computation, see `ilajax.nn.Conv`.
      param_dtype: dtype of the parameters.

    Call:
      x: SparseTensor [B, *S, in_features]; the dense twin takes that or the dense array.
      Returns logits [B, num_classes]. `model.eval()` switches dropout off, `model.train()` on.

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> model = ilajax.models.OctNet3(
      ...     24, num_classes=10, density_bounds=(0.095, 0.19), rngs=nnx.Rngs(0))
      >>> images = jnp.zeros((2, 28, 28, 1)).at[:, 4:24, 14].set(1.0)
      >>> model(ilajax.from_dense(images, capacity=200)).shape
      (2, 10)

    Source: Hackel et al., appendix, table 2.
    """

    def __init__(
        self,
        resolution: int,
        *,
        num_classes: int,
        density_bounds: Sequence[float] | None = None,
        rngs: nnx.Rngs,
        dense: bool = False,
        dropout: float = 0.5,
        in_features: int = 1,
        select: str = "positive",
        kernel_density: float = 1.0,
        kernel_init: Initializer = nnx.initializers.he_normal(),
        axis_name: str | tuple[str, ...] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if resolution not in TABLE_2:
            raise ValueError(f"resolution must be one of {tuple(TABLE_2)}, got {resolution!r}.")
        _check_positive("num_classes", num_classes)
        _check_positive("in_features", in_features)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a rate in [0, 1), got {dropout!r}.")
        if dense and kernel_density != 1:
            raise ValueError(
                f"kernel_density needs sparse filters, got {kernel_density!r} with dense=True. Leave it out."
            )
        architecture = TABLE_2[resolution]
        self.input_shape = architecture.input_shape
        self.in_features = in_features
        self.num_sparse_blocks = 0 if dense else len(architecture.sparse)
        bounds = () if dense else _checked_bounds(density_bounds, resolution)

        common: dict[str, Any] = {
            "kernel_size": (3,) * len(self.input_shape),
            "kernel_init": kernel_init,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        widths = architecture.sparse + architecture.dense
        self.blocks: nnx.List[Block] = nnx.List()
        for index, (before, after) in enumerate(itertools.pairwise((in_features, *widths))):
            layer: Callable[..., nnx.Module] = functools.partial(nnx.Conv, **common)
            if index >= len(architecture.sparse):
                layer = functools.partial(
                    layer, conv_general_dilated=_dense_conv.conv_general_dilated
                )
            activation: Callable[[Any], Any] = nnx.relu
            if index < self.num_sparse_blocks:
                layer = functools.partial(
                    Conv,
                    density_bound=bounds[index],
                    select=select,
                    kernel_density=kernel_density,
                    axis_name=axis_name,
                    **common,
                )
                # "positive" is its own activation.
                activation = _identity if select == "positive" else relu
            self.blocks.append(Block(layer, before, after, activation))
        self.pool = MaxPool(2)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        halvings = len(widths) - 1
        last_shape = tuple(size >> halvings for size in self.input_shape)
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        features = sites(last_shape) * widths[-1]
        self.hidden = linear(features, HIDDEN_FEATURES, kernel_init=kernel_init)
        self.logits = linear(HIDDEN_FEATURES, num_classes)

    def __call__(self, x: SparseTensor | jax.Array) -> jax.Array:
        self._check_input(x)
        features: Any = x
        if isinstance(x, SparseTensor) and not self.num_sparse_blocks:
            features = to_dense(x)
        for index, block in enumerate(self.blocks):
            if index:
                sparse = isinstance(features, SparseTensor)
                features = self.pool(features) if sparse else _dense_max_pool(features)
            features = block(features)
            if index + 1 == self.num_sparse_blocks:
                features = to_dense(features)
        features = self.dropout(features.reshape(x.shape[0], -1))
        return self.logits(nnx.relu(self.hidden(features)))

    def _check_input(self, x: SparseTensor | jax.Array) -> None:
        if self.num_sparse_blocks:
            check_sparse("x", x)
        expected = (*self.input_shape, self.in_features)
        if x.shape[1:] != expected:
            raise ValueError(
                f"x must have the shape (batch, {', '.join(map(str, expected))}), got {x.shape}."
            )


def _identity(x: Any) -> Any:
    return x


def _dense_max_pool(x: jax.Array) -> jax.Array:
    window = (2,) * (x.ndim - 2)
    return nnx.max_pool(x, window, strides=window)


def _check_positive(argument: str, value: int) -> None:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument} must be an integer, got {value!r}.") from None
    if count < 1:
        raise ValueError(f"{argument} must be at least 1, got {count}.")


def _checked_bounds(density_bounds: Sequence[float] | None, resolution: int) -> tuple[float, ...]:
    blocks = len(TABLE_2[resolution].sparse)
    try:
        bounds = tuple(density_bounds)  # type: ignore[arg-type]
    except TypeError:
        bounds = ()
    if len(bounds) != blocks:
        raise ValueError(
            f"density_bounds must have one bound in (0, 1] for each of the {blocks} sparse blocks of "
            f"OctNet3({resolution}), got {density_bounds!r}."
        )
    return bounds
