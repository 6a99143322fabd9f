"""nn.load_state: a shrunk model goes through Orbax into a freshly built one, and nothing else does."""

import gc
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import drawn
import ilajax
from ilajax.nn import Conv, load_state
from ilajax.optim import compact, excess_density, sparse_training

X = ilajax.from_dense(drawn.normal(0, (2, 8, 1)), capacity=8)


class Net(nnx.Module):
    """Two filters of one length in full and of two lengths when they have shrunk, and other variables."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        options = {"density_bound": 1.0, "kernel_init": drawn.kernel_init, "rngs": rngs}
        self.layers = nnx.List([Conv(1, 2, 3, **options), Conv(2, 1, 3, **options)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(ilajax.to_dense(x)[..., 0])


def build(seed=0, inner=optax.adam(0.01)):
    model = Net(seed)
    recipe = sparse_training(model, inner, threshold=0.6, momentum=0.5)
    return model, nnx.Optimizer(model, recipe, wrt=nnx.Param)


def train(model, optimizer, epochs):
    for _ in range(epochs):
        grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
        excess = excess_density(model)
        optimizer.update(model, grads, excess_density=excess, epoch_end=True)


@pytest.fixture(scope="module")
def shrunk():
    """A model and its optimizer whose filters have lost weights; tests must not change them."""
    model, optimizer = build()
    train(model, optimizer, 2)
    compact(model, optimizer, shrink=True)
    lengths = [layer.kernel.size for layer in model.layers]
    assert len({*lengths, 6}) == 3, f"{lengths}: each of its own length, and shorter than 6"
    return model, optimizer


def variables(node):
    return [(path, v.get_value()) for path, v in nnx.to_flat_state(nnx.state(node))]


def assert_equal_variables(a, b):
    for (path, x), (other, y) in zip(variables(a), variables(b), strict=True):
        assert path == other
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def through_checkpointer(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "checkpoint")


def through_manager(path, tree):
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(path) as manager:
        return manager.restore(3, args=ocp.args.StandardRestore())


def through_composite(path, tree):
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
    with ocp.CheckpointManager(path) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(3, args=args).state


def through_metadata(path, tree):
    """A target of the checkpoint's own shapes, each with a sharding: for other devices."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(
            lambda stored: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding),
            checkpointer.metadata(path / "checkpoint").item_metadata.tree,
        )
        return checkpointer.restore(path / "checkpoint", target)


