"""nn.Conv: its weights, and how it lives inside Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import drawn
import ilajax
from ilajax.nn import Conv, Density, KernelKeys, iter_convs


def grid(seed=0, shape=(2, 6, 5, 2), density=0.5):
    return drawn.normal(seed, shape, density=density)


def sparse(seed=0, shape=(2, 6, 5, 2), density=0.5):
    x = grid(seed, shape, density)
    return ilajax.from_dense(x, capacity=x[0, ..., 0].size)


def layer(seed=0, **kwargs):
    kwargs = {"density_bound": 0.25, "kernel_init": drawn.kernel_init} | kwargs
    return Conv(2, 3, (3, 3), rngs=nnx.Rngs(seed), **kwargs)


# --- Forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": "value"},
        {"select": "magnitude", "use_bias": False},
        {"strides": 2, "padding": "VALID"},
        {"strides": (1, 2), "padding": [(2, 0), (1, 1)], "kernel_dilation": (2, 1)},
    ],
    ids=str,
)
def test_is_conv_with_its_weights_and_the_bounds_capacity(options):
    x, module = sparse(), layer(bias_init=drawn.kernel_init, **options)
    features = module(x)
    geometric = {k: v for k, v in options.items() if k not in ("use_bias",)}
    bias = None if module.bias is None else module.bias[...]
    sites = np.prod(features.spatial_shape)
    expected = ilajax.conv(x, module.sparse_kernel, bias, capacity=max(1, sites // 4), **geometric)
    np.testing.assert_array_equal(features.keys, expected.features.keys)
    np.testing.assert_array_equal(features.values, expected.features.values)
    np.testing.assert_allclose(
        module.density[...], np.asarray(expected.responses).mean(axis=0) / sites, rtol=1e-6
    )


def test_starts_as_flaxs_conv_and_equals_it_with_relu_at_bound_one():
    dense_rngs, rngs = nnx.Rngs(3), nnx.Rngs(3)
    x = grid()
    for _ in range(2):  # the second layer too: both drew the same number of keys
        dense = nnx.Conv(2, 3, (3, 3), rngs=dense_rngs)
        module = Conv(2, 3, (3, 3), density_bound=1.0, rngs=rngs)
        np.testing.assert_array_equal(module.sparse_kernel.to_dense(), dense.kernel[...])
        np.testing.assert_array_equal(module.bias[...], dense.bias[...])
    y = ilajax.to_dense(module(ilajax.from_dense(x, capacity=30)))
    np.testing.assert_allclose(y, nnx.relu(dense(x)), atol=1e-6)


def test_submanifold_keeps_the_support_and_has_no_bound():
    x = ilajax.from_points(
        np.array([[0, 1], [3, 3]]),
        np.ones((2, 2), np.float32),
        np.array([0, 0]),
        spatial_shape=(6, 5),
        batch_size=1,
        capacity=4,
    )
    module = Conv(2, 3, (3, 3), support="input", kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0))
    y = module(x)
    np.testing.assert_array_equal(y.keys, x.keys)
    assert y.shared
    assert (module.density_bound, module.select) == (None, None)
    np.testing.assert_allclose(module.density[...], 2 / 30, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_any_number_of_axes(rank):
    x = sparse(shape=(1, *(3,) * rank, 1))
    module = Conv(
        1, 2, (2,) * rank, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0)
    )
    y = nnx.eval_shape(lambda m, x: m(x), module, x)
    assert y.shape == (1, *(3,) * rank, 2)


def test_an_integer_kernel_size_is_one_dimensional():
    assert Conv(
        1, 2, 5, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(0)
    ).kernel_shape == (
        5,
        1,
        2,
    )


@pytest.mark.parametrize(
    ("param_dtype", "dtype", "expected"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.float32),  # promoted with a float32 input
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16, jnp.float16),
    ],
)
def test_dtypes_mean_what_they_mean_in_flax(param_dtype, dtype, expected):
    module = layer(param_dtype=param_dtype, dtype=dtype)
    assert module.kernel.dtype == module.bias.dtype == param_dtype
    assert module(sparse()).dtype == expected
    flax = nnx.Conv(
        2,
        3,
        (3, 3),
        param_dtype=param_dtype,
        dtype=dtype,
        kernel_init=drawn.kernel_init,
        rngs=nnx.Rngs(0),
    )
    assert nnx.eval_shape(lambda m, x: m(x), flax, grid()).dtype == expected
    grads = nnx.grad(lambda m: m(sparse()).values.astype(jnp.float32).sum())(module)
    assert grads.kernel.dtype == grads.bias.dtype == param_dtype


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("support", ["dilate", "input"])
def test_gradients_of_float32_parameters_are_not_rounded_to_the_compute_dtype(dtype, support):
    """Catches a cast whose derivative overflows at 65504 in float16, and keeps 8 bits in bfloat16."""
    x = ilajax.from_points(
        np.argwhere(np.ones((31, 31))),
        np.ones((31 * 31, 1), np.float32),
        np.zeros(31 * 31, int),
        spatial_shape=(31, 31),
        batch_size=1,
        capacity=31 * 31,
    )
    bound = {"density_bound": 1.0} if support == "dilate" else {}
    module = Conv(
        *(1, 1, (3, 3)),
        **bound,
        support=support,
        dtype=dtype,
        kernel_init=nnx.initializers.constant(0.1),
        rngs=nnx.Rngs(0),
    )
    grads = nnx.grad(lambda m: 128 * m(x).values.astype(jnp.float32).sum())(module)
    assert grads.kernel.dtype == grads.bias.dtype == jnp.float32
    # A tap sees all sites but those whose neighbour lies outside the grid.
    seen = [31 - abs(offset) for offset in (-1, 0, 1)]
    np.testing.assert_array_equal(grads.kernel[...], 128.0 * np.outer(seen, seen).ravel())
    np.testing.assert_array_equal(grads.bias[...], [128.0 * 31**2])

    def dense(kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        response = jax.lax.conv_general_dilated(
            ilajax.to_dense(x), kernel, (1, 1), "SAME", dimension_numbers=dimensions
        )
        return 128 * nnx.relu(response).sum()

    expected = jax.grad(dense)(module.sparse_kernel.to_dense())
    np.testing.assert_allclose(grads.kernel[...], expected.ravel(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_weights_are_rounded_to_the_compute_dtype(dtype):
    """Catches a computation on weights that are finer than their dtype, or flushed to 0 in float16."""
    x = sparse()
    module = layer(dtype=dtype, bias_init=drawn.kernel_init, density_bound=1.0)
    module.kernel[...] = module.kernel[...].at[:3].set(jnp.array([1e-6, 3e-5, 0.1]))
    kernel, bias = module.sparse_kernel, module.bias[...]
    rounded = ilajax.SparseKernel(kernel.keys, kernel.values.astype(dtype), kernel.shape)
    assert (rounded.values.astype(jnp.float32) != kernel.values).any()
    expected = ilajax.conv(
        x.with_values(x.values.astype(dtype)), rounded, bias.astype(dtype), capacity=30
    ).features
    for call in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        np.testing.assert_array_equal(call(module, x).keys, expected.keys)
        np.testing.assert_array_equal(call(module, x).values, expected.values)


# --- A random subset of the weights ----------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(density=st.floats(0.01, 1.0), seed=st.integers(0, 9))
def test_kernel_density_keeps_exactly_that_many_of_the_full_filters_weights(density, seed):
    options = {
        "density_bound": 1.0,
        "kernel_init": drawn.kernel_init,
        "bias_init": drawn.kernel_init,
    }
    part = Conv(2, 2, 3, kernel_density=density, rngs=nnx.Rngs(seed), **options)
    full = Conv(2, 2, 3, rngs=nnx.Rngs(seed), **options)
    assert part.kernel.shape == part.kernel_keys.shape == (max(1, round(density * 12)),)
    keys = np.asarray(part.kernel_keys[...])
    assert (np.diff(keys) > 0).all()
    np.testing.assert_array_equal(part.kernel[...], np.asarray(full.kernel[...])[keys])
    np.testing.assert_array_equal(part.bias[...], full.bias[...])


def test_subsets_differ_between_layers_and_every_weight_has_its_turn():
    rngs = nnx.Rngs(0)
    options = {"density_bound": 1.0, "kernel_density": 0.25, "kernel_init": drawn.kernel_init}
    made = [Conv(1, 1, 8, rngs=rngs, **options) for _ in range(40)]
    subsets = {tuple(np.asarray(m.kernel_keys[...]).tolist()) for m in made}
    assert len(subsets) > 10
    assert {key for subset in subsets for key in subset} == set(range(8))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_channels_are_flaxs(groups):
    """Catches a weight between two groups, or another start than Flax's."""
    x = sparse(shape=(2, 6, 5, 4))
    options = {"feature_group_count": groups, "kernel_init": drawn.kernel_init}
    grouped = Conv(4, 8, (3, 3), density_bound=1.0, select="magnitude", rngs=nnx.Rngs(0), **options)
    twin = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0), **options)
    assert grouped.kernel.size == twin.kernel.size
    np.testing.assert_allclose(ilajax.to_dense(grouped(x)), twin(ilajax.to_dense(x)), atol=1e-5)
    # Filled up again, there is still nothing between the groups.
    pruned = np.asarray(grouped.kernel_keys[...])[::3]
    want = np.asarray(grouped.kernel[...]).copy()
    grouped.kernel.set_value(grouped.kernel[::3])
    grouped.kernel_keys.set_value(jnp.asarray(pruned))
    ilajax.nn.refill(grouped)
    want[np.arange(want.size) % 3 > 0] = 0
    np.testing.assert_array_equal(grouped.kernel[...], want)


