"""Bad input: an error that names the argument and what it got, at trace time, and nothing clipped.

What the data types, windows and point sets reject stands in their own tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import samples

X = samples.tensor(0)
SHARED = samples.tensor(0, shared=True)
KERNEL = samples.kernel(0)
BIAS = jnp.zeros(3)
DENSE = jnp.zeros((1, 4, 4, 2))


def conv(x=X, kernel=KERNEL, bias=BIAS, **options):
    return lambda: ilajax.conv(x, kernel, bias, **{"capacity": 5, **options})


def submanifold(x=SHARED, **options):
    return lambda: ilajax.conv(x, KERNEL, BIAS, support="input", **options)


def onto(support, **options):
    return lambda: ilajax.conv(X, KERNEL, BIAS, support=support, **options)


def transpose(x=X, **options):
    return lambda: ilajax.conv_transpose(x, KERNEL, BIAS, **{"capacity": 5, **options})


def points(coordinates=((0, 0),), features=((1.0,),), batch_index=(0,), **options):
    arrays = (np.array(coordinates), np.array(features, np.float32), np.array(batch_index))
    return lambda: ilajax.from_points(
        *arrays, **{"spatial_shape": (4, 4), "batch_size": 1, "capacity": 2, **options}
    )


CASES = {
    # conv
    "conv-dense-x": (conv(DENSE), TypeError, "x must be.*SparseTensor.*got"),
    "conv-dense-kernel": (
        conv(kernel=jnp.ones((3, 3, 2, 3))),
        TypeError,
        "kernel.*SparseKernel.*got",
    ),
    "conv-channels": (
        conv(samples.tensor(0, channels=5)),
        ValueError,
        "kernel.*2 channels.*x has 5",
    ),
    "conv-rank": (conv(kernel=samples.kernel(0, (3,))), ValueError, r"kernel.*\(3,\).*x.*\(5, 6\)"),
    "conv-bias-shape": (conv(bias=jnp.zeros(2)), ValueError, r"bias.*\(3,\).*\(2,\)"),
    "conv-bias-scalar": (conv(bias=jnp.zeros(())), ValueError, r"bias.*\(3,\).*\(\)"),
    "conv-bias-dtype": (conv(bias=jnp.zeros(3, int)), TypeError, "bias.*int32"),
    "conv-bias-list": (conv(bias=[0.0, 0.0, 0.0]), TypeError, "bias.*list"),
    "conv-no-capacity": (conv(capacity=None), ValueError, "capacity.*None"),
    "conv-capacity-0": (conv(capacity=0), ValueError, "capacity.*at least 1.*0"),
    "conv-capacity-negative": (conv(capacity=-3), ValueError, "capacity.*-3"),
    "conv-capacity-float": (conv(capacity=0.1), TypeError, "capacity.*0.1"),
    "conv-select": (
        conv(select="largest"),
        ValueError,
        "select.*value.*positive.*magnitude.*largest",
    ),
    "conv-select_by": (
        conv(select_by="sites"),
        ValueError,
        r"select_by.*channel.*site.*got 'sites'",
    ),
    "conv-site-value": (
        conv(select_by="site", select="value"),
        ValueError,
        'select must be "positive" or "magnitude" under select_by="site", got "value"',
    ),
    "conv-site-capacity": (conv(select_by="site", capacity=0), ValueError, "capacity.*at least 1"),
    "transpose-select_by": (transpose(select_by=1), ValueError, "select_by.*got 1"),
    "conv-support": (conv(support="same"), ValueError, "support.*dilate.*input.*same"),
    "conv-submanifold": (
        conv(support="submanifold"),
        ValueError,
        'support.*submanifold\'. A submanifold convolution.*is "input"',
    ),
    "conv-strides": (conv(strides=0), ValueError, "strides.*0"),
    "conv-strides-rank": (conv(strides=(1, 1, 1)), ValueError, r"strides.*2.*\(1, 1, 1\)"),
    "conv-strides-float": (conv(strides=1.5), TypeError, "strides.*1.5"),
    "conv-padding": (conv(padding="FULL"), ValueError, "padding.*SAME.*VALID.*FULL"),
    "conv-padding-rank": (conv(padding=((1, 1),)), ValueError, "padding.*2.*1, 1"),
    "conv-padding-int": (
        conv(padding=1),
        TypeError,
        r"padding.*got 1\. .*padding=\(\(1, 1\), \(1, 1\)\)",
    ),
    "conv-padding-ints": (conv(padding=[2, 1]), TypeError, r"padding=\(\(2, 2\), \(1, 1\)\)"),
    "conv-padding-list": (conv(padding=[1, 1, 1]), TypeError, r"padding.*got \[1, 1, 1\]\.$"),
    "conv-dilation": (conv(kernel_dilation=(0, 1)), ValueError, r"kernel_dilation.*\(0, 1\)"),
    "conv-window": (
        conv(kernel=samples.kernel(0, (6, 3)), padding="VALID"),
        ValueError,
        "window.*6.*axis 0.*5",
    ),
    "conv-window-negative-padding": (
        conv(padding=((-2, -1), (0, 0))),
        ValueError,
        "window.*3.*axis 0.*2",
    ),
    "conv-output-too-large": (
        conv(padding=((2**15, 2**15), (2**15, 2**15))),
        ValueError,
        r"2\*\*31",
    ),
    # submanifold
    "input-own-supports": (
        submanifold(X),
        ValueError,
        "x must have a shared support.*differ by channel.*density bound.*from_points",
    ),
    "input-capacity": (submanifold(capacity=5), ValueError, "capacity.*5"),
    "input-select": (submanifold(select="value"), ValueError, "select.*value"),
    "input-select_by": (
        submanifold(select_by="site"),
        ValueError,
        "select_by does not apply.*site",
    ),
    "input-strides": (submanifold(strides=2), ValueError, r"strides.*2"),
    "input-valid": (submanifold(padding="VALID"), ValueError, "padding.*VALID"),
    "input-explicit": (submanifold(padding=((1, 1), (1, 1))), ValueError, r"padding.*\(1, 1\)"),
    # a given support
    "given-capacity": (onto(SHARED, capacity=5), ValueError, "capacity.*given support.*5"),
    "given-select": (onto(SHARED, select="value"), ValueError, "select.*given support.*value"),
    "given-select_by": (
        onto(SHARED, select_by="site"),
        ValueError,
        "select_by does not apply.*site",
    ),
    "given-grid": (
        onto(SHARED, strides=2),
        ValueError,
        r"support must stand on the output grid, \(3, 3\).*got a support on \(5, 6\)",
    ),
    "given-batch": (
        onto(samples.tensor(0, 3, shared=True)),
        ValueError,
        "support.*as many samples as x, 2, got 3",
    ),
    "given-channels": (
        onto(samples.tensor(0, channels=4)),
        ValueError,
        "support must be shared.*3 output channels.*of 4",
    ),
    "given-keys": (onto(SHARED.keys), ValueError, "support must be one of"),
    # conv_transpose
    "transpose-dense-x": (transpose(DENSE), TypeError, "x must be.*SparseTensor.*got"),
    "transpose-no-capacity": (transpose(capacity=None), ValueError, "capacity.*None"),
    "transpose-input": (transpose(support="input"), ValueError, "support.*dilate.*'?input"),
    "transpose-support": (transpose(support="same"), ValueError, "support.*same"),
    "transpose-strides": (transpose(strides=0), ValueError, "strides.*0"),
    "transpose-padding": (transpose(padding=1), TypeError, r"padding.*got 1\. "),
    "transpose-shape": (
        transpose(strides=2, output_shape=(8, 12)),
        ValueError,
        r"output_shape.*\(5, 6\), got \(8, 12\): axis 0.*default is \(10, 12\)",
    ),
    "transpose-shape-rank": (
        transpose(strides=2, output_shape=(10,)),
        ValueError,
        r"output_shape.*2.*\(10,\)",
    ),
    "transpose-given-shape": (
        transpose(capacity=None, strides=2, support=SHARED),
        ValueError,
        r"output_shape.*got \(5, 6\)",
    ),
    "transpose-too-large": (
        lambda: ilajax.conv_transpose(X, KERNEL, strides=10**5, capacity=3),
        ValueError,
        r"2\*\*31",
    ),
    # densities
    "capacity-list": (
        lambda: ilajax.capacity([0.2, 0.1], (4, 4)),
        TypeError,
        r"density_bound must be one number.*\[0.2, 0.1\]",
    ),
    "capacity-word": (lambda: ilajax.capacity("low", (4,)), TypeError, "density_bound.*'low'"),
    # k_select, relu
    "k_select-dense": (lambda: ilajax.k_select(DENSE, 3), TypeError, "x must be.*SparseTensor"),
    "k_select-capacity": (lambda: ilajax.k_select(X, 0), ValueError, "capacity.*at least 1.*0"),
    "k_select-float": (lambda: ilajax.k_select(X, 2.0), TypeError, "capacity.*2.0"),
    "k_select-select": (lambda: ilajax.k_select(X, 2, select="abs"), ValueError, "select.*abs"),
    "k_select-select_by": (
        lambda: ilajax.k_select(X, 2, select_by=""),
        ValueError,
        "select_by.*''",
    ),
    "k_select-site-value": (
        lambda: ilajax.k_select(X, 2, select="value", select_by="site"),
        ValueError,
        'select must be "positive" or "magnitude"',
    ),
    "relu-dense": (lambda: ilajax.relu(DENSE), TypeError, "x must be.*SparseTensor"),
    # pooling
    "max_pool-dense": (lambda: ilajax.max_pool(DENSE, 2), TypeError, "x must be.*SparseTensor"),
    "max_pool-window": (lambda: ilajax.max_pool(X, 0), ValueError, "window.*at least 1.*0"),
    "max_pool-rank": (lambda: ilajax.max_pool(X, (2,)), ValueError, r"window.*2.*\(2,\)"),
    "max_pool-float": (lambda: ilajax.max_pool(X, 2.5), TypeError, "window.*2.5"),
    "max_pool-capacity": (lambda: ilajax.max_pool(X, 2, capacity=0), ValueError, "capacity.*0"),
    "max_pool-strides": (
        lambda: ilajax.max_pool(X, 2, strides=0),
        ValueError,
        "strides.*at least 1.*0",
    ),
    "max_pool-padding": (
        lambda: ilajax.max_pool(X, 2, padding="FULL"),
        ValueError,
        "padding must be.*'FULL'",
    ),
    "max_pool-huge-padding": (
        lambda: ilajax.max_pool(X, 2, strides=2**30, padding=((2**31 - 9, 0), (0, 0))),
        ValueError,
        r"padding must leave fewer than 2\*\*31 sites along spatial axis 0",
    ),
    "sum_pool-window": (
        lambda: ilajax.sum_pool(X, 9, padding="VALID"),
        ValueError,
        "window reaches over 9 sites.*only",
    ),
    "avg_pool-count": (
        lambda: ilajax.avg_pool(X, 2, count="all"),
        ValueError,
        "count must be 'sites'.*'stored'.*got 'all'",
    ),
    "avg_pool-dense": (lambda: ilajax.avg_pool(None, 2), TypeError, "x must be.*NoneType"),
    "avg_pool-window": (lambda: ilajax.avg_pool(X, -2), ValueError, "window.*-2"),
    "avg_pool-capacity": (lambda: ilajax.avg_pool(X, 2, capacity="2"), TypeError, "capacity.*'2'"),
    # upsampling
    "upsample-dense": (lambda: ilajax.upsample(DENSE, 2), TypeError, "x must be.*SparseTensor"),
    "upsample-factor": (lambda: ilajax.upsample(X, 0), ValueError, "factor.*at least 1.*0"),
    "upsample-huge": (lambda: ilajax.upsample(X, 2**16), ValueError, "allow at most 2..31 - 1"),
    "upsample-support": (
        lambda: ilajax.upsample(X, 2, support=X),
        ValueError,
        r"support must stand on a grid that cells of \(2, 2\) make",
    ),
    "upsample-support-dense": (
        lambda: ilajax.upsample(X, 2, support=DENSE),
        TypeError,
        "support must be.*SparseTensor",
    ),
    "upsample-support-capacity": (
        lambda: ilajax.upsample(X, 1, support=X, capacity=4),
        ValueError,
        "capacity does not apply with a support.*4",
    ),
    "upsample-capacity": (lambda: ilajax.upsample(X, 2, capacity=0), ValueError, "capacity.*0"),
    "global_max_pool-dense": (lambda: ilajax.global_max_pool(DENSE), TypeError, "x must be"),
    "global_avg_pool-dense": (lambda: ilajax.global_avg_pool(DENSE), TypeError, "x must be"),
    # conversions
    "to_dense-dense": (lambda: ilajax.to_dense(DENSE), TypeError, "x must be.*SparseTensor"),
    "from_dense-sparse": (lambda: ilajax.from_dense(X, 3), (TypeError, ValueError), "x must"),
    "from_dense-list": (lambda: ilajax.from_dense([[[1.0]]], 3), TypeError, "x must.*list"),
    "from_dense-rank": (
        lambda: ilajax.from_dense(jnp.ones((2, 3)), 3),
        ValueError,
        r"x must.*\(2, 3\)",
    ),
    "from_dense-dtype": (
        lambda: ilajax.from_dense(DENSE.astype(int), 3),
        TypeError,
        "x must be float32.*int32",
    ),
    "from_dense-float64": (
        lambda: ilajax.from_dense(np.zeros((1, 4, 4, 2)), 3),
        TypeError,
        "x must be float32.*float64",
    ),
    "from_dense-capacity": (lambda: ilajax.from_dense(DENSE, 0), ValueError, "capacity.*0"),
    "from_dense-select": (
        lambda: ilajax.from_dense(DENSE, 1, select="abs"),
        ValueError,
        "select.*abs",
    ),
    "from_dense-empty": (lambda: ilajax.from_dense(jnp.ones((1, 0, 2, 1)), 1), ValueError, "0"),
    "points-rank": (points(coordinates=((0, 0, 0),)), ValueError, r"coordinates.*2.*\(1, 3\)"),
    "points-floats": (points(coordinates=((0.0, 0.0),)), TypeError, "coordinates.*float"),
    "points-features": (points(features=(1.0,)), ValueError, r"features.*\(1,\)"),
    "points-features-length": (
        points(features=((1.0,), (2.0,))),
        ValueError,
        r"features.*1.*\(2, 1\)",
    ),
    "points-batch_index": (points(batch_index=(0, 0)), ValueError, r"batch_index.*1.*\(2,\)"),
    "points-batch_index-dtype": (points(batch_index=(0.0,)), TypeError, "batch_index.*float"),
    "points-grid": (points(spatial_shape=(4, 0)), ValueError, r"spatial_shape.*\(4, 0\)"),
    "points-batch_size": (points(batch_size=0), ValueError, "batch_size.*0"),
    "points-capacity": (points(capacity=0), ValueError, "capacity.*0"),
    "points-reduce": (points(reduce="min"), ValueError, "reduce.*mean.*sum.*max.*min"),
    "concatenate-nothing": (lambda: ilajax.concatenate([]), ValueError, "tensors.*none"),
    "concatenate-dense": (lambda: ilajax.concatenate([X, DENSE]), TypeError, r"tensors\[1\]"),
    "concatenate-grids": (
        lambda: ilajax.concatenate([X, samples.tensor(0, spatial_shape=(6, 5))]),
        ValueError,
        r"tensors.*spatial_shape.*\(5, 6\).*\(6, 5\)",
    ),
    "concatenate-batches": (
        lambda: ilajax.concatenate([X, samples.tensor(0, batch=3)]),
        ValueError,
        "tensors.*batch_size.*2.*3",
    ),
    "concatenate-dtypes": (
        lambda: ilajax.concatenate([X, samples.tensor(0, dtype="bfloat16")]),
        ValueError,
        "tensors.*dtype.*float32.*bfloat16",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_names_the_argument(case):
    """Catches bad input that is clipped, converted, or found out with an error that names something else."""
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_errors_rise_at_trace_time():
    """Catches a check that waits for data, and so is missing under jit."""
    with pytest.raises(ValueError, match="select"):
        jax.eval_shape(lambda x: ilajax.k_select(x, 2, select="abs"), X)
    with pytest.raises(ValueError, match="capacity"):
        jax.eval_shape(lambda x: ilajax.conv(x, KERNEL, capacity=0), X)


def test_a_gradient_to_a_tensor_fails_in_the_words_that_its_docs_explain():
    """Catches docs that no longer quote what JAX says, which no library can change."""
    with pytest.raises(TypeError, match=r"grad requires real- or complex-valued inputs.*int32"):
        jax.grad(lambda x: ilajax.to_dense(x).sum())(X)
    assert "grad requires real- or complex-valued inputs" in ilajax.SparseTensor.__doc__
    grads = jax.grad(lambda x: ilajax.to_dense(x).sum(), allow_int=True)(X)
    by_values = jax.grad(lambda v: ilajax.to_dense(X.with_values(v)).sum())(X.values)
    np.testing.assert_array_equal(grads.values, by_values)


def test_a_traced_capacity_is_refused():
    """Catches a capacity that would make a shape depend on data, reported in JAX's words only."""
    with pytest.raises(TypeError, match=r"capacity|concrete|Tracer"):
        jax.jit(lambda x, k: ilajax.k_select(x, k))(X, 3)


def test_numpy_integers_are_integers():
    """Catches a check for Python's int only: sizes often come out of NumPy."""
    out = jax.eval_shape(
        lambda x: ilajax.conv(x, KERNEL, capacity=np.int64(4), strides=np.array([1, 2])), X
    )
    assert out.features.capacity == 4
    assert jax.eval_shape(lambda x: ilajax.max_pool(x, np.int32(2)), X).spatial_shape == (3, 3)


@pytest.mark.parametrize("choice", ["cuda", "", "REFERENCE"])
def test_an_unknown_backend(monkeypatch, choice):
    """Catches a misspelt backend that silently runs another one."""
    monkeypatch.setenv("ILAJAX_BACKEND", choice)
    with pytest.raises(ValueError, match=f"ILAJAX_BACKEND.*native.*reference.*'{choice}'"):
        jax.eval_shape(lambda x: ilajax.to_dense(x), X)