STORES = {
    "memory": lambda path, tree: tree,
    "checkpointer": through_checkpointer,
    "manager": through_manager,
    "composite": through_composite,
}
TREES = {
    "state": lambda nodes: nnx.state(nodes),
    "pure dict": lambda nodes: nnx.to_pure_dict(nnx.state(nodes)),
    "states": lambda nodes: tuple(map(nnx.state, nodes)),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("store", STORES)
def test_a_shrunk_model_comes_back_into_a_fresh_one(tmp_path, shrunk, store, tree):
    """Catches a filter or slot in its full length, strings for indices, random keys, a node called value."""
    fresh = build(seed=1)
    load_state(fresh, STORES[store](tmp_path, TREES[tree](shrunk)))
    assert_equal_variables(fresh, shrunk)


def test_training_goes_on_as_if_never_stopped(tmp_path, shrunk):
    """Catches slots that ended up at another filter or in another order than its weights."""
    kept, fresh = nnx.clone(shrunk), build(seed=1)
    load_state(fresh, through_checkpointer(tmp_path, nnx.state(shrunk)))
    for model, optimizer in (kept, fresh):
        train(model, optimizer, 2)
        compact(model, optimizer, shrink=True)
    assert_equal_variables(fresh, kept)


def test_a_model_by_itself(tmp_path, shrunk):
    """Catches a call that needs the optimizer: inference has none."""
    model = Net(seed=1)
    load_state(model, through_checkpointer(tmp_path, nnx.state(shrunk[0])))
    np.testing.assert_array_equal(model(X), shrunk[0](X))


def test_models_in_a_dict_and_a_target_of_the_stored_shapes(tmp_path, shrunk):
    """Catches an optimizer's slots looked for under one layout of the tree alone."""
    saved = dict(zip(("net", "rule"), shrunk, strict=True))
    fresh = dict(zip(("net", "rule"), build(seed=1), strict=True))
    load_state(fresh, through_metadata(tmp_path, nnx.to_pure_dict(nnx.state(saved))))
    assert_equal_variables(fresh, saved)


@pytest.mark.parametrize(
    "inner",
    [optax.chain(optax.scale_by_factored_rms(), optax.scale(-0.01)), optax.lbfgs(0.01)],
    ids=["placeholders", "histories"],
)
def test_slots_of_other_shapes_than_the_filter(inner):
    """Catches one-element placeholders, and histories with a leading axis, taken for wrong lengths."""
    saved, fresh = build(inner=inner), build(seed=1, inner=inner)
    for layer in saved[0].layers:
        layer.kernel_keys[...] = jnp.arange(6).at[2:].set(6)
        mark = saved[1].opt_state[-1].inner_state.pruned
        mark["layers"][0]["kernel"][...] = mark["layers"][1]["kernel"][...] = jnp.arange(6) >= 2
    compact(*saved, shrink=True)
    assert saved[0].layers[0].kernel.size == 2
    load_state(fresh, nnx.state(saved))
    assert_equal_variables(fresh, saved)


def test_tied_and_stacked_filters():
    """Catches a shared filter looked for at its second place, and a stack measured by its first axis."""

    def tied():
        a, b = (
            Conv(1, 2, 3, density_bound=0.5, kernel_init=drawn.kernel_init, rngs=nnx.Rngs(seed))
            for seed in (0, 1)
        )
        b.kernel, b.kernel_keys = a.kernel, a.kernel_keys
        return nnx.List([a, b])

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return Conv(1, 2, 3, density_bound=0.5, kernel_init=nnx.initializers.ones, rngs=rngs)

    saved = tied()
    saved[1].kernel.set_value(jnp.ones(2))
    saved[1].kernel_keys.set_value(jnp.array([1, 4], jnp.int32))
    fresh = tied()
    load_state(fresh, nnx.state(saved))
    assert fresh[0].kernel is fresh[1].kernel
    assert_equal_variables(fresh, saved)

    saved, fresh = stack(nnx.Rngs(0)), stack(nnx.Rngs(1))
    saved.kernel.set_value(jnp.ones((3, 2)))
    saved.kernel_keys.set_value(jnp.array([[0, 1], [4, 6], [6, 6]], jnp.int32))
    load_state(fresh, nnx.state(saved))
    assert_equal_variables(fresh, saved)


def test_arrays_keep_their_sharding(shrunk):
    """Catches arrays that are copied to the default device on their way."""
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    stored = jax.tree.map(lambda a: jax.device_put(a, sharding), nnx.state(shrunk[0]))
    model = Net()
    load_state(model, stored)
    assert all(array.sharding == sharding for _, array in variables(model))


# --- What does not fit -------------------------------------------------------------------------------------


def raises_and_changes_nothing(nodes, stored, match):
    before = nnx.clone(nodes)
    with pytest.raises(ValueError, match=match):
        load_state(nodes, stored)
    assert_equal_variables(nodes, before)


def test_what_is_missing_or_left_over_is_named(shrunk):
    """Catches parameters put in without their keys, and a checkpoint of another network."""
    model, optimizer = build(seed=1)
    params = nnx.state(shrunk[0], nnx.Param)
    raises_and_changes_nothing(model, params, r"missing.*kernel_keys.*layers\.0\.kernel_keys")
    raises_and_changes_nothing((model, optimizer), nnx.state(shrunk[:1]), r"missing.*1\.opt_state")
    whole = nnx.to_pure_dict(nnx.state(shrunk[0]))
    whole["tail"] = {"kernel": jnp.ones(2)}
    raises_and_changes_nothing(model, whole, r"no use .*: tail\.kernel\.")


def test_what_has_another_shape_or_dtype_is_named(shrunk):
    """Catches weights and keys of two lengths, slots that kept theirs, and a quiet change of dtype."""
    model, optimizer = build(seed=1)

    def changed(change):
        tree = nnx.to_pure_dict(nnx.state(shrunk))
        change(tree)
        return tree

    def shorter(tree):
        tree[0]["layers"][0]["kernel"] = tree[0]["layers"][0]["kernel"][:-1]

    def longer_slot(tree):
        tree[1]["opt_state"][1][0]["mu"]["layers"][0]["kernel"] = jnp.ones(6)

    def wider(tree):
        tree[0]["head"]["kernel"] = jnp.ones((9, 2))

    def halved(tree):
        tree[0]["head"]["bias"] = jnp.ones(2, jnp.bfloat16)

    def too_long(tree):
        for name, array in (("kernel", jnp.ones(7)), ("kernel_keys", jnp.arange(7))):
            tree[0]["layers"][0][name] = array

    size = shrunk[0].layers[0].kernel.size
    for change, match in (
        (shorter, rf"0\.layers\.0\.kernel \(.*\[{size - 1}\], expected float32\[{size}\]\)"),
        (longer_slot, r"1\.opt_state\.1\.0\.mu\.layers\.0\.kernel \(stored as float32\[6\]"),
        (wider, r"0\.head\.kernel \(stored as float32\[9, 2\], expected float32\[8, 2\]\)"),
        (halved, r"0\.head\.bias \(stored as bfloat16\[2\]"),
        (too_long, r"0\.layers\.0\.kernel \(.*0\.layers\.0\.kernel_keys \("),
    ):
        raises_and_changes_nothing((model, optimizer), changed(change), match)


def test_what_is_no_checkpoint_raises(shrunk):
    """Catches arrays without values, inside `nnx.jit` or of an abstract state, that fail without a way on."""
    fresh = Net(seed=1)
    stored = nnx.to_pure_dict(nnx.state(shrunk[0]))
    with pytest.raises(TypeError, match=r"but \S+ is a ShapeDtypeStruct.*outside of nnx.jit"):
        load_state(fresh, jax.eval_shape(lambda: stored))
    with pytest.raises(TypeError, match=r"but \S+ is a \S*Tracer.*outside of nnx.jit"):
        nnx.jit(load_state)(fresh, stored)


@pytest.fixture
def orbax_refuses():
    """Collects the coroutines that Orbax leaves behind where it raises: they warn, here and nowhere else."""
    yield
    gc.collect()


REFUSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@REFUSED
def test_what_orbax_fills_up_raises(tmp_path, shrunk, orbax_refuses):
    """Catches keys of 0 from strict=False, with which every removed weight becomes the filter's first."""
    fresh, path = Net(seed=1), tmp_path / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.state(shrunk[0]))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(fresh))
    with ocp.StandardCheckpointer() as checkpointer:
        with pytest.raises(ValueError, match="shape"):
            checkpointer.restore(path, target)
        stored = checkpointer.restore(path, target, strict=False)
    raises_and_changes_nothing(fresh, stored, r"layers\.0\.kernel_keys must ascend.*strict=False")
    nnx.update(fresh, stored)
    for layer in fresh.layers:
        with pytest.raises(ValueError, match=r"keys must ascend.*load_state"):
            layer.sparse_kernel.validate()
    with pytest.raises(ValueError, match=r"kernel_keys must ascend.*load_state"):
        fresh(X)


def test_parameters_without_their_keys_raise_at_the_next_call(shrunk):
    """Catches values of one length under keys of another that reach the kernel."""
    fresh = Net(seed=1)
    nnx.update(fresh, nnx.state(shrunk[0], nnx.Param))
    with pytest.raises(ValueError, match="restored without its kernel_keys"):
        fresh(X)


@REFUSED
def test_the_page_runs_as_pasted(tmp_path, capsys, orbax_refuses):
    """Catches an example in docs/checkpoints.md that does not do what the page says."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    runpy.run_path(str(script))
    left, size = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert 0 < left < size == 72
