"""Weights of spconv's layers: what they become, and that the layers then compute the same."""

import jax
import numpy as np
import pytest
from flax import nnx

import ilajax
import samples
from ilajax.nn import BatchNorm, Conv, ConvTranspose, load_spconv

GRID = (12, 11, 10)


class Net(nnx.Module):
    """An encoder of one level and the way back."""

    def __init__(self, cin=3, cout=5):
        rngs = nnx.Rngs(0)
        common = {"use_bias": False, "rngs": rngs}
        self.stem = nnx.Sequential(
            Conv(cin, cout, (3, 3, 3), support="input", **common),
            BatchNorm(cout, epsilon=1e-3, rngs=rngs),
            ilajax.nn.ReLU(),
        )
        self.down = Conv(
            cout,
            2 * cout,
            (3, 3, 3),
            strides=2,
            padding=((1, 1),) * 3,
            density_bound=1.0,
            select="magnitude",
            select_by="site",
            **common,
        )
        self.up = ConvTranspose(
            2 * cout, cout, (3, 3, 3), strides=2, support="given", padding=((1, 1),) * 3, **common
        )
        self.head = nnx.Linear(cout, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        return self.up(self.down(x), support=x)


def state_dict(cin=3, cout=5, seed=0):
    """As a spconv module of the same layers has it."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv_input.0.weight": (cout, 3, 3, 3, cin),
        "conv_input.1.weight": (cout,),
        "conv_input.1.bias": (cout,),
        "conv_input.1.running_mean": (cout,),
        "conv_input.1.running_var": (cout,),
        "down.weight": (2 * cout, 3, 3, 3, cout),
        "up.weight": (cout, 3, 3, 3, 2 * cout),
        "head.weight": (4, cout),
        "head.bias": (4,),
    }
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["conv_input.1.running_var"] = np.abs(arrays["conv_input.1.running_var"])
    return arrays | {"conv_input.1.num_batches_tracked": np.array(7)}


RENAME = {"conv_input": "stem"}


def test_every_array_is_where_it_belongs():
    """Catches an axis or a tap at the wrong place."""
    net, arrays = Net(), state_dict()
    load_spconv(net, arrays, rename=RENAME)
    stem, norm = net.stem.layers[:2]
    w = arrays["conv_input.0.weight"]
    np.testing.assert_array_equal(stem.sparse_kernel.to_dense()[0, 1, 2, 1, 4], w[4, 0, 1, 2, 1])
    np.testing.assert_array_equal(
        net.down.sparse_kernel.to_dense(), np.moveaxis(arrays["down.weight"], 0, -1)
    )
    up = net.up.sparse_kernel.to_dense()
    np.testing.assert_array_equal(up[0, 1, 2, 1, 4], arrays["up.weight"][4, 2, 1, 0, 1])
    for ours, theirs in (
        ("scale", "weight"),
        ("bias", "bias"),
        ("mean", "running_mean"),
        ("var", "running_var"),
    ):
        np.testing.assert_array_equal(getattr(norm, ours)[...], arrays[f"conv_input.1.{theirs}"])
    np.testing.assert_array_equal(net.head.kernel[...], arrays["head.weight"].T)


@pytest.mark.parametrize(("layout", "axes"), [("RSKC", (1, 2, 3, 0, 4)), ("RSCK", (1, 2, 3, 4, 0))])
def test_older_layouts(layout, axes):
    """Catches two channels that change places."""
    arrays = state_dict()
    new, old = Net(), Net()
    load_spconv(new, arrays, rename=RENAME)
    turned = {n: a.transpose(axes) if a.ndim == 5 else a for n, a in arrays.items()}
    load_spconv(old, turned, rename=RENAME, layout=layout)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(old), nnx.state(new))


def without(name):
    return {n: a for n, a in state_dict().items() if n != name}


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (state_dict(), {}, r"belong to no layer of the model: rename.*conv_input\.0\.weight"),
        (
            without("down.weight"),
            {"rename": RENAME},
            r"are missing, which the model has: down\.kernel",
        ),
        (without("conv_input.1.running_var"), {"rename": RENAME}, r"missing.*stem\.layers\.1\.var"),
        (
            state_dict(cout=6),
            {"rename": RENAME},
            r"do not fit.*conv_input\.0\.weight \(of shape \(6, 3",
        ),
        (state_dict() | {"head.scale": np.ones(4)}, {"rename": RENAME}, r"no layer.*head\.scale"),
        (state_dict() | {"tail.weight": np.ones(4)}, {"rename": RENAME}, r"no layer.*tail\.weight"),
        (state_dict(), {"layout": "KCRS"}, r"layout must be one of .*got 'KCRS'"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(arrays, options, message):
    net = Net()
    before = jax.tree.map(np.asarray, nnx.state(net))
    with pytest.raises(ValueError, match=message):
        load_spconv(net, arrays, **options)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)


# --- Against spconv itself -------------------------------------------------------------------------------

CHANNELS = [(1, 1), (3, 8), (16, 16), (64, 32)]


def cloud(channels, seed=0):
    return samples.tensor(
        seed, 2, channels, GRID, capacity=200, density=0.12, shared=True, exact=False
    )


def to_spconv(torch, spconv, x):
    keys = np.asarray(x.keys[:, 0])
    batch, slot = np.nonzero(keys < x.sites)
    places = np.unravel_index(keys[batch, slot], x.spatial_shape)
    indices = torch.from_numpy(np.stack([batch, *places], 1).astype(np.int32))
    features = torch.from_numpy(np.asarray(x.values)[batch, :, slot].copy())
    return spconv.SparseConvTensor(features, indices, list(x.spatial_shape), x.batch_size)


def on_grid(y):
    grid = np.zeros((y.batch_size, *y.spatial_shape, y.features.shape[1]), np.float32)
    grid[tuple(y.indices.numpy().T)] = y.features.detach().numpy()
    return grid


def assert_near(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("cin", "cout"), CHANNELS)
def test_layers_are_spconvs(cin, cout):
    """Catches a geometry, a tap or a site that is not spconv's: submanifold, strided, inverse."""
    torch = pytest.importorskip("torch")
    spconv = pytest.importorskip("spconv.pytorch")
    torch.set_num_threads(1)
    torch.manual_seed(cin)
    x = cloud(cin)

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_input = spconv.SparseSequential(
                spconv.SubMConv3d(cin, cout, 3, bias=False),
                torch.nn.BatchNorm1d(cout, eps=1e-3),
                torch.nn.ReLU(),
            )
            self.down = spconv.SparseConv3d(cout, 2 * cout, 3, 2, 1, bias=False, indice_key="d")
            self.up = spconv.SparseInverseConv3d(2 * cout, cout, 3, bias=False, indice_key="d")
            self.head = torch.nn.Linear(cout, 4)

    twin = Twin()
    norm = twin.conv_input[1]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    twin.eval()
    net = Net(cin, cout)
    load_spconv(net, twin.state_dict(), rename=RENAME)
    net.eval()
    with torch.no_grad():
        theirs = twin.conv_input(to_spconv(torch, spconv, x))
        coarse = twin.down(theirs)
        back = twin.up(coarse)
    ours = net.stem(x)
    assert_near(ilajax.to_dense(ours), on_grid(theirs))
    ours_coarse = net.down(ours)
    assert ours_coarse.spatial_shape == tuple(coarse.spatial_shape)
    # Keys of sites where a response is not 0: spconv keeps all that a window reaches.
    assert_near(ilajax.to_dense(ours_coarse), on_grid(coarse))
    assert_near(ilajax.to_dense(net.up(ours_coarse, support=ours)), on_grid(back))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("cin", "cout"), CHANNELS)
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_transposed_layers_are_spconvs(cin, cout, kernel_size, stride, padding):
    """Catches a flipped window, or a shifted grid."""
    torch = pytest.importorskip("torch")
    spconv = pytest.importorskip("spconv.pytorch")
    torch.set_num_threads(1)
    torch.manual_seed(cin)
    x = cloud(cin, 1)
    twin = spconv.SparseConvTranspose3d(cin, cout, kernel_size, stride, padding, bias=False)
    with torch.no_grad():
        theirs = twin(to_spconv(torch, spconv, x))
    around = kernel_size - 1 - padding
    up = ConvTranspose(
        cin,
        cout,
        (kernel_size,) * 3,
        strides=stride,
        padding=((around, around),) * 3,
        density_bound=1.0,
        select="magnitude",
        select_by="site",
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    load_spconv(up, twin.state_dict())
    y = up(x)
    assert y.spatial_shape == tuple(theirs.spatial_shape)
    assert_near(ilajax.to_dense(y), on_grid(theirs))
