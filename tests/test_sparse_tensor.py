"""SparseTensor: what it holds, what it checks, and how it behaves as a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

import ilajax
import oracles
import samples


def make(keys, values, grid=(2, 3)):
    return ilajax.SparseTensor(jnp.asarray(keys, jnp.int32), jnp.asarray(values, jnp.float32), grid)


def test_properties():
    """Catches a property that disagrees with the arrays."""
    x = make([[[0, 4, 6], [6, 6, 6]]], [[[1, 2, 0], [0, 0, 0]]])
    assert (x.batch_size, x.channels, x.capacity, x.sites) == (1, 2, 3, 6)
    assert x.shape == (1, 2, 3, 2)
    assert x.spatial_shape == (2, 3)
    assert x.dtype == jnp.float32
    assert not x.shared
    assert x.counts.dtype == jnp.int32
    np.testing.assert_array_equal(x.counts, [[2, 0]])
    assert x.density.dtype == jnp.float32
    np.testing.assert_allclose(x.density, [[1 / 3, 0]])


def test_properties_of_a_shared_support():
    """Catches counts of the one key row in place of one for each channel."""
    x = make([[[0, 4, 6]], [[6, 6, 6]]], np.zeros((2, 4, 3)))
    assert x.shared
    assert (x.channels, x.shape) == (4, (2, 2, 3, 4))
    np.testing.assert_array_equal(x.counts, [[2] * 4, [0] * 4])
    np.testing.assert_allclose(x.density, [[1 / 3] * 4, [0] * 4], rtol=1e-6)


def test_one_channel_counts_as_shared():
    """Catches a tensor of one channel that is refused where a shared support is needed."""
    assert make([[[0, 6]]], [[[1, 0]]]).shared


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_unshare(shared, dtype):
    """Catches an unshared tensor that is another dense array, or whose keys are still shared."""
    x = samples.tensor(0, shared=shared, dtype=dtype)
    own = x.unshare()
    assert own.keys.shape == own.values.shape
    oracles.assert_invariants(own, capacity=x.capacity)
    np.testing.assert_array_equal(oracles.dense(own), oracles.dense(x))


def test_with_values():
    """Catches a support that changes with the values, and one that binds the number of channels."""
    x = samples.tensor(1, shared=True)
    more = x.with_values(jnp.zeros((2, 7, 12), jnp.bfloat16))
    assert (more.channels, more.dtype) == (7, jnp.bfloat16)
    np.testing.assert_array_equal(more.keys, x.keys)
    with pytest.raises(ValueError, match="keys"):
        samples.tensor(1).with_values(jnp.zeros((2, 7, 12)))


@pytest.mark.parametrize("shared", [False, True])
def test_map_leaves_padding_at_0(shared):
    """Catches padding that a function with f(0) != 0 fills."""
    x = samples.tensor(2, shared=shared)
    y = jax.jit(lambda x: x.map(lambda v: v + 10))(x)
    oracles.assert_invariants(y)
    want = np.where(np.asarray(x.keys) < x.sites, oracles.read(x.values) + 10, 0)
    np.testing.assert_array_equal(y.values, want)


@pytest.mark.parametrize("f", [jnp.log, jnp.sqrt, lambda v: 1 / v, lambda v: v**-0.5])
def test_map_has_finite_gradients(f):
    """Catches the NaN gradient of a function without a derivative at 0, taken at padding."""
    x = samples.tensor(3).map(jnp.abs)

    def loss(values):
        return x.with_values(values).map(f).values.sum()

    gradient = jax.jit(jax.grad(loss))(x.values)
    stored = np.asarray(x.keys) < x.sites
    np.testing.assert_array_equal(np.asarray(gradient)[~stored], 0)
    want = jax.vmap(jax.grad(f))(x.values[stored])
    np.testing.assert_allclose(np.asarray(gradient)[stored], want, rtol=1e-5)


def test_map_may_change_the_dtype():
    """Catches a map that casts back."""
    y = samples.tensor(4).map(lambda v: v.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    oracles.assert_invariants(y)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4), (2, 2, 2, 3)])
def test_coordinates(grid, shared):
    """Catches axes in another order than the grid's, and padding that looks like a site."""
    x = samples.tensor(5, 2, 3, grid, capacity=9, shared=shared)
    keys = np.asarray(x.keys)
    stored = keys < x.sites
    want = np.stack(np.unravel_index(np.where(stored, keys, 0), grid), axis=-1)
    want[~stored] = grid
    for got in (x.coordinates(), jax.jit(lambda x: x.coordinates())(x)):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


