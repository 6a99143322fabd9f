"""Normalisation against Flax's modules, applied to the stored entries alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ilajax
import samples
from ilajax.nn import BatchNorm, GroupNorm, LayerNorm


def trained(layer, seed=0):
    """The layer with other parameters than it starts with."""
    rng = np.random.default_rng(seed)
    for parameter in (layer.scale, layer.bias):
        if parameter is not None:
            parameter[...] = jnp.asarray(rng.normal(size=parameter.shape), parameter.dtype)
    return layer


def pure(layer):
    """The layer as a function, whose running statistics go nowhere."""
    graph, state = nnx.split(layer)
    return lambda x: nnx.merge(graph, state, copy=True)(x)


def real(seed=0, **options):
    return samples.tensor(seed, exact=False, **options)


def entries(x, b, c):
    """What a channel of a sample stores."""
    keys = x.keys[b, 0 if x.shared else c]
    return np.asarray(x.values, np.float32)[b, c][np.asarray(keys) < x.sites]


def assert_entries(y, x, b, c, want, tolerance=1e-5):
    np.testing.assert_allclose(entries(y, b, c), want, rtol=tolerance, atol=tolerance)
    padding = np.asarray(jnp.broadcast_to(x.keys == x.sites, x.values.shape))
    np.testing.assert_array_equal(np.asarray(y.values)[padding], 0)
    assert y.keys is x.keys


@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared"])
@pytest.mark.parametrize("fast", [False, True])
def test_batch_norm_is_flaxs_on_what_a_channel_stores(shared, fast):
    """Catches padding that counts, or channels that are taken together."""
    options = {"momentum": 0.7, "epsilon": 1e-3, "use_fast_variance": fast, "rngs": nnx.Rngs(0)}
    x = real(1, batch=3, channels=4, shared=shared)
    layer, twins = trained(BatchNorm(4, **options)), []
    y = layer(x)
    for c in range(4):
        twin = nnx.BatchNorm(1, **options)
        twin.scale[...], twin.bias[...] = layer.scale[c : c + 1], layer.bias[c : c + 1]
        stored = np.concatenate([entries(x, b, c) for b in range(3)])
        want = np.split(
            twin(stored[:, None])[:, 0], np.cumsum([len(entries(x, b, c)) for b in range(2)])
        )
        for b in range(3):
            assert_entries(y, x, b, c, want[b])
        twins.append(twin)
    for name in ("mean", "var"):
        want = np.concatenate([getattr(t, name)[...] for t in twins])
        np.testing.assert_allclose(getattr(layer, name)[...], want, rtol=1e-5, atol=1e-6)
    layer.eval()
    y = layer(x)
    for c, twin in enumerate(twins):
        twin.eval()
        assert_entries(y, x, 0, c, twin(entries(x, 0, c)[:, None])[:, 0])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared"])
def test_group_norm_is_flaxs_on_what_a_group_stores(shared, groups):
    """Catches samples or groups that are taken together."""
    x = real(2, batch=3, channels=4, shared=shared)
    layer = trained(GroupNorm(4, groups, rngs=nnx.Rngs(0)))
    y = layer(x)
    for b in range(3):
        for group in np.split(np.arange(4), groups):
            stored = np.concatenate([entries(x, b, c) for c in group])
            mean, std = stored.mean(), np.sqrt(stored.var() + layer.epsilon)
            for c in group:
                want = (entries(x, b, c) - mean) / std * layer.scale[c] + layer.bias[c]
                assert_entries(y, x, b, c, want)


def test_layer_norm_is_flaxs_at_each_site():
    """Catches sites that are taken together."""
    x = real(3, batch=2, channels=5, shared=True)
    options = {"use_scale": False, "epsilon": 1e-2, "rngs": nnx.Rngs(0)}
    layer, twin = trained(LayerNorm(5, **options)), trained(nnx.LayerNorm(5, **options))
    y = layer(x)
    for b in range(2):
        want = twin(np.stack([entries(x, b, c) for c in range(5)], axis=1))
        for c in range(5):
            assert_entries(y, x, b, c, want[:, c])


@pytest.mark.parametrize("kind", [BatchNorm, GroupNorm, LayerNorm])
def test_a_full_grid_is_flaxs(kind):
    """Catches another default, initial value, dtype or order of parameters than Flax's."""
    dense = jax.random.normal(jax.random.key(0), (3, 4, 5, 32))
    x = ilajax.from_points(
        np.stack(np.meshgrid(range(4), range(5), indexing="ij"), -1).reshape(1, 20, 2).repeat(3, 0),
        np.asarray(dense).reshape(3, 20, 32),
        spatial_shape=(4, 5),
        capacity=21,
    )
    twin = getattr(nnx, kind.__name__)
    for dtype in (None, jnp.bfloat16):
        got = kind(32, dtype=dtype, rngs=nnx.Rngs(0))(x)
        want = twin(32, dtype=dtype, rngs=nnx.Rngs(0))(dense)
        assert got.dtype == want.dtype
        tolerance = 1e-5 if dtype is None else 2e-2
        np.testing.assert_allclose(ilajax.to_dense(got), want, rtol=tolerance, atol=tolerance)


def test_all_fives_have_the_mean_five():
    """Catches the mistake of x.map(nnx.BatchNorm(...)), which counts padding as zeros."""
    x = samples.from_entries((6,), [[{1: 5.0, 3: 5.0}]], 6)
    layer = BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x)
    assert (layer.mean[0], layer.var[0]) == (5, 0)