def test_a_depthwise_layer_may_start_sparse():
    layer = Conv(
        6, 6, (3, 3), support="input", feature_group_count=6, kernel_density=0.5, rngs=nnx.Rngs(0)
    )
    assert layer.kernel.size == 27
    _, ic, oc = np.unravel_index(
        np.flatnonzero(layer.sparse_kernel.mask().reshape(9, 6, 6)), (9, 6, 6)
    )
    np.testing.assert_array_equal(ic, oc)


# --- Inside Flax -----------------------------------------------------------------------------------------


def test_variables_have_their_types_and_survive_split_and_merge():
    module = layer()
    graphdef, params, keys, density = nnx.split(module, nnx.Param, KernelKeys, Density)
    assert set(params) == {"kernel", "bias"}
    assert set(keys) == {"kernel_keys"}
    assert set(density) == {"density"}
    again = nnx.merge(graphdef, params, keys, density)
    np.testing.assert_array_equal(again(sparse()).values, module(sparse()).values)


def test_composes_in_sequential_with_functions_and_dense_layers():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        Conv(
            2,
            4,
            (3, 3),
            density_bound=0.5,
            select="value",
            kernel_init=drawn.kernel_init,
            rngs=rngs,
        ),
        ilajax.relu,
        ilajax.nn.MaxPool(2),
        ilajax.to_dense,
        lambda x: x.reshape(x.shape[0], -1),
        nnx.Linear(3 * 3 * 4, 5, kernel_init=drawn.kernel_init, rngs=rngs),
    )
    assert nnx.jit(lambda m, x: m(x))(model, sparse()).shape == (2, 5)
    assert [path for path, _ in iter_convs(model)] == [("layers", 0)]


