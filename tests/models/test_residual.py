"""Residual networks: their shapes, sites and gradients, and what they equal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ilajax
import samples
from ilajax.models import ResNet, UNet
from ilajax.models.residual import ResidualBlock

GRID = (16, 17)
SMALL = {"features": (3, 4, 5, 6), "rank": 2, "rngs": nnx.Rngs(0)}
DEEP = {"features": (3, 4, 5, 6, 5, 4, 3, 3), "stem_features": 4, "rank": 2}


def cloud(seed=0, batch=2, channels=2, grid=GRID, capacity=40):
    return samples.tensor(
        seed, batch, channels, grid, capacity=capacity, density=0.1, shared=True, exact=False
    )


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dilate", [False, True], ids=["submanifold", "dilating"])
def test_resnet(dilate):
    """Catches a layer that does not fit the next, a level above its bound, and gradients that are missing."""
    bounds = (0.25,) * dilate + (0.5, 0.6, 1, 1)
    model = ResNet(10, 2, 7, density_bounds=bounds, dilate=dilate, **SMALL)
    x = cloud()
    loss = nnx.jit(nnx.value_and_grad(lambda model: (model(x) ** 2).sum()))
    value, gradients = loss(model)
    assert np.isfinite(value)
    assert finite(gradients)
    missing = [path for path, g in nnx.to_flat_state(gradients) if not np.any(g[...])]
    assert not missing
    model.eval()
    assert model(x).shape == (2, 7)
    y = model.stem(x)
    assert (y.keys is x.keys) != dilate
    for blocks, grid, bound in zip(
        model.stages, ((8, 9), (4, 5), (2, 3), (1, 2)), bounds[dilate:], strict=True
    ):
        for block in blocks:
            y = block(y)
        assert y.spatial_shape == grid
        assert y.shared
        assert y.capacity == ilajax.capacity(bound, grid)


@pytest.mark.parametrize("dilate", [False, True], ids=["submanifold", "dilating"])
def test_unet(dilate):
    """Catches a skip that is put beside the wrong level, and an output at other sites than the input's."""
    model = UNet(14, 2, 7, density_bounds=(0.3, 0.6, 1, 1), dilate=dilate, rngs=nnx.Rngs(0), **DEEP)
    x = cloud()
    loss = nnx.jit(nnx.value_and_grad(lambda model: (model(x).values ** 2).sum()))
    value, gradients = loss(model)
    assert np.isfinite(value)
    assert finite(gradients)
    missing = [path for path, g in nnx.to_flat_state(gradients) if not np.any(g[...])]
    # The coarsest level has one site in a sample or two: there a mean may take all.
    assert all("encoder" in path for path in missing)
    y = model(x)
    assert y.keys is x.keys
    assert y.channels == 7


def test_layers_of_the_published_networks():
    """Catches a block too many or too few: MinkUNet18A and ResNet18 have so many convolutions and weights."""
    bounds = (0.1, 0.2, 0.4, 0.8)
    unet = nnx.eval_shape(lambda: UNet(18, 3, 20, density_bounds=bounds, rngs=nnx.Rngs(0)))
    convs = [conv for _, conv in ilajax.nn.iter_convs(unet)]
    # 1 + 4 down + 4 up + 1, two a block, and a shortcut wherever the channels change.
    assert len(convs) == 10 + 2 * 16 + 7
    weights = sum(conv.kernel.size for conv in convs)
    blocks, planes, before = 0, (32, 64, 128, 256, 128, 128, 96, 96), 32
    for i, c in enumerate(planes):
        into = before if i < 4 else c + (128, 64, 32, 32)[i - 4]
        step = 8 * before * (before if i < 4 else c)
        blocks += step + 27 * (into * c + 3 * c * c) + (into * c if into != c else 0)
        before = c
    assert weights == 125 * 3 * 32 + blocks + 96 * 20
    resnet = nnx.eval_shape(lambda: ResNet(34, 3, 40, density_bounds=bounds, rngs=nnx.Rngs(0)))
    assert len([*ilajax.nn.iter_convs(resnet)]) == 1 + 2 * 16 + 4


def test_a_full_grid_is_the_dense_block():
    """Catches an order of layers, or a shortcut, that is not the residual block's."""
    grid = (4, 6)
    places = np.stack(np.meshgrid(*map(range, grid), indexing="ij"), -1).reshape(1, 24, 2)
    values = jax.random.normal(jax.random.key(0), (1, 24, 2))
    x = ilajax.from_points(places, values, spatial_shape=grid, capacity=24)
    block = ResidualBlock(2, 3, rank=2, rngs=nnx.Rngs(0))
    y = block(x)

    def dense(conv, x):
        return jax.lax.conv_general_dilated(
            x,
            conv.sparse_kernel.to_dense(),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(x):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + 1e-5)

    full = ilajax.to_dense(x)
    main = norm(dense(block.conv2, nnx.relu(norm(dense(block.conv1, full)))))
    want = nnx.relu(main + norm(dense(block.shortcut, full)))
    np.testing.assert_allclose(ilajax.to_dense(y), want, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_prunes():
    """Catches a network that the recipe does not go with, or that does not learn."""
    model = ResNet(10, 1, 2, density_bounds=(1, 1, 1, 1), **SMALL)
    rng = np.random.default_rng(0)
    lines = np.zeros((8, 12, 12, 1), np.float32)
    for i in range(8):
        at = rng.integers(2, 10)
        lines[(i, slice(None), at) if i % 2 else (i, at)] = 1
    x = ilajax.k_select(ilajax.from_dense(lines, capacity=12), 12, select_by="site")
    labels = jnp.arange(8) % 2
    recipe = ilajax.optim.sparse_training(
        model, optax.adam(3e-3), scale=1e-4, offset=0.1, b1=0.1, b2=0.1, threshold=1e-3
    )
    optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(
            model,
            gradients,
            excess_density=ilajax.optim.excess_density(model),
            epoch_end=jnp.array(True),
        )
        return value

    losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ResNet(17, 2, 3, density_bounds=(1,) * 4, **SMALL),
            "depth must be one of .*got 17",
        ),
        (
            lambda: UNet(50, 2, 3, density_bounds=(1,) * 4, rngs=nnx.Rngs(0)),
            "depth must be one of .*50",
        ),
        (lambda: ResNet(18, 2, 3, density_bounds=(1,) * 3, **SMALL), "each stage, 4 in all, got 3"),
        (
            lambda: ResNet(18, 2, 3, density_bounds=(1,) * 4, dilate=True, **SMALL),
            "the input's resolution and each stage, 5 in all, got 4",
        ),
        (
            lambda: ResNet(18, 2, 3, density_bounds=(1, 1, 2, 1), **SMALL),
            "density_bound must lie in",
        ),
        (
            lambda: ResNet(18, 2, 3, density_bounds=(1,) * 4, features=(1, 2), rngs=nnx.Rngs(0)),
            "features must have four numbers",
        ),
        (
            lambda: UNet(18, 2, 3, density_bounds=(1,) * 4, features=(1, 2), rngs=nnx.Rngs(0)),
            "features must have eight numbers",
        ),
        (
            lambda: ResNet(10, 2, 3, density_bounds=(1,) * 4, **SMALL)(samples.tensor(0)),
            "x must have a shared support, 2 axes and 2 channels, got SparseTensor",
        ),
        (
            lambda: ResNet(10, 3, 3, density_bounds=(1,) * 4, **SMALL)(cloud()),
            "x must have a shared support, 2 axes and 3 channels, got SparseTensor",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