def test_coordinates_of_a_grid_near_2_31():
    """Catches a position that overflows."""
    size = 1290
    x = make([[[0, size**3 - 2, size**3]]], np.zeros((1, 1, 3)), (size,) * 3)
    want = [[0] * 3, [size - 1, size - 1, size - 2], [size] * 3]
    np.testing.assert_array_equal(x.coordinates()[0, 0], want)


@pytest.mark.parametrize("shared", [False, True])
def test_numpys_leaves_stay_numpys(shared):
    """Catches a property that calls JAX, which workers of a data loader must not."""
    x = samples.tensor(6, 2, 3, (4, 5), capacity=9, shared=shared)
    host = jax.tree.map(np.asarray, x)
    for f in (
        lambda x: x.counts,
        lambda x: x.density,
        lambda x: x.coordinates(),
        lambda x: x.map(abs),
        lambda x: x.unshare(),
        lambda x: x.with_values(x.values),
        lambda x: -x,
        lambda x: x * 2,
        lambda x: x / 3,
    ):
        for got, want in zip(jax.tree.leaves(f(host)), jax.tree.leaves(f(x)), strict=True):
            assert type(got) is np.ndarray
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_function_of_jax_maps_numpys_leaves():
    """Catches NumPy that pulls back what a function of JAX has made, inside jit for one."""
    host = jax.tree.map(np.asarray, samples.tensor(7))
    traced = jax.jit(lambda s: host.map(lambda v: v * s))(2.0)
    oracles.assert_invariants(traced)
    np.testing.assert_array_equal(traced.values, 2 * host.values)


# --- Construction and validate ---------------------------------------------------------------------

KEYS, VALUES = jnp.zeros((1, 2, 3), jnp.int32), jnp.zeros((1, 2, 3))


@pytest.mark.parametrize(
    ("keys", "values", "grid", "error", "message"),
    [
        (KEYS.astype(jnp.uint32), VALUES, (4,), TypeError, "keys must be int32.*uint32"),
        (KEYS.astype(jnp.float32), VALUES, (4,), TypeError, "keys must be int32.*float32"),
        (KEYS, VALUES.astype(jnp.int32), (4,), TypeError, "values must be float32.*int32"),
        (KEYS[0], VALUES, (4,), ValueError, r"keys must have.*\(2, 3\)"),
        (KEYS, VALUES[0], (4,), ValueError, r"values must have.*\(2, 3\)"),
        (KEYS[..., :2], VALUES, (4,), ValueError, r"keys must have.*\(1, 2, 2\)"),
        (KEYS, jnp.zeros((2, 2, 3)), (4,), ValueError, "keys must have"),
        (KEYS, jnp.zeros((1, 4, 3)), (4,), ValueError, "keys must have"),
        (KEYS[..., :0], VALUES[..., :0], (4,), ValueError, "capacity"),
        (KEYS, VALUES, (), ValueError, "spatial_shape"),
        (KEYS, VALUES, (4, 0), ValueError, "spatial_shape"),
        (KEYS, VALUES, (2**16, 2**15), ValueError, "spatial_shape.*2147483648"),
        (KEYS, VALUES, (2.5,), TypeError, "spatial_shape.*2.5"),
        ([[[0]]], VALUES, (4,), TypeError, "keys must be an array.*list"),
        (KEYS, None, (4,), TypeError, "values must be an array.*NoneType"),
    ],
)
def test_the_constructor_checks_shapes_and_dtypes(keys, values, grid, error, message):
    """Catches arrays that do not fit together and are found out only inside a kernel."""
    with pytest.raises(error, match=message):
        ilajax.SparseTensor(keys, values, grid)


GOOD = ([[[0, 4, 6], [1, 2, 3]]], [[[1, 2, 0], [3, 4, 5]]])


