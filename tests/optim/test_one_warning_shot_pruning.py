"""one_warning_shot_pruning against the rule, a weight and an epoch at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ilajax.optim import one_warning_shot_pruning

THRESHOLD = 0.5


class Oracle:
    """One weight: the paper's words as branches."""

    def __init__(self, weight):
        self.weight, self.warned, self.pruned = np.float32(weight), False, False

    def step(self, update, epoch_end):
        """The update that is let through; the weight moves by it."""
        let_through = np.float32(0.0 if self.pruned else update)
        if epoch_end and not self.pruned:
            if abs(self.weight) < THRESHOLD:
                if self.warned:
                    self.pruned = True
                    let_through = -self.weight
                self.warned = True
            else:
                self.warned = False
        self.weight = np.float32(self.weight + let_through)
        return let_through


values = st.floats(-1.0, 1.0, width=32, allow_subnormal=False)
steps = st.lists(
    st.tuples(st.lists(values, min_size=5, max_size=5), st.booleans()), min_size=1, max_size=8
)

UPDATE = jax.jit(
    lambda u, state, w, end: one_warning_shot_pruning(THRESHOLD).update(u, state, w, epoch_end=end)
)


@settings(max_examples=60, deadline=None)
@given(start=st.lists(values, min_size=5, max_size=5), steps=steps)
def test_follows_the_rule(start, steps):
    weights = [Oracle(w) for w in start]
    params = np.array(start, np.float32)
    state = one_warning_shot_pruning(THRESHOLD).init(params)
    for updates, epoch_end in steps:
        expected = [w.step(u, epoch_end) for w, u in zip(weights, updates, strict=True)]
        got, state = UPDATE(np.array(updates, np.float32), state, params, epoch_end)
        params = params + np.asarray(got)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(params, [w.weight for w in weights])
        np.testing.assert_array_equal(state.pruned, [w.pruned for w in weights])
        alive = ~np.asarray(state.pruned)
        np.testing.assert_array_equal(
            np.asarray(state.warned)[alive], np.array([w.warned for w in weights])[alive]
        )


def run(params, epochs, updates=0.0, threshold=THRESHOLD):
    """Epochs of one step each, with the same update."""
    tx = one_warning_shot_pruning(threshold)
    state = tx.init(params)
    for _ in range(epochs):
        u, state = tx.update(jnp.full_like(params, updates), state, params, epoch_end=True)
        params = optax.apply_updates(params, u)
    return params, state


def test_small_twice_is_pruned_and_large_stays():
    params, state = run(jnp.array([0.1, -0.4, 0.5, -2.0, 0.0]), 2)
    np.testing.assert_array_equal(params, [0, 0, 0.5, -2, 0])
    np.testing.assert_array_equal(state.pruned, [True, True, False, False, True])


def test_a_weight_that_recovers_has_to_be_warned_again():
    tx, epoch = one_warning_shot_pruning(THRESHOLD), jnp.array
    state = tx.init(epoch([0.1]))
    for weight, pruned in [(0.1, False), (0.9, False), (-0.1, False), (0.2, True)]:
        _, state = tx.update(jnp.zeros(1), state, epoch([weight]), epoch_end=True)
        assert bool(state.pruned[0]) == pruned


def test_between_epochs_nothing_is_looked_at():
    tx, params = one_warning_shot_pruning(THRESHOLD), jnp.array([0.1])
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jnp.ones(1), state, params, epoch_end=False)
        assert updates[0] == 1
    assert not state.warned[0]


def test_threshold_zero_prunes_nothing():
    _, state = run(jnp.zeros(2), 3, threshold=0.0)
    assert not state.pruned.any()


@pytest.mark.nans
def test_nan_is_never_pruned_and_never_held_back():
    params, state = run(jnp.array([jnp.nan, 0.1]), 3)
    assert np.isnan(params[0])
    np.testing.assert_array_equal(state.pruned, [False, True])
    # What comes before it may diverge on a pruned weight.
    params, state = run(jnp.array([0.1]), 2)
    u, _ = one_warning_shot_pruning(THRESHOLD).update(
        jnp.array([jnp.nan]), state, params, epoch_end=False
    )
    assert u[0] == 0


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(0.1),
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.adagrad(0.1), optax.trace(0.9)),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ],
    ids=["adam", "adamw", "adagrad with momentum", "nesterov"],
)
def test_last_in_a_chain_it_holds_pruned_weights_at_zero(inner):
    tx = optax.chain(inner, one_warning_shot_pruning(THRESHOLD))
    params = jnp.array([0.3, 3.0])
    state, grads = tx.init(params), jnp.array([-0.01, -0.01])
    update = jax.jit(tx.update)
    for step in range(8):
        updates, state = update(grads, state, params, epoch_end=step in (1, 2))
        params = optax.apply_updates(params, updates)
        if step >= 2:
            assert params[0] == 0
    assert params[1] != 3


