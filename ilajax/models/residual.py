"""What `ResNet` and `UNet` are made of: residual blocks, and steps from one resolution to the next."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from ilajax import geometry
from ilajax.geometry import positive
from ilajax.nn.conv import Conv
from ilajax.nn.norm import BatchNorm
from ilajax.nn.pointwise import ReLU
from ilajax.ops.add import add
from ilajax.ops.k_select import k_select
from ilajax.sparse_tensor import SparseTensor, check_sparse

KERNEL_INIT = nnx.initializers.he_normal()


class ResidualBlock(nnx.Module):
    """Two convolutions of 3^d, each with its normalisation, whose sum with the input goes through a ReLU.

    Where the number of channels or the stride changes, the input goes through a convolution of 1^d and its
    normalisation first.

    Attributes:
      conv1, norm1, conv2, norm2: the layers; a submanifold block's `conv1` has the stride.
      shortcut, shortcut_norm: those of the input's own way, or None.

    Args:
      in_features, features: channels of the input and of the output.
      rank: axes of the grid.
      strides: 1, or 2 for the next resolution.
      density_bound: of the output, with a stride or `dilate`.
      dilate: whether the block reaches new sites: its first convolution, and the sum, keep the strongest
        sites up to the bound. Otherwise it responds at the input's sites, or at those that a stride reaches.
      axis_name, dtype, param_dtype, rngs: as in `ilajax.nn.Conv`.

    Call:
      x: SparseTensor [B, *S, in_features] with a shared support. Returns a SparseTensor with one.

    Source: He et al., "Deep residual learning for image recognition", the basic block.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        rank: int,
        strides: int = 1,
        density_bound: float | None = None,
        dilate: bool = False,
        axis_name: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        make = Maker(rank, axis_name, dtype, param_dtype, rngs)
        selects = dilate or strides > 1
        bound = density_bound if selects else None
        self.conv1 = make.conv(in_features, features, 3, strides=strides, density_bound=bound)
        self.norm1 = make.norm(features)
        self.conv2 = make.conv(features, features, 3)
        self.norm2 = make.norm(features)
        self.density_bound = density_bound if dilate else None
        self.shortcut: Conv | None = nnx.data(None)
        self.shortcut_norm: BatchNorm | None = nnx.data(None)
        if strides > 1 or in_features != features:
            support = "given" if strides > 1 else "input"
            self.shortcut = make.conv(in_features, features, 1, strides=strides, support=support)
            self.shortcut_norm = make.norm(features)

    def __call__(self, x: SparseTensor) -> SparseTensor:
        y = self.norm1(self.conv1(x)).map(nnx.relu)
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut(x, support=y if self.shortcut.support == "given" else None)
            x = self.shortcut_norm(x)
        if self.density_bound is None:
            return add(x, y, same_support=True).map(nnx.relu)
        total = add(x, y, same_support=self.conv1.strides != (1,) * len(y.spatial_shape))
        slots = geometry.capacity(self.density_bound, y.spatial_shape)
        return k_select(total, slots, select="positive", select_by="site")


class Maker:
    """Makes the layers of a network, which have much in common."""

    def __init__(self, rank: int, axis_name: Any, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype} | ({} if param_dtype is None else {"param_dtype": param_dtype})
        self.rank = rank
        self.common = {"axis_name": axis_name, "rngs": rngs, **dtypes}

    def norm(self, features: int) -> BatchNorm:
        return BatchNorm(features, momentum=0.9, **self.common)

    def conv(
        self,
        in_features: int,
        features: int,
        width: int,
        *,
        kind: type[Conv] = Conv,
        density_bound: float | None = None,
        support: str = "input",
        use_bias: bool = False,
        **options: Any,
    ) -> Conv:
        """A convolution, in front of its normalisation; with a bound it selects among sites."""
        if density_bound is not None:
            options |= {"select": "magnitude", "select_by": "site", "density_bound": density_bound}
            support = "dilate"
        return kind(
            in_features,
            features,
            (width,) * self.rank,
            support=support,
            use_bias=use_bias,
            kernel_init=KERNEL_INIT,
            **options,
            **self.common,
        )

    def step(self, in_features: int, features: int, width: int, **options: Any) -> nnx.Sequential:
        """A convolution, its normalisation and a ReLU."""
        conv = self.conv(in_features, features, width, **options)
        return nnx.Sequential(conv, self.norm(features), ReLU())


def stage(
    blocks: int, in_features: int, features: int, *, strides: int = 1, **options: Any
) -> nnx.List:
    """Residual blocks one behind the other; the first one changes channels and resolution."""
    made = [ResidualBlock(in_features, features, strides=strides, **options)]
    made += [ResidualBlock(features, features, **options) for _ in range(blocks - 1)]
    return nnx.List(made)


def check_levels(
    what: str, density_bounds: Sequence[float], levels: int, features: Sequence[int]
) -> tuple[float, ...]:
    """The bounds as a tuple; raises unless there is one for each level, and each is a share."""
    bounds = tuple(density_bounds)
    if len(bounds) != levels:
        raise ValueError(
            f"density_bounds must have one bound for {what}, {levels} in all, got {len(bounds)}: {bounds}. "
            "On surfaces the share of the sites doubles with each level."
        )
    for bound in bounds:
        geometry.capacity(bound, (1,))
    for channels in features:
        positive("features", channels, ", a number of channels")
    return bounds


def check_input(x: object, rank: int, in_features: int) -> None:
    """Raises TypeError or ValueError unless x suits a network for shared supports."""
    check_sparse("x", x)
    assert isinstance(x, SparseTensor)
    if not x.shared or len(x.spatial_shape) != rank or x.channels != in_features:
        raise ValueError(
            f"x must have a shared support, {rank} axes and {in_features} channels, got {x}. from_points "
            'makes a shared support; k_select(x, capacity, select_by="site") makes one of other keys.'
        )
