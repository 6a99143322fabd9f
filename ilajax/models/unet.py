"""UNet: a network for labels of sites and points, down to coarse resolutions and up again."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from ilajax.models.residual import Maker, check_input, check_levels, stage
from ilajax.nn.conv import ConvTranspose
from ilajax.ops.concatenate import concatenate
from ilajax.sparse_tensor import SparseTensor

# Of the four levels down, then the four up.
BLOCKS = {14: (1,) * 8, 18: (2,) * 8, 34: (2, 3, 4, 6, 2, 2, 2, 2)}


class UNet(nnx.Module):
    """Residual blocks at five resolutions, down and up, with a skip at each, for maps with a shared support.

    | | layers | sites |
    |---|---|---|
    | stem | 5^d | the input's |
    | 4 levels down | 2^d with stride 2, residual blocks | the cells that hold one, up to the bound |
    | 4 levels up | 2^d transposed, the skip beside it, residual blocks | those of the skip |
    | head | 1^d | the input's |

    It is MinkowskiEngine's MinkUNet14, 18 or 34 (by default with the channels of the "A" variants), if the
    bounds cut nothing: then every layer has the same sites and the same number of products. Where a level has
    more cells than its bound allows, the strongest stay (attention by site), so that memory and time have a
    limit. Behind every convolution but the last comes a normalisation by batch.

    Attributes:
      stem: the first convolution, its normalisation and ReLU.
      down, encoder: for each level down, the step and the blocks.
      up, decoder: for each level up, the step and the blocks.
      head: the last convolution.

    Args:
      depth: 14, 18 or 34.
      in_features: channels of the input.
      out_features: channels of the output, such as the number of classes.
      density_bounds: the largest share of the sites that a level may store: one for each of the four levels
        down. On surfaces the share doubles from level to level.
      features: channels of the four levels down and the four up.
      stem_features: channels of the stem.
      rank: axes of the grid.
      dilate: whether the blocks of the four levels down reach new sites, up to the bounds. The way up goes
        back to the sites of the skips, and ends at the input's.
      axis_name, dtype, param_dtype, rngs: as in `ilajax.nn.Conv`.

    Call:
      x: SparseTensor [B, *S, in_features] with a shared support. Returns a SparseTensor with its keys, for
        points by `ilajax.sample`.

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
      >>> model = ilajax.models.UNet(
      ...     14,
      ...     1,
      ...     5,
      ...     density_bounds=(0.1, 0.2, 0.4, 0.8),
      ...     features=(4,) * 8,
      ...     stem_features=4,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> model(x).values.shape
      (1, 5, 2)

    Source: Choy et al., "4D spatio-temporal ConvNets"; Ronneberger et al., "U-Net". The density bounds are
    the paper's attention.
    """

    def __init__(
        self,
        depth: int,
        in_features: int,
        out_features: int,
        *,
        density_bounds: Sequence[float],
        features: Sequence[int] = (32, 64, 128, 256, 128, 128, 96, 96),
        stem_features: int = 32,
        rank: int = 3,
        dilate: bool = False,
        axis_name: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {tuple(BLOCKS)}, got {depth!r}.")
        if len(features) != len(BLOCKS[depth]):
            raise ValueError(
                f"features must have eight numbers, four levels down and four up, got {tuple(features)}."
            )
        levels = len(features) // 2
        every = (*features, stem_features)
        bounds = check_levels("each level down", density_bounds, levels, every)
        make = Maker(rank, axis_name, dtype, param_dtype, rngs)
        options: dict[str, Any] = {"rank": rank, "dtype": dtype, "param_dtype": param_dtype}
        options |= {"axis_name": axis_name, "rngs": rngs}
        self.in_features, self.rank = in_features, rank
        self.stem = make.step(in_features, stem_features, 5)
        self.down: nnx.List[Any] = nnx.List()
        self.encoder: nnx.List[Any] = nnx.List()
        self.up: nnx.List[Any] = nnx.List()
        self.decoder: nnx.List[Any] = nnx.List()
        skips = [stem_features, *features[: levels - 1]]
        before = stem_features
        for blocks, channels, bound in zip(
            BLOCKS[depth][:levels], features[:levels], bounds, strict=True
        ):
            self.down.append(make.step(before, before, 2, strides=2, density_bound=bound))
            reach = options | {"density_bound": bound, "dilate": dilate}
            self.encoder.append(stage(blocks, before, channels, **reach))
            before = channels
        for blocks, channels, skip in zip(
            BLOCKS[depth][levels:], features[levels:], reversed(skips), strict=True
        ):
            up = make.conv(before, channels, 2, kind=ConvTranspose, strides=2, support="given")
            self.up.append(nnx.List([up, make.norm(channels)]))
            self.decoder.append(stage(blocks, channels + skip, channels, **options))
            before = channels
        self.head = make.conv(before, out_features, 1, use_bias=True)

    def __call__(self, x: SparseTensor) -> SparseTensor:
        check_input(x, self.rank, self.in_features)
        x = self.stem(x)
        skips = []
        for down, blocks in zip(self.down, self.encoder, strict=True):
            skips.append(x)
            x = down(x)
            for block in blocks:
                x = block(x)
        for (up, norm), blocks in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = norm(up(x, support=skip)).map(nnx.relu)
            x = concatenate([x, skip], same_support=True)
            for block in blocks:
                x = block(x)
        return self.head(x)