@pytest.mark.parametrize(
    "behind",
    [
        optax.trace(0.9),
        optax.chain(optax.trace(0.5), optax.add_decayed_weights(0.1)),
        optax.scale(0.5),
    ],
    ids=["momentum", "weight decay", "scaling"],
)
def test_it_raises_where_it_is_not_last(behind):
    """Catches pruned weights that something behind it moves, without a word, where values can be seen."""
    tx = optax.chain(one_warning_shot_pruning(THRESHOLD), behind)
    params = {"first": jnp.array([0.3, 3.0, -0.2]), "second": [jnp.array([2.0])]}
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    seen, update = state, jax.jit(tx.update)
    for epoch_end in (True, True, False):
        updates, state = tx.update(zeros, state, params, epoch_end=epoch_end)
        jitted, seen = update(zeros, seen, params, epoch_end=epoch_end)
        jax.tree.map(np.testing.assert_allclose, updates, jitted)
        params = optax.apply_updates(params, updates)
    with pytest.raises(
        ValueError, match=r"not 0: first \(2\)\. What stands behind .* last"
    ) as raised:
        tx.update(zeros, state, params, epoch_end=True)
    assert "second" not in str(raised.value)
    update(zeros, seen, params, epoch_end=True)  # nobody can look: compact does, later


def test_inside_a_branch_of_a_conditional():
    """Catches a look at concrete arrays that fails where the update itself is traced."""
    tx = optax.apply_if_finite(one_warning_shot_pruning(THRESHOLD), max_consecutive_errors=2)
    params = {"w": jnp.array([0.3, 3.0])}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.array([0.0, 1.0])}, state, params, epoch_end=True)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"], [0, 6])


def test_moved_weights_of_a_model_are_named_by_their_path():
    """Catches a message that speaks of an nnx.State's inner structure."""
    model = nnx.Sequential(nnx.Linear(1, 2, use_bias=False, rngs=nnx.Rngs(0)))
    model.layers[0].kernel[...] = jnp.array([[0.1, 1.0]])
    tx = optax.chain(one_warning_shot_pruning(THRESHOLD), optax.scale(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    for _ in range(2):
        optimizer.update(model, grads, epoch_end=True)
    with pytest.raises(ValueError, match=r"not 0: layers\.0\.kernel \(1\)\."):
        optimizer.update(model, grads, epoch_end=True)


@pytest.mark.parametrize("update_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_pruning_update_is_exact_in_every_dtype(dtype, update_dtype):
    tx, params = one_warning_shot_pruning(THRESHOLD), jnp.array([0.123456789, -0.2], dtype)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jnp.zeros(2, update_dtype), state, params, epoch_end=True)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), 0)


def test_one_compiled_step_serves_a_traced_epoch_end():
    tx, traces = one_warning_shot_pruning(THRESHOLD), []

    @jax.jit
    def step(params, state, epoch_end):
        traces.append(None)
        updates, state = tx.update(jnp.zeros(2), state, params, epoch_end=epoch_end)
        return optax.apply_updates(params, updates), state

    params = jnp.array([0.1, 1.0])
    state = tx.init(params)
    for epoch_end in (False, True, False, True):
        params, state = step(params, state, epoch_end)
    assert len(traces) == 1
    np.testing.assert_array_equal(params, [0, 1])


def test_is_a_stable_carry_of_scan():
    tx = one_warning_shot_pruning(THRESHOLD)

    def step(carry, epoch_end):
        params, state = carry
        updates, state = tx.update(jnp.zeros(2), state, params, epoch_end=epoch_end)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.array([0.1, 1.0])
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.array([True, False, True]))
    np.testing.assert_array_equal(params, [0, 1])


def test_trees_with_none_and_masked_parameters():
    params = {"conv": {"kernel": jnp.array([0.1]), "bias": jnp.array([0.1])}, "none": None}

    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.DictKey("kernel") in path, params
        )

    tx = optax.masked(one_warning_shot_pruning(THRESHOLD), kernels)
    state = tx.init(params)
    for _ in range(2):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params, epoch_end=True)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["conv"]["kernel"], 0)
    np.testing.assert_allclose(params["conv"]["bias"], 0.1)

    # A parameter without a gradient, as optax allows.
    plain, params = one_warning_shot_pruning(THRESHOLD), {"a": jnp.ones(1)}
    updates, _ = plain.update({"a": None}, plain.init(params), params, epoch_end=True)
    assert updates == {"a": None}


def test_dense_layers_through_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.array([[0.1, 1.0], [0.2, -1.0], [-0.3, 2.0]])
    model.bias[...] = jnp.array([1.0, 0.1])
    tx = optax.chain(optax.adam(1e-3), one_warning_shot_pruning(THRESHOLD))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((4, 3))
    for _ in range(2):
        grads = nnx.grad(lambda m: (m(x) ** 2).sum())(model)
        optimizer.update(model, grads, epoch_end=True)
    np.testing.assert_array_equal(model.kernel[...] == 0, [[True, False]] * 3)
    np.testing.assert_array_equal(model.bias[...] == 0, [False, True])


@pytest.mark.parametrize("threshold", [-1e-3, float("inf"), float("nan")])
def test_a_threshold_out_of_range_raises(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        one_warning_shot_pruning(threshold)


def test_updates_that_lack_something_raise():
    tx = one_warning_shot_pruning(THRESHOLD)
    params = jnp.ones(2)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, state, epoch_end=True)
    with pytest.raises(TypeError, match="epoch_end"):
        tx.update(params, state, params)
    for wrong in (1, jnp.array([True, False])):
        with pytest.raises(TypeError, match="epoch_end must be a bool"):
            tx.update(params, state, params, epoch_end=wrong)
