"""ResNet: residual networks on shared supports, for classification."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from ilajax.models.residual import Maker, check_input, check_levels, stage
from ilajax.nn.pool import GlobalPool
from ilajax.sparse_tensor import SparseTensor

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class ResNet(nnx.Module):
    """A classifier of residual blocks at four resolutions, for maps with a shared support.

    | | layers | resolution |
    |---|---|---|
    | stem | 3^d, submanifold | that of the input |
    | stages 1 to 4 | (2, 2, 2, 2) or (3, 4, 6, 3) blocks of two 3^d | halved by each |
    | head | mean over stored sites, dropout, a dense layer | |

    It is MinkowskiEngine's ResNet18 or 34, with these differences. The stem keeps the resolution, where
    theirs has stride 2 and a pooling behind it, so that grids of 32^3 have sites left after four stages.
    There is no convolution of stride 3 before the head. All normalisation is by batch. A stride reaches the
    sites whose window holds a stored one, as in spconv, and keeps the strongest up to the level's density
    bound (attention by site, which limits the memory of every level); theirs reaches the cells that hold one.

    Attributes:
      stem: the first convolution, its normalisation and ReLU.
      stages: lists of residual blocks.
      logits: the dense layer.

    Args:
      depth: 10, 18 or 34.
      in_features: channels of the input.
      num_classes: number of outputs.
      density_bounds: the largest share of the sites that a level may store: one for each stage. With `dilate`
        a first one, for the resolution of the input. On surfaces the share doubles from level to level.
      features: channels of the stages, the stem's are the first ones.
      rank: axes of the grid.
      dilate: whether blocks reach new sites, up to the bounds, instead of the input's and the strides' alone.
      dropout: rate of the dropout before the dense layer.
      axis_name, dtype, param_dtype, rngs: as in `ilajax.nn.Conv`; `rngs` has `params` and `dropout`.

    Call:
      x: SparseTensor [B, *S, in_features] with a shared support. Returns logits [B, num_classes].

    Raises:
      TypeError, ValueError: naming the argument, what it got, and what to do.

    Example:
      >>> x = ilajax.from_points(
      ...     np.array([[1, 2, 3], [4, 5, 6]]),
      ...     np.ones((2, 1)),
      ...     spatial_shape=(16,) * 3,
      ...     batch_size=1,
      ...     capacity=2,
      ... )
      >>> model = ilajax.models.ResNet(
      ...     10, 1, 5, density_bounds=(0.2, 0.4, 0.8, 1), features=(4, 4, 8, 8), rngs=nnx.Rngs(0)
      ... )
      >>> model(x).shape
      (1, 5)

    Source: He et al., "Deep residual learning for image recognition"; Choy et al., "4D spatio-temporal
    ConvNets". The density bounds are the paper's attention.
    """

    def __init__(
        self,
        depth: int,
        in_features: int,
        num_classes: int,
        *,
        density_bounds: Sequence[float],
        features: Sequence[int] = (64, 128, 256, 512),
        rank: int = 3,
        dilate: bool = False,
        dropout: float = 0.0,
        axis_name: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {tuple(BLOCKS)}, got {depth!r}.")
        if len(features) != len(BLOCKS[depth]):
            raise ValueError(
                f"features must have four numbers, one a stage, got {tuple(features)}."
            )
        what = "the input's resolution and each stage" if dilate else "each stage"
        bounds = check_levels(what, density_bounds, len(features) + dilate, features)
        make = Maker(rank, axis_name, dtype, param_dtype, rngs)
        self.in_features, self.rank = in_features, rank
        first = bounds[0] if dilate else None
        self.stem = make.step(in_features, features[0], 3, density_bound=first)
        self.stages: nnx.List[Any] = nnx.List()
        before = features[0]
        for blocks, channels, bound in zip(BLOCKS[depth], features, bounds[dilate:], strict=True):
            options = {"rank": rank, "density_bound": bound, "dilate": dilate, "dtype": dtype}
            options |= {"axis_name": axis_name, "param_dtype": param_dtype, "rngs": rngs}
            self.stages.append(stage(blocks, before, channels, strides=2, **options))
            before = channels
        self.pool = GlobalPool("avg", over="stored")
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        dtypes = {"dtype": dtype} | ({} if param_dtype is None else {"param_dtype": param_dtype})
        self.logits = nnx.Linear(before, num_classes, rngs=rngs, **dtypes)

    def __call__(self, x: SparseTensor) -> jax.Array:
        check_input(x, self.rank, self.in_features)
        x = self.stem(x)
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.logits(self.dropout(self.pool(x)))
