"""k_select against a sort in NumPy: what is kept, in which order, and where the gradient goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
import samples

SELECTS = ("value", "positive", "magnitude")
NAN, INF = np.nan, np.inf


@functools.cache
def program(backend, capacity, select):
    """jit of k_select and its gradient."""

    @jax.jit
    def run(x, g):
        def values(values):
            selected = ilajax.k_select(x.with_values(values), capacity, select=select)
            return selected.values, selected

        _, pull, selected = jax.vjp(values, x.values, has_aux=True)
        return selected, pull(g)[0]

    return run


def check(backend, x, capacity, select):
    """Compares with NumPy, exactly."""
    g = samples.integers(0, (x.batch_size, x.channels, capacity), str(x.dtype))
    selected, gradient = program(backend, capacity, select)(x, g)
    keys, values = oracles.k_select(x, capacity, select)
    oracles.assert_tensor(selected, keys, values)
    assert selected.dtype == x.dtype
    assert selected.spatial_shape == x.spatial_shape
    assert (gradient.shape, gradient.dtype) == (x.values.shape, x.values.dtype)
    oracles.assert_close(gradient, oracles.k_select_backward(x, keys, g))
    return selected


@pytest.mark.crossed(3)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("capacity", [1, 4, 12, 40])
@pytest.mark.parametrize("select", SELECTS)
def test_loops(backend, select, capacity, shared):
    """Catches a wrong set, order, padding or gradient, with ties, at any capacity."""
    x = samples.tensor(capacity, shared=shared, zeros=True)
    selected = check(backend, x, capacity, select)
    if shared and capacity >= 12 and select != "positive":
        assert selected.shared, "nothing can be cut, so the support need not be unshared"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("select", SELECTS)
def test_half_precision(backend, select, dtype):
    """Catches a rank that misreads a 16-bit format: signs, subnormals, infinities."""
    # The smallest float16; a bfloat16 as small as that is a float32 that XLA's threads flush to 0.
    tiny = {"float16": 2.0**-24, "bfloat16": 2.0**-126}[dtype]
    values = [-1.5, tiny, -tiny, 2.5, INF, -INF, 0.0, 2.5, -65504.0, 1e-3, -2.5, 0.25]
    x = samples.from_entries(
        (12,), [[dict(enumerate(values)), dict(enumerate(reversed(values)))]], 12, dtype
    )
    check(backend, x, 7, select)


GRID = (5, 6)
CONTENTS = {
    "empty": {},
    "one": {13: -2.0},
    "full": {k: float((7 * k) % 11 - 5) for k in range(30)},
    "ties": dict.fromkeys(range(2, 30, 3), 1.0),
    "negative": {k: -1.0 - k for k in range(0, 30, 2)},
    "zeros": dict.fromkeys(range(10), 0.0),
    "signed-zeros": {k: -0.0 if k % 2 else 0.0 for k in range(10)},
    "opposites": {k: (-1.0) ** k for k in range(10)},
    "infinite": {0: INF, 1: -INF, 2: 1.0, 3: INF, 4: -2.0, 5: -INF, 6: 3.0},
    "tiny": {k: (k - 5) * 1e-36 for k in range(10)},
    "close": {k: 1.0 + (k * 7 % 5) * 2.0**-23 for k in range(20)},
}


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("contents", CONTENTS)
def test_contents(backend, contents, select):
    """Catches mistakes at the extremes; 0 and -0 are equal ranks, so the lower key wins."""
    first = CONTENTS[contents]
    second = {29 - k: v for k, v in first.items()}
    check(backend, samples.from_entries(GRID, [[first, second], [second, first]], 30), 5, select)


@pytest.mark.nans
@pytest.mark.parametrize("select", SELECTS)
def test_nan_ranks_first(backend, select):
    """Catches a diverging network that hides its NaN, of either sign and with any payload."""
    x = samples.from_entries(GRID, [[{k: 9.0 - k for k in range(12)}] * 2] * 2, 30)
    bits = np.array([0xFFC00000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    values = np.array(x.values)
    values[0, 0, [11, 3, 7, 5]] = bits
    values[0, 1, :12] = NAN
    x = x.with_values(jnp.asarray(values))
    selected = check(backend, x, 5, select)
    assert {3, 5, 7, 11} <= set(np.asarray(selected.keys[0, 0]).tolist())
    np.testing.assert_array_equal(selected.keys[0, 1], range(5))


@pytest.mark.parametrize("select", SELECTS)
def test_padding_changes_nothing(backend, select):
    """Catches empty slots that count as candidates, and capacity that is bound to the input's."""
    x = samples.tensor(1, zeros=True)
    g = samples.integers(1, (2, 2, 5))
    want, gradient = program(backend, 5, select)(x, g)
    got, wide = program(backend, 5, select)(samples.with_padding(x, 9), g)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(wide[..., : x.capacity], gradient)
    np.testing.assert_array_equal(wide[..., x.capacity :], 0)


