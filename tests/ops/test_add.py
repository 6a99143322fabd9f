"""Addition over the union of supports, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ilajax
import oracles
import samples

KINDS = [(False, False), (True, False), (False, True), (True, True)]


def union(a, b, sign=1):
    """{key: sum} for each (batch, channel), one stored entry at a time."""
    table = []
    for samples_of_both in zip(oracles.segments(a), oracles.segments(b), strict=True):
        table.append([])
        for one, other in zip(*samples_of_both, strict=True):
            sums = {}
            for factor, entries in ((1, one), (sign, other)):
                for _, key, value in entries:
                    sums[key] = sums.get(key, 0.0) + factor * value
            table[-1].append(sums)
    return table


def packed(table, capacity, sites, dtype):
    kept = [[sorted(sums.items()) for sums in sample] for sample in table]
    return oracles.pack(kept, capacity, sites, dtype)


@pytest.mark.crossed(3)
@pytest.mark.parametrize(("shared", "other"), KINDS)
@pytest.mark.parametrize("grid", [(40,), (5, 6)])
def test_add(backend, grid, shared, other):
    """Catches a site that is lost, doubled or summed wrongly, and zero sums that do not stay stored."""
    a = samples.tensor(0, 2, 3, grid, capacity=9, shared=shared, zeros=True)
    b = samples.tensor(1, 2, 3, grid, capacity=14, shared=other, zeros=True)
    total = jax.jit(ilajax.add)(a, b)
    assert total.shared == (shared and other)
    table = union(a, b)
    if total.shared:  # a site is stored for all channels where one has it: all have the same
        assert all(sums.keys() == sample[0].keys() for sample in table for sums in sample)
    oracles.assert_tensor(total, *packed(table, 23, a.sites, np.float32))
    np.testing.assert_array_equal(oracles.dense(total), oracles.dense(a) + oracles.dense(b))


@pytest.mark.parametrize(("shared", "other"), KINDS)
def test_gradients_of_add(shared, other):
    """Catches a cotangent that goes to another entry, one that padding receives, and a zero sum without."""
    a = samples.tensor(2, 2, 3, capacity=9, shared=shared)
    b = samples.tensor(3, 2, 3, capacity=14, shared=other)
    g = samples.integers(2, (2, 3, 23))

    @jax.jit
    def gradients(u, v, g):
        _, pull = jax.vjp(lambda u, v: (a.with_values(u) + b.with_values(v)).values, u, v)
        return pull(g)

    total = a + b
    sent = [
        [dict(zip(ks.tolist(), gs.tolist(), strict=True)) for ks, gs in zip(*both, strict=True)]
        for both in zip(np.asarray(total.unshare().keys), np.asarray(g), strict=True)
    ]
    for x, gradient in zip((a, b), gradients(a.values, b.values, g), strict=True):
        want = np.zeros(x.values.shape)
        for i, sample in enumerate(oracles.segments(x)):
            for c, entries in enumerate(sample):
                for slot, key, _ in entries:
                    want[i, c, slot] = sent[i][c][key]
        np.testing.assert_array_equal(gradient, want)


@pytest.mark.parametrize("shared", [False, True])
def test_add_keeps_one_keys_array(shared):
    """Catches a residual connection whose sum has other keys, or twice the slots."""
    x = samples.tensor(4, shared=shared)
    total = x + x.map(jnp.square)
    assert total.keys is x.keys
    np.testing.assert_array_equal(total.values, x.values + x.values**2)
    dirty = x.with_values(jnp.where(x.keys < x.sites, x.values, 7))
    oracles.assert_invariants(dirty + dirty, capacity=x.capacity)
    gradient = jax.grad(lambda v: (x + x.with_values(v)).values.sum())(x.values)
    np.testing.assert_array_equal(gradient, np.broadcast_to(x.keys < x.sites, gradient.shape))


def test_padding_is_no_operand():
    """Catches what stands in padding, in the values or in keys past the grid, when it reaches a sum."""
    a, b = samples.tensor(5, shared=True), samples.tensor(6, shared=True)
    dirty = a.with_values(jnp.where(a.keys < a.sites, a.values, 7))
    jax.tree.map(np.testing.assert_array_equal, dirty + b, a + b)
    past = ilajax.SparseTensor(
        jnp.where(a.keys < a.sites, a.keys, -5), dirty.values, a.spatial_shape
    )
    jax.tree.map(np.testing.assert_array_equal, past + b, a + b)


def test_full_and_empty_tensors():
    """Catches a union that needs more slots than the grid has sites, and one with nothing in it."""
    full = ilajax.from_dense(jnp.arange(1.0, 7).reshape(1, 6, 1), 6)
    empty = samples.from_entries((6,), [[{}]], 4)
    for a, b in ((full, full.map(jnp.negative)), (full, empty), (empty, full), (empty, empty)):
        b = ilajax.SparseTensor(b.keys + 0, b.values, b.spatial_shape)
        total = a + b
        oracles.assert_tensor(
            total, *packed(union(a, b), min(a.capacity + b.capacity, 6), 6, np.float32)
        )


@pytest.mark.parametrize("select", ["value", "positive", "magnitude"])
@pytest.mark.parametrize("shared", [False, True])
def test_add_with_a_capacity(backend, shared, select):
    """Catches a cut other than a k-selection of the sum, and a shared support that a cut must not keep."""
    a, b = samples.tensor(7, shared=shared), samples.tensor(8, shared=shared)
    run = jax.jit(functools.partial(ilajax.add, capacity=5, select=select))
    total = run(a, b)
    assert not total.shared
    keys, values = oracles.k_select(a + b, 5, select)
    oracles.assert_tensor(total, keys, values)


def test_add_ranks_by_magnitude_and_pads():
    """Catches another default of `select`, and a large capacity that cuts or unshares."""
    a, b = samples.tensor(9, shared=True), samples.tensor(10, shared=True)
    jax.tree.map(
        np.testing.assert_array_equal,
        ilajax.add(a, b, capacity=5),
        ilajax.add(a, b, capacity=5, select="magnitude"),
    )
    wide = ilajax.add(a, b, capacity=40)
    assert wide.shared
    oracles.assert_invariants(wide, capacity=40)
    np.testing.assert_array_equal(oracles.dense(wide), oracles.dense(a + b))


@pytest.mark.parametrize("one", samples.DTYPES)
@pytest.mark.parametrize("two", samples.DTYPES)
def test_dtypes_promote_as_in_jax(one, two):
    """Catches a dtype other than that of the sum of the arrays."""
    a, b = samples.tensor(11, dtype=one), samples.tensor(12, dtype=two)
    total = a + b
    assert total.dtype == jnp.promote_types(a.dtype, b.dtype)
    np.testing.assert_array_equal(oracles.dense(total), oracles.dense(a) + oracles.dense(b))


@pytest.mark.nans
def test_nan_and_inf_are_stored_values():
    """Catches NaN that spreads to sites of the other tensor, or is lost."""
    a = samples.from_entries((4,), [[{0: np.nan, 1: np.inf}]], 2)
    b = samples.from_entries((4,), [[{1: -np.inf, 3: 2}]], 3)
    np.testing.assert_array_equal((a + b).values, [[[np.nan, np.nan, 2, 0]]])


def test_add_under_vmap_and_scan():
    """Catches a union that does not map, or whose carry changes."""
    a, b = samples.tensor(13, shared=True), samples.tensor(14, shared=True)
    twice = lambda x: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), x)  # noqa: E731
    mapped = jax.vmap(ilajax.add)(twice(a), twice(b))
    for i, flip in enumerate((1, -1)):
        want = jax.tree.map(lambda leaf: leaf[::flip], a + b)  # noqa: B023
        jax.tree.map(lambda got, leaf: np.testing.assert_array_equal(got[i], leaf), mapped, want)  # noqa: B023
    start = ilajax.add(a, b, capacity=30)
    end, _ = jax.lax.scan(lambda x, _: (ilajax.add(x, a, capacity=30), None), start, length=2)
    np.testing.assert_array_equal(oracles.dense(end), 3 * oracles.dense(a) + oracles.dense(b))


# --- same_support ----------------------------------------------------------------------------------

KERNEL = samples.kernel(0, (3, 3), 2, 2)


class Block(nnx.Module):
    """A submanifold layer and its activation; behind a transformation of its own, if one is given."""

    def __call__(self, x):
        return ilajax.conv(x, KERNEL, support="input").features.map(jax.nn.relu)


TRANSFORMS = {
    "jit": nnx.jit(lambda block, x: block(x)),
    "remat": nnx.remat(lambda block, x: block(x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_residual_connection_behind_a_transformation(transform):
    """Catches a shared support that a residual net loses, or whose slots double, behind nnx.jit or remat."""
    x, block, layer = samples.tensor(15, shared=True), Block(), TRANSFORMS[transform]
    want = block(x + block(x))

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, same_support):
        y = layer(block, x)
        assert y.keys is not x.keys
        return block(ilajax.add(x, y, same_support=same_support))

    for same_support, capacity in ((True, x.capacity), (False, 2 * x.capacity)):
        got = run(x, same_support)
        assert got.shared
        assert got.capacity == capacity
        np.testing.assert_array_equal(oracles.dense(got), oracles.dense(want))
    np.testing.assert_array_equal(run(x, True).keys, x.keys)


@pytest.mark.parametrize("shared", [False, True])
def test_same_support_is_checked_where_it_can_be(shared):
    """Catches a false word that adds values of different sites, and a true one that is refused."""
    x = samples.tensor(16, shared=shared)
    copy = ilajax.SparseTensor(x.keys + 0, x.values, x.spatial_shape)
    assert ilajax.add(x, copy, same_support=True).keys is x.keys
    other = ilajax.SparseTensor(x.keys.at[1, -1, 0].set(30), x.values, x.spatial_shape)
    with pytest.raises(ValueError, match=rf"same_support.*a and b.*batch 1, channel {1 - shared}"):
        ilajax.add(x, other, same_support=True)
    with pytest.raises(ValueError, match=r"same_support.*a and b.*shape.*12.*17"):
        ilajax.add(x, samples.with_padding(x, 5), same_support=True)


X = samples.tensor(17)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, 1), TypeError, "b must be an ilajax.SparseTensor.*int"),
        ((X, samples.tensor(0, batch=3)), ValueError, "a and b.*batch_size.*2 and 3"),
        ((X, samples.tensor(0, channels=1)), ValueError, "a and b.*channels.*2 and 1"),
        ((X, samples.tensor(0, spatial_shape=(6, 5))), ValueError, r"spatial_shape.*\(5, 6\)"),
    ],
)
def test_bad_operands(arguments, error, message):
    """Catches tensors that do not fit together and are added nevertheless."""
    with pytest.raises(error, match=message):
        ilajax.add(*arguments)


def test_bad_options():
    """Catches options that are ignored where they do not apply yet."""
    with pytest.raises(ValueError, match=r"select.*abs"):
        ilajax.add(X, X, select="abs")
    with pytest.raises(ValueError, match=r"capacity.*0"):
        ilajax.add(X, X, capacity=0)
