"""OctNet3: table 2, and that the sparse network and its dense twin are one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.models import OctNet3
from ilajax.models.octnet3 import TABLE_2, Architecture

# Table 2 as printed: for each network its convolutions, (Cin, Cout), first sparse, then dense.
SPARSE_2 = [(1, 8), (8, 8), (8, 8), (8, 16), (16, 16), (16, 16)]
SPARSE_3 = [*SPARSE_2, (16, 24), (24, 24), (24, 24)]
DENSE_1 = [(24, 32), (32, 32), (32, 32)]
DENSE_2 = [*DENSE_1, (32, 40), (40, 40), (40, 40)]
DENSE_3 = [*DENSE_2, (40, 48), (48, 48), (48, 48)]
PRINTED = {
    16: (3, SPARSE_2, [], 8**3 * 16),
    24: (2, SPARSE_2, [], 14**2 * 16),
    32: (3, SPARSE_3, [], 8**3 * 24),
    64: (3, SPARSE_3, DENSE_1, 8**3 * 32),
    128: (3, SPARSE_3, DENSE_2, 8**3 * 40),
    256: (3, SPARSE_3, DENSE_3, 8**3 * 48),
}
# The text's bounds, one for each sparse block; for 256^3 it has none.
BOUNDS = {
    16: (0.33, 0.33),
    24: (0.095, 0.19),
    32: (0.14, 0.33, 0.66),
    64: (0.06, 0.14, 0.33),
    128: (0.02, 0.06, 0.14),
    256: (0.01, 0.02, 0.06),
}


@pytest.mark.parametrize("resolution", PRINTED)
def test_layers_are_those_of_table_2(resolution):
    rank, sparse, dense, features = PRINTED[resolution]
    model = nnx.eval_shape(lambda: OctNet3(resolution, num_classes=40, rngs=nnx.Rngs(0)))
    convs = [conv for block in model.blocks for conv in (block.conv1, block.conv2, block.conv3)]
    assert [(conv.in_features, conv.out_features) for conv in convs] == sparse + dense
    assert all(conv.kernel_size == (3,) * rank for conv in convs)
    kinds = [ilajax.nn.Conv] * len(sparse) + [nnx.Conv] * len(dense)
    assert [type(conv) for conv in convs] == kinds
    expected = list(np.repeat(BOUNDS[resolution], 3))
    assert [conv.density_bound for conv in convs[: len(sparse)]] == expected
    assert model.hidden.kernel.shape == (features, 1024)
    assert model.logits.kernel.shape == (1024, 40)
    assert model.dropout.rate == 0.5


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("resolution", PRINTED)
def test_summary_is_that_of_table_2(resolution, dense):
    rank, sparse, behind, features = PRINTED[resolution]
    size, convs = 28 if rank == 2 else resolution, sparse + behind
    expected = []
    for number, (before, after) in enumerate(convs):
        block, conv = divmod(number, 3)
        if number and conv == 0:
            size //= 2
            # As many slots as before the pooling, at most one a site: it never cuts.
            slots = expected[-1][2] and min(expected[-1][2], size**rank)
            expected.append((f"pool{block}", (*(size,) * rank, before), slots, 0))
        bounded = number < len(sparse) and not dense
        slots = int(BOUNDS[resolution][block] * size**rank) if bounded else None
        name, shape = f"blocks.{block}.conv{conv + 1}", (*(size,) * rank, after)
        expected.append((name, shape, slots, 3**rank * before * after + after))
        if number + 1 == len(sparse) and not dense:
            expected.append(("to_dense", shape, None, 0))
    expected.append(("dropout", (features,), None, 0))
    expected.append(("hidden", (1024,), None, features * 1024 + 1024))
    expected.append(("logits", (40,), None, 1024 * 40 + 40))

    model = nnx.eval_shape(
        lambda: OctNet3(resolution, num_classes=40, dense=dense, rngs=nnx.Rngs(0))
    )
    layers = model.layers()
    assert [(x.name, x.shape, x.capacity, x.parameters) for x in layers] == expected
    for layer in layers:
        *grid, channels = layer.shape
        stored = 4 * np.prod(grid) if layer.capacity is None else 8 * layer.capacity
        assert layer.bytes == stored * channels
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    total, *_ = re.findall(r"all +([\d,]+)", model.summary())
    assert int(total.replace(",", "")) == parameters


def test_a_summary_leaves_the_model_as_it_is():
    model, _ = twins_24()
    assert re.search(r"blocks.0.conv2 +28\^2 x 8 +1 +784 +584 +50,176", model.summary())
    assert (model.blocks[0].conv1.density[...] == -1).all()


def test_a_summary_needs_no_devices():
    model = nnx.eval_shape(lambda: OctNet3(24, num_classes=10, axis_name="data", rngs=nnx.Rngs(0)))
    assert model.layers()[-1].shape == (10,)


def tensor_shape(grid, capacity=50):
    return ilajax.SparseTensor(
        jax.ShapeDtypeStruct((2, 1, capacity), jnp.int32),
        jax.ShapeDtypeStruct((2, 1, capacity), jnp.float32),
        grid,
    )


@pytest.mark.parametrize("resolution", [24, 16, 64])
def test_shapes_fit_from_the_input_to_the_logits(resolution):
    def run(x):
        rngs = nnx.Rngs(0)
        return OctNet3(resolution, num_classes=7, rngs=rngs)(x)

    assert jax.eval_shape(run, tensor_shape(TABLE_2[resolution].input_shape)).shape == (2, 7)


def digits(seed=0, batch=3, shape=(28, 28)):
    return jnp.abs(drawn.normal(seed, (batch, *shape, 1), density=0.15))


def twins(resolution=24, **kwargs):
    bounds = (1.0,) * len(TABLE_2[resolution].sparse)
    sparse = OctNet3(resolution, num_classes=10, density_bounds=bounds, rngs=nnx.Rngs(7), **kwargs)
    return sparse, OctNet3(resolution, num_classes=10, dense=True, rngs=nnx.Rngs(7), **kwargs)


@functools.cache
def twins_24():
    return twins(kernel_init=drawn.kernel_init)


def assert_equal_logits(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


forward = nnx.jit(lambda model, x: model(x))


@pytest.mark.parametrize("select", ["positive", "value", "magnitude"])
def test_equals_its_dense_twin_at_bounds_of_one(select, monkeypatch):
    # As 64^3 and up, a dense block behind two sparse ones; but small.
    monkeypatch.setitem(TABLE_2, 8, Architecture((8, 8), (2, 3), (1.0, 1.0), (4,)))
    sparse, dense = twins(8, select=select, kernel_init=drawn.kernel_init)
    sparse.eval()
    dense.eval()
    x = digits(shape=(8, 8))
    stored = ilajax.from_dense(x, capacity=64)
    expected = forward(dense, x)
    np.testing.assert_array_equal(forward(dense, stored), expected)
    assert_equal_logits(forward(sparse, stored), expected)


def test_octnet3_24_equals_its_twin_and_dropout_draws_alike():
    sparse, dense = nnx.clone(twins_24())
    x = digits()
    stored = ilajax.from_dense(x, capacity=784)
    # In training mode: the same dropout mask too.
    assert_equal_logits(forward(sparse, stored), forward(dense, x))
    assert not np.array_equal(forward(dense, x), forward(dense, x))
    dense.eval()
    np.testing.assert_array_equal(forward(dense, x), forward(dense, x))


def test_twins_have_the_same_parameters_at_the_same_paths():
    sparse, dense = twins_24()
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(sparse, nnx.Param))]
    assert paths == [path for path, _ in nnx.to_flat_state(nnx.state(dense, nnx.Param))]
    assert ("blocks", 1, "conv2", "kernel") in paths
    for block, twin in zip(sparse.blocks, dense.blocks, strict=True):
        for name in ("conv1", "conv2", "conv3"):
            kernel = getattr(block, name).sparse_kernel.to_dense()
            np.testing.assert_array_equal(kernel, getattr(twin, name).kernel[...])
    np.testing.assert_array_equal(sparse.hidden.kernel[...], dense.hidden.kernel[...])
    np.testing.assert_array_equal(sparse.logits.kernel[...], dense.logits.kernel[...])


def test_bounds_hold_layer_by_layer():
    model = nnx.eval_shape(
        lambda: OctNet3(24, num_classes=10, density_bounds=(0.05, 0.1), rngs=nnx.Rngs(0))
    )
    x = ilajax.from_dense(digits(), capacity=784)
    first = nnx.eval_shape(lambda block, x: block(x), model.blocks[0], x)
    pooled = nnx.eval_shape(lambda pool, x: pool(x), model.pool, first)
    second = nnx.eval_shape(lambda block, x: block(x), model.blocks[1], pooled)
    assert (first.capacity, pooled.capacity, second.capacity) == (39, 39, 19)
    assert pooled.spatial_shape == (14, 14)


def test_sparse_filters_and_dtypes_reach_the_layers():
    model = nnx.eval_shape(
        lambda: OctNet3(
            24,
            num_classes=10,
            density_bounds=[0.1, 0.2],
            kernel_density=0.5,
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
    )
    assert model.blocks[1].conv2.kernel.shape == (9 * 16 * 16 // 2,)
    assert model.blocks[0].conv1.dtype == model.hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 28}, r"resolution must be one of \(16, 24, 32, 64, 128, 256\), got 28"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_features": -1}, "in_features must be at least 1"),
        ({"density_bounds": 0.1}, "density_bounds must have one bound .* 2 sparse blocks"),
        ({"density_bounds": (0.1,)}, "density_bounds must have one bound"),
        ({"density_bounds": (0.1, 0.0)}, r"density_bound must lie in \(0, 1\]"),
        ({"dropout": 1.0}, r"dropout must be a rate in \[0, 1\)"),
        ({"select": "best"}, "select"),
        ({"dense": True, "kernel_density": 0.5}, "kernel_density needs sparse filters"),
    ],
)
def test_bad_options_raise(options, message):
    valid = {"resolution": 24, "num_classes": 10, "density_bounds": (0.1, 0.2)}
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: OctNet3(**(valid | options), rngs=nnx.Rngs(0)))


def test_bad_inputs_raise():
    sparse, dense = nnx.eval_shape(lambda: twins())
    with pytest.raises(TypeError, match=r"x must be an ilajax\.SparseTensor"):
        sparse(digits())
    expected = r"x must have the shape \(batch, 28, 28, 1\), got \(2, 16, 16, 1\)"
    with pytest.raises(ValueError, match=expected):
        sparse(tensor_shape((16, 16)))
    with pytest.raises(ValueError, match=expected):
        dense(jnp.zeros((2, 16, 16, 1)))