@pytest.mark.nans
def test_cotangents_at_padding_are_ignored(backend):
    """Catches a cotangent that leaks out of an empty slot."""
    x = samples.tensor(2, density=0.1)
    selected, gradient = program(backend, 12, "value")(x, jnp.ones((2, 2, 12)))
    dirty = jnp.where(selected.keys == selected.sites, jnp.nan, 1.0)
    _, got = program(backend, 12, "value")(x, dirty)
    np.testing.assert_array_equal(got, gradient)
    np.testing.assert_array_equal(got, np.where(np.asarray(x.keys) < x.sites, 1, 0))


def test_twice_is_once(backend):
    """Catches a selection that is not idempotent, and one that a wider selection before it changes."""

    @jax.jit
    def run(x):
        once = ilajax.k_select(x, 4, select="magnitude")
        again = ilajax.k_select(once, 4, select="magnitude")
        wider = ilajax.k_select(ilajax.k_select(x, 8, select="magnitude"), 4, select="magnitude")
        return once, again, wider

    once, again, wider = run(samples.tensor(3))
    jax.tree.map(np.testing.assert_array_equal, again, once)
    jax.tree.map(np.testing.assert_array_equal, wider, once)


@pytest.mark.parametrize("select", SELECTS)
def test_any_data(backend, select):
    """Catches output that breaks the contract or differs from NumPy's on some data."""

    @settings(max_examples=25)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
    def holds(seed, density, exact):
        check(backend, samples.tensor(seed, density=density, exact=exact, zeros=True), 6, select)

    holds()


@pytest.mark.crossed(4)
@pytest.mark.parametrize("capacity", [1, 777, 4000])
@pytest.mark.parametrize("select", SELECTS)
def test_long_segments(backend, select, capacity):
    """Catches what only long segments show: a threshold among many ties, chunks, a histogram's edges."""
    x = samples.tensor(4, 2, 3, (80, 90), capacity=5000, density=0.6)
    check(backend, x, capacity, select)
    real = samples.tensor(5, 2, 3, (80, 90), capacity=5000, density=0.6, exact=False)
    check(backend, real, capacity, select)


# --- By site ---------------------------------------------------------------------------------------


@functools.cache
def by_site(backend, capacity, select):
    """jit of k_select by site and its gradient."""

    @jax.jit
    def run(x, g):
        def values(values):
            selected = ilajax.k_select(
                x.with_values(values), capacity, select=select, select_by="site"
            )
            return selected.values, selected

        _, pull, selected = jax.vjp(values, x.values, has_aux=True)
        return selected, pull(g)[0]

    return run


def check_by_site(backend, x, capacity, select):
    """Compares with NumPy, exactly."""
    g = samples.integers(0, (x.batch_size, x.channels, capacity), str(x.dtype))
    selected, gradient = by_site(backend, capacity, select)(x, g)
    dense = np.moveaxis(oracles.dense(x), -1, 1).reshape(x.batch_size, x.channels, -1)
    p = oracles.passed(dense, select)
    kept = [oracles.select_sites(range(x.sites), each, capacity)[0] for each in p]
    keys, values = oracles.pack(kept, capacity, x.sites, x.dtype)
    oracles.assert_tensor(selected, keys, values)
    assert selected.shared
    assert selected.dtype == x.dtype
    g = np.where(values == 0, 0, g) if select == "positive" else g
    oracles.assert_close(gradient, oracles.k_select_backward(x, keys, g))
    return selected


@pytest.mark.crossed(3)
@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared"])
@pytest.mark.parametrize("capacity", [1, 4, 40])
@pytest.mark.parametrize("select", ["positive", "magnitude"])
def test_by_site(backend, select, capacity, shared):
    """Catches a wrong set of sites, order, padding or gradient, with ties, at any capacity."""
    for seed, dtype in enumerate(samples.DTYPES):
        x = samples.tensor(seed, channels=3, shared=shared, zeros=True, dtype=dtype)
        check_by_site(backend, x, capacity, select)


@pytest.mark.nans
@pytest.mark.parametrize("select", ["positive", "magnitude"])
@pytest.mark.parametrize("contents", CONTENTS)
def test_contents_by_site(backend, contents, select):
    """Catches mistakes at the extremes; NaN in one channel is enough."""
    first = CONTENTS[contents]
    second = {29 - k: v for k, v in first.items()}
    x = samples.from_entries(GRID, [[first, second], [second, first | {7: NAN}]], 30)
    selected = check_by_site(backend, x, 5, select)
    assert 7 in np.asarray(selected.keys[1, 0]).tolist()


def test_sites_of_one_channel_are_its_entries(backend):
    """Catches a selection by site that means something else where both can be said."""
    x = samples.tensor(3, channels=1, exact=False)
    for select in ("positive", "magnitude"):
        want = ilajax.k_select(x, 5, select=select)
        got = ilajax.k_select(x, 5, select=select, select_by="site")
        jax.tree.map(np.testing.assert_array_equal, got, want)
