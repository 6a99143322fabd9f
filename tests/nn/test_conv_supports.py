"""nn.Conv and nn.ConvTranspose: up again, onto given supports, and by site."""

import jax
import numpy as np
import pytest
from flax import nnx

import ilajax
import samples
from ilajax.nn import Conv, ConvTranspose, iter_convs


def test_a_transposed_layer_is_conv_transpose_with_its_weights():
    """Catches a layer that runs the convolution, or takes its capacity from another grid."""
    x = samples.tensor(1)
    up = ConvTranspose(2, 3, (3, 3), strides=2, density_bound=0.1, rngs=nnx.Rngs(0))
    for shape, slots in ((None, 12), ((9, 11), 9)):
        want = ilajax.conv_transpose(
            x, up.sparse_kernel, up.bias[...], strides=2, capacity=slots, output_shape=shape
        )
        got = up(x, output_shape=shape)
        jax.tree.map(np.testing.assert_array_equal, got, want.features)
        np.testing.assert_allclose(
            up.density[...], want.responses.mean(axis=0) / got.sites, rtol=1e-6
        )


def test_down_and_up_onto_the_same_sites():
    """Catches a support that a layer does not pass on, and gradients that stop at it."""
    x = samples.tensor(2, shared=True, density=0.5)
    coarse = samples.tensor(3, channels=1, spatial_shape=(3, 3), shared=True)
    down = Conv(2, 4, (3, 3), strides=2, support="given", rngs=nnx.Rngs(0))
    up = ConvTranspose(4, 2, (3, 3), strides=2, support="given", rngs=nnx.Rngs(1))

    def loss(layers):
        y = layers[1](layers[0](x, support=coarse).map(nnx.relu), support=x)
        assert y.keys is x.keys
        return ((y + x).values ** 2).sum()

    gradients = nnx.grad(loss)(nnx.List([down, up]))
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    assert [path for path, _ in iter_convs(nnx.List([down, up]))] == [(0,), (1,)]


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
def test_by_site(kind):
    """Catches a layer that selects by channel all the same, and a density that is no longer one a channel."""
    x = samples.tensor(5, shared=True)
    made = kind(2, 3, (3, 3), strides=2, density_bound=0.3, select_by="site", rngs=nnx.Rngs(0))
    operation = ilajax.conv if kind is Conv else ilajax.conv_transpose
    y = made(x)
    want = operation(
        x, made.sparse_kernel, made.bias[...], strides=2, capacity=y.capacity, select_by="site"
    )
    jax.tree.map(np.testing.assert_array_equal, y, want.features)
    assert y.shared
    assert y.capacity == ilajax.capacity(0.3, y.spatial_shape)
    np.testing.assert_allclose(
        made.density[...], np.full(3, want.responses.mean() / y.sites), rtol=1e-6
    )
    excess = ilajax.optim.excess_density(made)
    assert max(e.size for e in jax.tree.leaves(excess)) > 1, "one for each channel"


@pytest.mark.parametrize(
    ("kind", "made", "given"),
    [("Conv", "dilate", True), ("Conv", "given", False), ("ConvTranspose", "given", False)],
)
def test_a_support_that_does_not_fit_the_layer(kind, made, given):
    """Catches a support that is passed over, or missed too late."""
    x = samples.tensor(4, shared=True)
    options = {"density_bound": 0.5} if made == "dilate" else {}
    made = getattr(ilajax.nn, kind)(2, 3, (3, 3), support=made, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=r"support must be given in the call.*and only then"):
        made(x, support=x if given else None)


def test_a_transposed_layer_has_no_submanifold_form():
    with pytest.raises(ValueError, match=r"support must be one of .*dilate.*given.*got 'input'"):
        ConvTranspose(2, 3, (3, 3), support="input", rngs=nnx.Rngs(0))
