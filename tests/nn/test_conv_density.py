"""nn.Conv measures the density of its responses: when, under which transformations, over which samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ilajax
from ilajax.nn import Conv
from nn.test_conv import layer, sparse


def mean_density(module, x):
    """Independent of the layer's bound: count what is above 0 of an unbounded dense convolution."""
    window = ilajax.to_dense(x)
    kernel = module.sparse_kernel.to_dense()
    response = jax.lax.conv_general_dilated(
        window, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray((response > 1e-6).mean(axis=(0, 1, 2)))


def loss(module, x):
    return jnp.sum(module(x).values ** 2)


TRANSFORMED = {
    "plain": loss,
    "jit": nnx.jit(loss),
    "grad": nnx.grad(loss),
    "value_and_grad": nnx.value_and_grad(loss),
    "has_aux": nnx.value_and_grad(lambda m, x: (loss(m, x), x.values), has_aux=True),
    "jit of grad": nnx.jit(nnx.grad(loss)),
    "remat": nnx.grad(nnx.remat(loss)),
    "scan over steps": nnx.jit(
        nnx.scan(
            lambda m, x: (m, loss(m, x)),
            in_axes=(nnx.Carry, None),
            out_axes=(nnx.Carry, 0),
            length=3,
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_every_transformed_call_measures(name):
    x, module = sparse(), layer()
    before = module.density[...]
    np.testing.assert_array_equal(before, -1)
    TRANSFORMED[name](module, x)
    np.testing.assert_allclose(module.density[...], mean_density(module, x), rtol=1e-6)
    after = jax.typeof(module.density[...])
    assert (after.shape, after.dtype, after.weak_type) == ((3,), jnp.float32, False)
    # A later call, on denser data, measures anew; the whole batch counts, not its last sample.
    denser = sparse(1, density=0.9)
    TRANSFORMED[name](module, denser)
    np.testing.assert_allclose(module.density[...], mean_density(module, denser), rtol=1e-6)


def test_a_plain_transformation_that_closes_over_the_layer_leaves_the_measurement():
    x, module = sparse(), layer()
    direct = module(x).values
    measured = module.density[...]
    closed = jax.jit(lambda values: module(x.with_values(values)).values)
    np.testing.assert_array_equal(closed(x.values), direct)
    assert jax.grad(lambda v: closed(v).sum())(x.values).shape == x.values.shape
    np.testing.assert_array_equal(module.density[...], measured)


def test_density_is_measured_in_training_only():
    """Catches an evaluation that overwrites what the training set's batches have shown."""
    x, module = sparse(), layer()
    step = nnx.jit(lambda m, x: m(x).values)

    def measures(call):
        module.density[...] = jnp.full(3, 0.125)
        call()
        return bool((np.asarray(module.density[...]) != 0.125).all())

    assert measures(lambda: module(x))
    model = nnx.Sequential(module)
    model.eval()
    assert module.use_running_average
    assert not measures(lambda: step(model, x))
    assert measures(lambda: module(x, use_running_average=False))
    model.train()
    assert measures(lambda: step(model, x))
    assert not measures(lambda: module(x, use_running_average=True))
    assert not measures(lambda: nnx.view(model, use_running_average=True)(x))
    np.testing.assert_array_equal(layer(use_running_average=True)(x).values, module(x).values)


def test_an_axis_name_makes_the_density_that_of_all_devices():
    """Catches a density of one device's part of the batch, taken for that of the whole."""
    x = sparse(shape=(6, 6, 5, 2))
    parts = jax.tree.map(lambda a: a.reshape(3, 2, *a.shape[1:]), x)
    module = layer(axis_name="devices")
    run = nnx.vmap(lambda m, x: m(x).values, in_axes=(None, 0), axis_name="devices")
    values = run(module, parts)
    whole = layer()
    np.testing.assert_array_equal(values.reshape(6, 3, -1), whole(x).values)
    np.testing.assert_allclose(module.density[...], whole.density[...], rtol=1e-6)
    np.testing.assert_allclose(module.density[...], mean_density(whole, x), rtol=1e-6)
    # Where nothing is measured, no device waits for another, and the axis need not exist.
    layer(axis_name="devices", use_running_average=True)(x)


def test_layers_stacked_by_vmap_run_in_a_scan_and_measure_each():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        options = {"density_bound": 0.5, "kernel_density": 0.5, "rngs": rngs}
        return Conv(2, 2, (3, 3), kernel_init=nnx.initializers.ones, **options)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(module, x):
        return module(x)

    stacked = stack(nnx.Rngs(0))
    assert stacked.kernel.shape == stacked.kernel_keys.shape == (4, 18)
    x = sparse()
    start = ilajax.k_select(x, 15)
    y = run(stacked, start)
    assert y.shape == x.shape
    assert stacked.density.shape == (4, 2)
    assert (np.asarray(stacked.density[...]).sum(axis=1) > 0).all()