def test_validate_returns_the_tensor():
    """Catches a validate that cannot be chained, or that rejects what is right."""
    x = make(*GOOD)
    assert x.validate() is x
    make([[[0, 1, 2, 3, 4, 5]]], np.ones((1, 1, 6))).validate()  # full
    make([[[6]]], [[[0]]]).validate()  # empty
    make([[[2]]], [[[0]]]).validate()  # a stored zero


@pytest.mark.nans
def test_validate_accepts_stored_nan():
    """Catches a validate that hides a diverging network behind a ValueError."""
    make([[[0, 6]]], [[[np.nan, 0]]]).validate()


@pytest.mark.nans
@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([[[0, 4, 6], [1, 1, 3]]], GOOD[1], "batch 0, channel 1.*ascend"),
        ([[[0, 4, 6], [2, 1, 3]]], GOOD[1], "batch 0, channel 1.*ascend"),
        ([[[0, 6, 4], [1, 2, 3]]], [[[1, 0, 2], [3, 4, 5]]], "batch 0, channel 0.*padding"),
        ([[[-1, 4, 6], [1, 2, 3]]], GOOD[1], "batch 0, channel 0.*outside"),
        ([[[0, 4, 7], [1, 2, 3]]], GOOD[1], "batch 0, channel 0.*outside"),
        (GOOD[0], [[[1, 2, 9], [3, 4, 5]]], "batch 0, channel 0.*padding"),
        (GOOD[0], [[[1, 2, np.nan], [3, 4, 5]]], "batch 0, channel 0.*padding"),
        ([[[0, 4, 6]], [[3, 2, 6]]], np.zeros((2, 2, 3)), "batch 1, channel 0.*shared"),
    ],
)
def test_validate_names_the_broken_segment(keys, values, message):
    """Catches an invariant that is not checked, or an error that does not say where."""
    with pytest.raises(ValueError, match=message):
        make(keys, values).validate()


def test_validate_checks_what_a_pytree_may_hold():
    """Catches wrong dtypes and shapes that came in past the constructor."""
    x = make(*GOOD)
    with pytest.raises(ValueError, match="int32"):
        jax.tree.map(lambda a: a.astype(jnp.float32), x).validate()
    with pytest.raises(ValueError, match="three axes"):
        jax.tree.map(lambda a: a[0], x).validate()


def test_validate_under_jit_says_so():
    """Catches a check that silently does nothing."""
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda x: x.validate())(make(*GOOD))


# --- Pytree ----------------------------------------------------------------------------------------


def test_it_is_a_pytree():
    """Catches a leaf too many, a static shape that is lost, and paths without names."""
    x = make(*GOOD)
    paths, structure = jax.tree_util.tree_flatten_with_path(x)
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".keys", ".values"]
    assert jax.tree.unflatten(structure, [leaf for _, leaf in paths]).spatial_shape == (2, 3)
    assert structure == jax.tree.structure(make(*GOOD))
    assert structure != jax.tree.structure(make(*GOOD, grid=(3, 2)))
    hash(structure)


@pytest.mark.parametrize("leaf", [None, 0, "x", object()])
def test_unflattening_never_validates(leaf):
    """Catches a check that breaks transformations, which put anything into a pytree."""
    x = jax.tree.unflatten(jax.tree.structure(make(*GOOD)), [leaf, leaf])
    assert x.keys is leaf
    repr(x)


def test_through_jit_vmap_scan_and_eval_shape():
    """Catches a data type that a transformation cannot carry."""
    x = make(*GOOD)
    same = jax.jit(lambda x: x)(x)
    assert same.spatial_shape == (2, 3)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), x)
    counts = jax.vmap(lambda x: x.counts)(stacked)
    np.testing.assert_array_equal(counts, [[[2, 3]], [[2, 3]]])
    last, _ = jax.lax.scan(lambda c, _: (c.map(lambda v: v + 1), None), x, length=3)
    np.testing.assert_array_equal(last.values, [[[4, 5, 0], [6, 7, 8]]])
    assert jax.eval_shape(lambda x: x, x).shape == x.shape


def test_gradients():
    """Catches a data type that cannot be differentiated as documented."""
    x = make(*GOOD)
    gradient = jax.grad(lambda v: (x.with_values(v).values ** 2).sum())(x.values)
    np.testing.assert_array_equal(gradient, 2 * x.values)
    whole = jax.grad(lambda x: (x.values**2).sum(), allow_int=True)(x)
    np.testing.assert_array_equal(whole.values, 2 * x.values)
    assert whole.keys.dtype == jax.dtypes.float0