@pytest.mark.parametrize("fast", [False, True])
def test_nothing_stored_changes_nothing(fast):
    """Catches a NaN, in a result, a statistic or a gradient, of a channel that stores no entry."""
    layer = BatchNorm(2, use_fast_variance=fast, momentum=0.5, rngs=nnx.Rngs(0))
    x = samples.from_entries((6,), [[{}, {1: 1.0, 2: 3.0}], [{}, {}]], 3)
    y = layer(x)
    np.testing.assert_array_equal(layer.mean[...], [0, 1])
    np.testing.assert_array_equal(layer.var[...], [1, 1])
    assert np.isfinite(y.values).all()
    for made in (layer, GroupNorm(2, 2, use_fast_variance=fast, rngs=nnx.Rngs(0))):
        gradients = nnx.grad(lambda layer: (layer(x).values ** 2).sum())(made)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        pull = jax.grad(lambda v, made=made: pure(made)(x.with_values(v)).values.sum())
        assert np.isfinite(pull(x.values)).all()


def test_gradients_are_those_of_the_entries():
    """Catches a cotangent that comes from padding, or goes there."""
    x = real(4, batch=2, channels=1, density=0.3)
    layer = trained(BatchNorm(1, rngs=nnx.Rngs(0)))
    counts = [len(entries(x, b, 0)) for b in range(2)]
    g = np.random.default_rng(0).normal(size=x.values.shape).astype(np.float32)
    _, pull = jax.vjp(lambda v: pure(layer)(x.with_values(v)).values, x.values)

    def flat(a):
        return jnp.concatenate([a[b, 0, :n] for b, n in enumerate(counts)])

    twin = trained(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    _, want = jax.vjp(lambda v: pure(twin)(v[:, None])[:, 0], flat(x.values))
    np.testing.assert_allclose(
        flat(pull(jnp.asarray(g))[0]), want(flat(g))[0], rtol=1e-4, atol=1e-5
    )
    for b, n in enumerate(counts):
        np.testing.assert_array_equal(pull(jnp.asarray(g))[0][b, 0, n:], 0)


def test_under_an_axis_name_all_entries_count_alike():
    """Catches a mean of means, which weighs a device's few entries as much as another's many."""
    x = samples.from_entries((6,), [[{1: 1.0}], [{0: 2.0, 1: 4.0, 5: 9.0}]], 4)
    mapped = BatchNorm(1, axis_name="d", momentum=0.0, rngs=nnx.Rngs(0))
    whole = BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))

    graph, state = nnx.split(mapped)

    def each(values, keys):
        layer = nnx.merge(graph, state, copy=True)
        y = layer(ilajax.SparseTensor(keys[None], values[None], (6,)))
        return y.values[0], layer.mean[0], layer.var[0]

    values, mean, var = jax.vmap(each, axis_name="d")(x.values, x.keys)
    want = whole(x)
    np.testing.assert_allclose(values, want.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.repeat(whole.mean[...], 2))
    np.testing.assert_allclose(var, np.repeat(whole.var[...], 2), rtol=1e-6)


def test_in_a_network():
    """Catches modules that Sequential, train and eval, jit, or the density regulariser do not go with."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        ilajax.nn.Conv(2, 8, (3, 3), support="input", use_bias=False, rngs=rngs),
        BatchNorm(8, rngs=rngs),
        ilajax.nn.ReLU(),
        ilajax.nn.Conv(8, 8, (3, 3), strides=2, density_bound=0.5, select_by="site", rngs=rngs),
        GroupNorm(8, 4, rngs=rngs),
        ilajax.nn.Dropout(0.2, rngs=rngs),
        LayerNorm(8, rngs=rngs),
        ilajax.nn.GlobalPool(),
        nnx.Linear(8, 2, rngs=rngs),
    )
    x = real(5, shared=True)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    loss = nnx.jit(nnx.value_and_grad(lambda model: (model(x) ** 2).sum()))
    _, gradients = loss(model)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    after = nnx.state(model, nnx.BatchStat)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    excess = ilajax.optim.excess_density(model)
    bounded = [e for e in jax.tree.leaves(excess) if e is not None]
    assert len(bounded) == 2, "the filter and the bias of the one layer with a bound"
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda x: BatchNorm(3, rngs=nnx.Rngs(0))(x),
            ValueError,
            "x must have the 3 channels.*got 2",
        ),
        (
            lambda x: GroupNorm(4, 2, rngs=nnx.Rngs(0))(x),
            ValueError,
            "the 4 channels.*num_features=2",
        ),
        (lambda x: LayerNorm(2, rngs=nnx.Rngs(0))(x), ValueError, "x must have a shared support"),
        (
            lambda x: BatchNorm(2, rngs=nnx.Rngs(0))(x.values),
            TypeError,
            "x must be an ilajax.SparseTensor",
        ),
        (
            lambda x: BatchNorm(2, axis=1, rngs=nnx.Rngs(0)),
            TypeError,
            "BatchNorm takes no axis, got 1",
        ),
        (lambda x: LayerNorm(2, feature_axes=1, rngs=nnx.Rngs(0)), TypeError, "no feature_axes"),
        (
            lambda x: GroupNorm(2, 1, reduction_axes=1, rngs=nnx.Rngs(0)),
            TypeError,
            "no reduction_axes",
        ),
        (lambda x: ilajax.nn.ReLU()(x.values), TypeError, "x must be an ilajax.SparseTensor"),
        (lambda x: ilajax.nn.Dropout(0.5)(x.values), TypeError, "x must be an ilajax.SparseTensor"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make(real(6))
