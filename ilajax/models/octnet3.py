"""OctNet3: the classification networks of the paper's experiments, sparse and dense."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ilajax.geometry import positive, sites
from ilajax.models._dense import conv_general_dilated, max_pool
from ilajax.nn.conv import Conv, Initializer
from ilajax.nn.pool import MaxPool
from ilajax.ops.convert import from_dense, to_dense
from ilajax.ops.pointwise import relu
from ilajax.sparse_tensor import SparseTensor, check_sparse


class Architecture(NamedTuple):
    """One column of the paper's table 2."""

    input_shape: tuple[int, ...]
    sparse: tuple[int, ...]  # channels of the sparse blocks
    density_bounds: tuple[float, ...]  # of the sparse blocks
    dense: tuple[int, ...] = ()  # channels of the dense blocks that follow


# "24" is the paper's name for the network on the 28 x 28 pixels of MNIST. For 256^3 the bounds are those of
# 128^3, one block later: a surface meets half as large a share of the sites there.
TABLE_2 = {
    16: Architecture((16,) * 3, (8, 16), (0.33, 0.33)),
    24: Architecture((28,) * 2, (8, 16), (0.095, 0.19)),
    32: Architecture((32,) * 3, (8, 16, 24), (0.14, 0.33, 0.66)),
    64: Architecture((64,) * 3, (8, 16, 24), (0.06, 0.14, 0.33), (32,)),
    128: Architecture((128,) * 3, (8, 16, 24), (0.02, 0.06, 0.14), (32, 40)),
    256: Architecture((256,) * 3, (8, 16, 24), (0.01, 0.02, 0.06), (32, 40, 48)),
}

HIDDEN_FEATURES = 1024


class Layer(NamedTuple):
    """A line of `OctNet3.summary()`.

    Attributes:
      name: the path of its module, or what happens between modules.
      shape: shape of its output for one sample, (*S, C) or (C,).
      density_bound: share of the sites that a channel may store; None if there is no bound.
      capacity: slots of each channel; None if the output is dense.
      parameters: number of weights and biases.
      bytes: size of the output's keys and values for one sample, or of the dense array.
    """

    name: str
    shape: tuple[int, ...]
    density_bound: float | None
    capacity: int | None
    parameters: int
    bytes: int


class Stage(NamedTuple):
    """A step of a forward pass: its name, the module whose parameters it uses, and what it does."""

    name: str
    module: nnx.Module | None
    call: Callable[[Any], Any]


class Block(nnx.Module):
    """Three convolutions, each with its activation; the first changes the number of channels."""

    def __init__(
        self, layer: Callable[..., nnx.Module], in_features: int, features: int, activation: Any
    ):
        self.conv1 = layer(in_features, features)
        self.conv2 = layer(features, features)
        self.conv3 = layer(features, features)
        self.activation = activation

    def __call__(self, x: Any) -> Any:
        for stage in _block_stages(self):
            x = stage.call(x)
        return x