def test_a_layer_used_twice_is_found_once():
    shared = layer()
    assert len(list(iter_convs(nnx.List([shared, shared])))) == 1


# --- Bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density_bound": None}, ValueError, "density_bound is required"),
        ({"density_bound": 0.0}, ValueError, r"density_bound must lie in \(0, 1\], got 0.0"),
        ({"density_bound": 1.5}, ValueError, r"density_bound must lie in \(0, 1\], got 1.5"),
        ({"density_bound": float("nan")}, ValueError, r"density_bound must lie in \(0, 1\]"),
        (
            {"density_bound": [0.2, 0.1]},
            TypeError,
            r"density_bound must be one number in \(0, 1\], got \[0.2, 0.1\]. Each layer",
        ),
        (
            {"density_bound": np.array([0.2, 0.1, 0.3])},
            TypeError,
            "density_bound must be one number",
        ),
        ({"select": "largest"}, ValueError, "select"),
        ({"select_by": "row"}, ValueError, "select_by must be one of .*got 'row'"),
        ({"select_by": "site", "select": "value"}, ValueError, 'got "value": the vectors'),
        (
            {"support": "input", "density_bound": None, "select_by": "site"},
            ValueError,
            "select_by does not apply",
        ),
        (
            {"support": "submanifold"},
            ValueError,
            "support must be one of .*got 'submanifold'. A submanifold .* is \"input\"",
        ),
        ({"support": "input"}, ValueError, "density_bound does not apply"),
        (
            {"support": "input", "density_bound": None, "select": "positive"},
            ValueError,
            "select does not apply",
        ),
        ({"kernel_density": 0.0}, ValueError, r"kernel_density must lie in \(0, 1\], got 0.0"),
        ({"kernel_density": 2}, ValueError, r"kernel_density must lie in \(0, 1\], got 2"),
        ({"feature_group_count": 0}, ValueError, "feature_group_count must be at least 1"),
        (
            {"feature_group_count": 2},
            ValueError,
            "feature_group_count must divide in_features and out_features, got 2 for out_features = 3",
        ),
        ({"strides": 0}, ValueError, "strides must be at least 1"),
        ({"kernel_dilation": (1, 1, 1)}, ValueError, "kernel_dilation must have one entry"),
        ({"padding": 1}, TypeError, r"padding must be 'SAME'.*got 1\. .*\(\(1, 1\), \(1, 1\)\)"),
        ({"padding": 1.5}, TypeError, r"padding must be 'SAME'.*got 1.5\.$"),
        ({"param_dtype": jnp.int32}, TypeError, "param_dtype must be float32"),
        ({"dtype": jnp.float64}, TypeError, "dtype must be float32"),
    ],
)
def test_bad_options_raise_and_say_which(options, error, message):
    with pytest.raises(error, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((0, 3, (3, 3)), ValueError, "in_features must be at least 1, got 0"),
        ((2, 1.5, (3, 3)), TypeError, "out_features must be an integer.*got 1.5"),
        ((None, 3, (3, 3)), TypeError, "in_features must be an integer.*got None.*first input"),
        ((2, None, (3, 3)), TypeError, "out_features must be an integer.*got None"),
        ((2, 3, (3, 0)), ValueError, "kernel_size must be at least 1"),
    ],
)
def test_bad_shapes_raise(shape, error, message):
    with pytest.raises(error, match=message):
        Conv(*shape, density_bound=0.5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rngs", [jax.random.key(0), 0, None], ids=["key", "int", "None"])
def test_rngs_that_are_none_raise(rngs):
    """Catches a bare key, as Linen takes it, that fails with a missing attribute."""
    with pytest.raises(TypeError, match=r"rngs must be an nnx\.Rngs, got .*rngs=nnx\.Rngs\(0\)"):
        Conv(2, 3, (3, 3), density_bound=0.5, rngs=rngs)


def test_a_submanifold_layer_behind_a_bounded_one_names_the_cause():
    """Catches an error that asks for a shared support, and not where it was lost."""
    behind = Conv(3, 3, (3, 3), support="input", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"shared support.*density bound.*select_by.*in front"):
        behind(layer()(sparse()))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (jnp.zeros((1, 6, 5, 2)), TypeError, "x must be an ilajax.SparseTensor"),
        (
            sparse(shape=(2, 6, 5, 4)),
            ValueError,
            "x must have the 2 channels that the layer was made for, got 4: .*in_features=4",
        ),
        (sparse(shape=(2, 6, 2)), ValueError, "window of 2 axes"),
    ],
    ids=["dense", "channels", "rank"],
)
def test_bad_inputs_raise(x, error, message):
    with pytest.raises(error, match=message):
        layer()(x)