def test_it_is_frozen():
    """Catches a tensor that changes under its user."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(*GOOD).keys = None


def test_repr_is_short():
    """Catches arrays in a repr, and one that fails on tracers."""
    x = samples.tensor(5, 8, 64, (20, 20), capacity=100, shared=True)
    text = repr(x)
    assert len(text) < 200
    assert "\n" not in text
    for part in ("SparseTensor", "float32", "8, 20, 20, 64", "100", "shared"):
        assert part in text
    traced = []
    jax.jit(lambda x: traced.append(repr(x)))(x)
    assert len(traced[0]) < 200


# --- BCOO ------------------------------------------------------------------------------------------


def bcoo_round_trip(x):
    m = x.to_bcoo()
    return m, m.todense(), ilajax.SparseTensor.from_bcoo(m)


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("grid", [(7,), (2, 3, 4), (2, 2, 2, 3)])
def test_bcoo_round_trip(grid, shared, dtype):
    """Catches another layout than (B, C, *S), entries lost on the way, and padding that counts."""
    x = samples.tensor(6, 2, 3, grid, capacity=6, shared=shared, dtype=dtype)
    m, todense, back = jax.jit(bcoo_round_trip)(x)
    assert (m.shape, m.n_batch, m.n_dense) == ((2, 3, *grid), 2, 0)
    assert m.dtype == x.dtype
    np.testing.assert_array_equal(
        np.asarray(todense, np.float32), np.moveaxis(oracles.dense(x), -1, 1)
    )
    oracles.assert_tensor(back, np.asarray(x.unshare().keys), np.asarray(x.values))
    assert back.dtype == x.dtype


def test_from_a_foreign_bcoo():
    """Catches indices taken as sorted, unique or inside the grid where BCOO does not promise it."""
    dense = np.zeros((2, 2, 3, 4), np.float32)
    dense[0, 0, 1, 2], dense[0, 1, 2, 3], dense[1, 0, 0, 0] = 1, -2, 3
    x = jax.jit(
        lambda d: ilajax.SparseTensor.from_bcoo(sparse.BCOO.fromdense(d, nse=2, n_batch=2))
    )(dense)
    oracles.assert_invariants(x)
    np.testing.assert_array_equal(oracles.dense(x), np.moveaxis(dense, 1, -1))
    indices = jnp.array([[[[4], [1], [4], [9], [5]]]], jnp.int32)
    data = jnp.array([[[1.0, 2.0, 3.0, 4.0, 0.0]]])
    x = jax.jit(ilajax.SparseTensor.from_bcoo)(sparse.BCOO((data, indices), shape=(1, 1, 6)))
    oracles.assert_invariants(x)
    np.testing.assert_array_equal(oracles.dense(x)[0, :, 0], [0, 2, 0, 0, 4, 0])


@pytest.mark.parametrize(
    ("batch", "sparse_axes", "dense", "message"),
    [
        ((), 3, (), r"matrix.*n_batch=2.*n_batch=0"),
        ((2, 2), 1, (3,), r"matrix.*n_dense=1"),
        ((2, 2), 0, (), r"matrix.*shape \(2, 2\)"),
    ],
)
def test_from_bcoo_rejects_other_layouts(batch, sparse_axes, dense, message):
    """Catches a matrix read with its axes mixed up."""
    data, indices = jnp.ones((*batch, 1, *dense)), jnp.zeros((*batch, 1, sparse_axes), jnp.int32)
    matrix = sparse.BCOO((data, indices), shape=(*batch, *(2,) * sparse_axes, *dense))
    with pytest.raises(ValueError, match=message):
        ilajax.SparseTensor.from_bcoo(matrix)


def test_from_bcoo_rejects_other_types():
    """Catches a dense array taken for a matrix."""
    with pytest.raises(TypeError, match=r"matrix.*BCOO"):
        ilajax.SparseTensor.from_bcoo(jnp.ones((2, 2, 3)))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_invariants_of_samples(seed, density, shared):
    """Catches a generator of test data, or a validate, that is wrong itself."""
    oracles.assert_invariants(samples.tensor(seed, density=density, shared=shared))