class OctNet3(nnx.Module):
    """A classifier of blocks of three 3^d convolutions, max pooling between them, and two dense layers.

    | resolution | input | sparse blocks | their bounds | dense blocks |
    |---|---|---|---|---|
    | 16 | 16^3 | 8, 16 | 0.33, 0.33 | |
    | 24 | 28^2 (MNIST) | 8, 16 | 0.095, 0.19 | |
    | 32 | 32^3 | 8, 16, 24 | 0.14, 0.33, 0.66 | |
    | 64 | 64^3 | 8, 16, 24 | 0.06, 0.14, 0.33 | 32 |
    | 128 | 128^3 | 8, 16, 24 | 0.02, 0.06, 0.14 | 32, 40 |
    | 256 | 256^3 | 8, 16, 24 | 0.01, 0.02, 0.06 | 32, 40, 48 |

    Sparse blocks keep positive responses up to their density bound, so they contain the ReLU. The other
    blocks are Flax's convolutions with a ReLU. Pooling has a window of 2 and as many slots as its input, at
    most one per site, so it never cuts. Dropout follows, then a dense layer of 1024 with a ReLU, and one of
    `num_classes`.

    `dense=True` builds the same network with dense layers. Both draw their weights in the same order: the
    same seed gives the same start, and with bounds of 1 and biases of 0 the same outputs. On a CPU the
    dense convolutions of volumes run on ilajax's kernel too, which is several times as fast as XLA's.

    Attributes:
      blocks: list of `Block`, each with conv1, conv2 and conv3; the sparse ones first.
      num_sparse_blocks: how many of them are sparse.
      hidden, logits: the dense layers.

    Args:
      resolution: 16, 24, 32, 64, 128 or 256.
      num_classes: number of outputs.
      density_bounds: one bound in (0, 1] for each sparse block; by default those of the table above. For 16^3
        and 24^2 the paper tries several, and these are the strictest without a loss of accuracy; it has none
        for 256^3. Ignored with dense=True.
      rngs: random streams, `params` and `dropout`.
      dense: whether to build the dense twin.
      dropout: rate of the dropout before the dense layers, in [0, 1).
      in_features: channels of the input.
      select: the selection of the sparse blocks, see `ilajax.conv`; after "value" and "magnitude" comes an
        `ilajax.relu`.
      kernel_density: share of the sparse blocks' weights that exist at the start, see `ilajax.nn.Conv`.
      kernel_init: initialiser of all layers followed by a ReLU. The default, He's, keeps the responses' scale
        from layer to layer; Flax's own halves their variance each time.
      axis_name: over which devices the sparse layers measure their densities, see `ilajax.nn.Conv`.
      dtype: dtype of the computation, see `ilajax.nn.Conv`.
      param_dtype: dtype of the parameters.

    Call:
      x: SparseTensor [B, *S, in_features]; the dense twin takes this or a dense array.
      Returns logits [B, num_classes]. `model.eval()` turns dropout off, and `model.train()` turns it on.

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> model = ilajax.models.OctNet3(24, num_classes=10, rngs=nnx.Rngs(0))
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
        positive("num_classes", num_classes)
        positive("in_features", in_features)
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
            layer: Callable[..., nnx.Module] = functools.partial(
                nnx.Conv, conv_general_dilated=conv_general_dilated, **common
            )
            activation: Callable[[Any], Any] | None = nnx.relu
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
                activation = None if select == "positive" else relu
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
        if self.num_sparse_blocks:
            check_sparse("x", x)
        expected = (*self.input_shape, self.in_features)
        if x.shape[1:] != expected:
            raise ValueError(
                f"x must have the shape (batch, {', '.join(map(str, expected))}), got {x.shape}."
            )
        features: Any = x
        if isinstance(x, SparseTensor) and not self.num_sparse_blocks:
            features = to_dense(x)
        for stage in _stages(self):
            features = stage.call(features)
        return features

    def layers(self) -> list[Layer]:
        """The layers of a forward pass: names, shapes, capacities and parameters, as traced by JAX."""
        structure, state = nnx.split(self)
        shape = (1, *self.input_shape, self.in_features)
        x: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        if self.num_sparse_blocks:
            x = jax.eval_shape(functools.partial(from_dense, capacity=sites(self.input_shape)), x)
        found: list[Layer] = []

        def trace(state: nnx.State, x: Any) -> None:
            model = nnx.merge(structure, state)
            model.eval()  # a measurement may need the axis of a mesh
            for stage in _stages(model):
                x = stage.call(x)
                found.append(_layer(stage, x))

        jax.eval_shape(trace, state, x)
        return found

    def summary(self) -> str:
        """A table of the layers: outputs for one sample, bounds, capacities, parameters, bytes.

        The number of slots, the capacity, is the most entries that a channel can store. A slot takes a key of
        4 bytes, and a value. Parameters are stored weights and biases.
        """
        layers = self.layers()
        lines = [("layer", "output", "bound", "slots", "parameters", "bytes")]
        for layer in layers:
            grid, channels = layer.shape[:-1], layer.shape[-1]
            shape = f"{grid[0]}^{len(grid)} x {channels}" if grid else str(channels)
            bound = "" if layer.density_bound is None else f"{layer.density_bound:g}"
            slots = "" if layer.capacity is None else f"{layer.capacity:,}"
            parameters = f"{layer.parameters:,}" if layer.parameters else ""
            lines.append((layer.name, shape, bound, slots, parameters, f"{layer.bytes:,}"))
        total = sum(layer.parameters for layer in layers)
        size = sum(layer.bytes for layer in layers)
        lines.append(("all", "", "", "", f"{total:,}", f"{size:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = [f"{{:{'<' if at < 2 else '>'}{width}}}" for at, width in enumerate(widths)]
        return "\n".join("  ".join(align).format(*line) for line in lines)


# Functions, not methods: `nnx.capture` takes what a module's methods return for arrays.
def _stages(model: OctNet3) -> Iterator[Stage]:
    """From the input to the logits."""
    for index, block in enumerate(model.blocks):
        if index:
            sparse = index < model.num_sparse_blocks
            yield Stage(f"pool{index}", None, model.pool if sparse else max_pool)
        for name, conv, call in _block_stages(block):
            yield Stage(f"blocks.{index}.{name}", conv, call)
        if index + 1 == model.num_sparse_blocks:
            yield Stage("to_dense", None, to_dense)
    yield Stage("dropout", None, lambda x: model.dropout(x.reshape(x.shape[0], -1)))
    yield Stage("hidden", model.hidden, lambda x: nnx.relu(model.hidden(x)))
    yield Stage("logits", model.logits, model.logits)


def _block_stages(block: Block) -> Iterator[Stage]:
    """The convolutions, each with its activation."""
    for name in ("conv1", "conv2", "conv3"):
        conv = getattr(block, name)
        yield Stage(name, conv, functools.partial(_activated, conv, block.activation))


def _activated(conv: Any, activation: Callable[[Any], Any] | None, x: Any) -> Any:
    return conv(x) if activation is None else activation(conv(x))


def _layer(stage: Stage, x: SparseTensor | jax.Array) -> Layer:
    """The line of a stage whose output is x, a batch of one."""
    parameters = jax.tree.leaves(nnx.state(stage.module, nnx.Param)) if stage.module else []
    return Layer(
        stage.name,
        x.shape[1:],
        getattr(stage.module, "density_bound", None),
        x.capacity if isinstance(x, SparseTensor) else None,
        sum(array.size for array in parameters),
        sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(x)),
    )


def _checked_bounds(density_bounds: Sequence[float] | None, resolution: int) -> tuple[float, ...]:
    if density_bounds is None:
        return TABLE_2[resolution].density_bounds
    blocks = len(TABLE_2[resolution].sparse)
    try:
        bounds = tuple(density_bounds)
    except TypeError:
        bounds = ()
    if len(bounds) != blocks:
        raise ValueError(
            f"density_bounds must have one bound in (0, 1] for each of the {blocks} sparse blocks of "
            f"OctNet3({resolution}), got {density_bounds!r}."
        )
    return bounds
