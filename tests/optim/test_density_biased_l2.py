"""density_biased_l2 against equation 4, a weight and a step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilajax.optim import density_biased_l2

HYPER = {"offset": 0.1, "b1": 0.2, "b2": 0.3}


def equation_4(excess, offset, b1, b2):
    if excess > 0:
        return offset + b1 * excess
    return -b2 * (-excess)


def oracle(weights, gradients, excesses, scale, offset, b1, b2, momentum):
    """Updates [steps][n] and the last bias [n], with loops over steps and weights in float64."""
    bias, updates = [0.0] * len(weights), []
    for g_step, e_step in zip(gradients, excesses, strict=True):
        row = []
        for i, (w, g, e) in enumerate(zip(weights, g_step, e_step, strict=True)):
            bias[i] = momentum * bias[i] + (1 - momentum) * equation_4(e, offset, b1, b2)
            row.append(g + scale * (w + bias[i]))
        updates.append(row)
    return updates, bias


def floats(bound):
    # XLA's CPU threads flush subnormals to 0, which an offset would tell from above 0.
    return st.floats(-bound, bound, width=32, allow_subnormal=False)


def vectors(steps, size, bound=1.0):
    return st.lists(
        st.lists(floats(bound), min_size=size, max_size=size), min_size=steps, max_size=steps
    )


@jax.jit
def jitted_update(updates, state, params, excess, scale, offset, b1, b2, momentum):
    """One compiled form for all hyperparameters, which are traced as optax.inject_hyperparams does."""
    tx = density_biased_l2(scale, offset=offset, b1=b1, b2=b2, momentum=momentum)
    return tx.update(updates, state, params, excess_density=excess)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(floats(3), min_size=4, max_size=4),
    gradients=vectors(3, 4),
    excesses=vectors(3, 4),
    scale=st.floats(0, 2),
    offset=st.floats(0, 1),
    b1=st.floats(0, 1),
    b2=st.floats(0, 1),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_follows_equation_4(weights, gradients, excesses, scale, offset, b1, b2, momentum):
    hyperparameters = scale, offset, b1, b2, momentum
    params = np.array(weights, np.float32)
    state = density_biased_l2(scale, offset=offset, b1=b1, b2=b2).init(params)
    expected, bias = oracle(weights, gradients, excesses, *hyperparameters)
    for g, e, row in zip(np.float32(gradients), np.float32(excesses), expected, strict=True):
        updates, state = jitted_update(g, state, params, e, *hyperparameters)
        np.testing.assert_allclose(updates, row, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.bias, bias, rtol=1e-5, atol=1e-6)


def test_is_the_gradient_of_the_regulariser():
    w, e = jnp.array([0.5, -1.0, 2.0]), jnp.array([0.3, -0.2, 0.0])
    b = jnp.array([equation_4(x, **HYPER) for x in e.tolist()])
    tx = density_biased_l2(0.7, **HYPER)
    updates, _ = tx.update(jnp.zeros(3), tx.init(w), w, excess_density=e)
    np.testing.assert_allclose(
        updates, jax.grad(lambda w: 0.7 / 2 * jnp.sum((w + b) ** 2))(w), rtol=1e-6
    )


def test_at_the_bound_itself_there_is_no_bias_and_no_offset():
    tx, w = density_biased_l2(1.0, **HYPER), jnp.array([0.25])
    updates, state = tx.update(jnp.zeros(1), tx.init(w), w, excess_density=jnp.zeros(1))
    assert (updates[0], state.bias[0]) == (0.25, 0.0)


# --- Trees -----------------------------------------------------------------------------------------------

PARAMS = {
    "conv": {"kernel": jnp.ones(4), "bias": jnp.ones(2)},
    "dense": {"kernel": jnp.ones((2, 3))},
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def test_none_leaves_a_parameter_alone_and_scalars_broadcast():
    tx = density_biased_l2(1.0, **HYPER)
    excess = {"conv": {"kernel": jnp.array([0.5, 0.5, -1.0, 0.0]), "bias": 1.0}, "dense": None}
    updates, state = tx.update(ZEROS, tx.init(PARAMS), PARAMS, excess_density=excess)
    np.testing.assert_allclose(updates["conv"]["kernel"], [1.2, 1.2, 0.7, 1.0], rtol=1e-6)
    np.testing.assert_allclose(updates["conv"]["bias"], [1.3, 1.3], rtol=1e-6)
    np.testing.assert_array_equal(updates["dense"]["kernel"], 0)
    assert jax.tree.map(jnp.shape, state.bias) == jax.tree.map(jnp.shape, PARAMS)


def test_masked_parameters_and_missing_gradients_stay_out():
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", PARAMS)
    tx = optax.masked(density_biased_l2(1.0, **HYPER), kernels)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS, excess_density=0.0)
    np.testing.assert_array_equal(updates["conv"]["kernel"], 1)
    np.testing.assert_array_equal(updates["conv"]["bias"], 0)

    tx = density_biased_l2(1.0, **HYPER)
    without = ZEROS | {"dense": {"kernel": None}}
    updates, _ = tx.update(without, tx.init(PARAMS), PARAMS, excess_density=0.0)
    assert updates["dense"]["kernel"] is None


def test_other_transformations_of_a_chain_get_and_ignore_the_extra_arguments():
    tx = optax.chain(optax.clip(1.0), density_biased_l2(1.0, **HYPER), optax.adam(1e-3))
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS, excess_density=0.0, epoch_end=True)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_a_stable_carry_of_scan_and_keeps_dtypes(dtype):
    tx = density_biased_l2(0.1, **HYPER, momentum=0.9)
    params = jnp.ones(3, dtype)

    def step(state, e):
        updates, state = tx.update(jnp.zeros(3, dtype), state, params, excess_density=e)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(params), jnp.full((200, 1), 0.5))
    assert updates.dtype == dtype
    assert state.bias.dtype == jnp.float32
    # In bfloat16 a low-pass of 0.9 would stop far from its target.
    np.testing.assert_allclose(state.bias, 0.1 + 0.2 * 0.5, rtol=1e-4)


def test_hyperparameters_can_be_injected():
    tx = optax.inject_hyperparams(density_biased_l2)(1.0, **HYPER, momentum=0.0)
    params = jnp.ones(2)
    state = tx.init(params)
    state.hyperparams["scale"] = jnp.asarray(2.0)
    updates, _ = tx.update(jnp.zeros(2), state, params, excess_density=0.0)
    np.testing.assert_allclose(updates, 2.0)


# --- Bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scale", "offset", "b1", "b2"])
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_numbers_out_of_range_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        density_biased_l2(**({"scale": 1.0} | HYPER | {name: value}))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_out_of_range_raises(momentum):
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\)"):
        density_biased_l2(1.0, **HYPER, momentum=momentum)


def test_updates_that_lack_something_raise():
    tx = density_biased_l2(1.0, **HYPER)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(ZEROS, state, excess_density=0.0)
    with pytest.raises(TypeError, match="excess_density"):
        tx.update(ZEROS, state, PARAMS)
    shorter = jax.tree.map(lambda w: w[:1], PARAMS)
    with pytest.raises(
        ValueError, match=r"has shape \(2,\), but the parameter has shape \(1,\).*load_st"
    ):
        tx.update(shorter, state, shorter, excess_density=0.0)
    with pytest.raises(ValueError, match=r"no leaf for the parameter \['dense'\]\['kernel'\]"):
        tx.update(ZEROS, state, PARAMS, excess_density={"conv": None})
    with pytest.raises(
        ValueError, match=r"\['kernel'\] must broadcast .* \(4,\), got shape \(3,\)"
    ):
        tx.update(
            ZEROS,
            state,
            PARAMS,
            excess_density={"conv": {"kernel": jnp.zeros(3), "bias": None}, "dense": None},
        )
