"""conv: the forward pass against algorithm 1, the backward pass against algorithm 2, exactly."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples

SELECTS = ("value", "positive", "magnitude")

# grid, window, strides, padding, dilation
GEOMETRIES = {
    "1d": ((9,), (3,), 1, "SAME", 1),
    "1d-even": ((9,), (4,), 2, "SAME", 1),
    "1d-dilated": ((11,), (3,), 1, "VALID", 3),
    "1d-window-above-grid": ((3,), (7,), 1, ((3, 3),), 1),
    "2d": ((5, 6), (3, 3), 1, "SAME", 1),
    "2d-1x1": ((5, 6), (1, 1), 1, "SAME", 1),
    "2d-1x1-strided": ((5, 6), (1, 1), (2, 3), "VALID", 1),
    "2d-even": ((5, 6), (2, 2), 1, "SAME", 1),
    "2d-row": ((5, 6), (1, 4), 1, "SAME", 1),
    "2d-column": ((5, 6), (4, 1), 1, "SAME", 1),
    "2d-strided": ((7, 6), (3, 3), 2, "SAME", 1),
    "2d-stride-above-window": ((7, 7), (2, 2), 3, "SAME", 1),
    "2d-dilated": ((7, 8), (3, 2), 1, "SAME", (2, 3)),
    "2d-strided-dilated": ((8, 7), (2, 3), (2, 1), "SAME", (3, 2)),
    "2d-valid": ((5, 6), (3, 2), 1, "VALID", 1),
    "2d-full": ((4, 4), (3, 3), 1, ((2, 2), (2, 2)), 1),
    "2d-asymmetric": ((5, 6), (3, 3), 1, ((0, 2), (1, 0)), 1),
    "2d-negative-padding": ((6, 6), (3, 3), 1, ((-1, 0), (0, -2)), 1),
    "2d-one-output": ((4, 5), (4, 5), 1, "VALID", 1),
    "2d-5x5": ((6, 6), (5, 5), 1, "SAME", 1),
    "3d": ((4, 3, 5), (3, 3, 3), 1, "SAME", 1),
    "3d-strided": ((5, 4, 5), (2, 2, 2), 2, "VALID", 1),
    "3d-asymmetric": ((3, 4, 3), (2, 3, 1), (1, 2, 1), ((1, 0), (0, 2), (1, 1)), (2, 1, 1)),
    "4d": ((2, 3, 2, 3), (2, 2, 2, 2), 1, "SAME", 1),
    "4d-strided": ((3, 2, 3, 2), (3, 1, 2, 1), (2, 1, 1, 2), "SAME", 1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One draw of all the options that do not belong to the geometry."""

    seed: int
    batch: int
    in_channels: int
    out_channels: int
    kernel_density: float
    empty: bool
    select: str
    capacity: str
    dtype: str
    shared: bool


def draw(seed):
    rng = np.random.default_rng(seed)
    return Case(
        seed=seed,
        batch=int(rng.integers(1, 4)),
        in_channels=int(rng.integers(1, 4)),
        out_channels=int(rng.integers(1, 5)),
        kernel_density=float(rng.choice([1.0, 0.6, 0.2])),
        empty=bool(rng.random() < 0.25),
        select=str(rng.choice(SELECTS)),
        capacity=str(rng.choice(["one", "small", "exact", "sites", "above"])),
        dtype=str(rng.choice(list(samples.DTYPES))),
        shared=bool(rng.random() < 0.3),
    )


@functools.cache
def program(backend, capacity, select, geometry=("SAME", 1, 1)):
    """jit of conv and its gradients: (x, kernel, bias, g) -> keys, values, responses, gradients."""
    padding, strides, dilation = geometry

    @jax.jit
    def run(x, kernel, bias, g):
        def values(values, weights, bias):
            features, responses = ilajax.conv(
                x.with_values(values),
                dataclasses.replace(kernel, values=weights),
                bias,
                capacity=capacity,
                strides=strides,
                padding=padding,
                kernel_dilation=dilation,
                select=select,
            )
            return features.values, (features, responses)

        _, pull, (features, responses) = jax.vjp(
            values, x.values, kernel.values, bias, has_aux=True
        )
        return features, responses, pull(g)

    return run


def cotangent(seed, batch, channels, capacity, dtype="float32"):
    """Integers in every slot, those of padding too, which must be ignored."""
    return samples.integers(seed, (batch, channels, capacity), dtype)


def check(run, x, kernel, bias, geometry, capacity, select, seed=0):
    """Compares conv and its gradients with algorithms 1 and 2, exactly."""
    g = cotangent(seed, x.batch_size, kernel.out_channels, capacity, str(x.dtype))
    features, responses, gradients = run(x, kernel, bias, g)
    keys, values, counts = oracles.conv(x, kernel, bias, geometry, capacity, select)
    oracles.assert_tensor(features, keys, values)
    assert features.dtype == x.dtype
    assert features.shape == (x.batch_size, *geometry.shape, kernel.out_channels)
    assert responses.dtype == jnp.int32
    np.testing.assert_array_equal(responses, counts)
    x_bar, w_bar, b_bar = oracles.conv_backward(x, kernel, geometry, keys, g)
    for got, want, primal in zip(
        gradients, (x_bar, w_bar, b_bar), (x.values, kernel.values, bias), strict=True
    ):
        assert got.dtype == primal.dtype
        oracles.assert_close(got, want.astype(np.float32).astype(got.dtype))
    return features


def cross(backend, name, case):
    """Compares one draw of the options on one geometry with algorithms 1 and 2."""
    grid, window, strides, padding, dilation = GEOMETRIES[name]
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    x = samples.tensor(
        case.seed,
        case.batch,
        case.in_channels,
        grid,
        capacity=max(2, math.prod(grid) // 2),
        dtype=case.dtype,
        shared=case.shared,
        zeros=True,
    )
    kernel = samples.kernel(
        case.seed,
        window,
        case.in_channels,
        case.out_channels,
        density=case.kernel_density,
        empty=case.empty,
        dtype=case.dtype,
        zeros=True,
    )
    bias = samples.integers(case.seed, (case.out_channels,), case.dtype)
    *_, counts = oracles.conv(x, kernel, bias, geometry, 1, case.select)
    most = max(1, int(counts.max()))
    capacity = {
        "one": 1,
        "small": max(1, most // 2),
        "exact": most,
        "sites": geometry.sites,
        "above": geometry.sites + 3,
    }[case.capacity]
    run = program(backend, capacity, case.select, (padding, strides, dilation))
    check(run, x, kernel, bias, geometry, capacity, case.select, case.seed)


@pytest.mark.crossed(7)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_algorithms_1_and_2(backend, name, number):
    """Catches a wrong key, value, count or gradient in any crossing of the options; data is exact."""
    cross(backend, name, draw(100 * number + list(GEOMETRIES).index(name)))


STRIDE_1 = [name for name, (_, _, strides, _, _) in GEOMETRIES.items() if strides == 1]


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        (name, fill)
        for i, name in enumerate(STRIDE_1)
        for fill in ("dense-lines", ("rows", "entries")[i % 2])
    ],
)
def test_forms_of_a_line(name, fill):
    """The CPU kernel lays lines out in three ways, by how full they are and how sparse the filters are."""
    grid, window, strides, padding, dilation = GEOMETRIES[name]
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    sites = math.prod(grid)
    density, kernel_density = {
        "dense-lines": (0.9, 0.1),
        "rows": (0.3, 1.0),
        "entries": (0.1, 1.0),
    }[fill]
    # 19 -> 21 channels: a block of 24, and vectors that are not full; rows have one support.
    x = samples.tensor(3, 2, 19, grid, capacity=sites, density=density, shared=fill == "rows")
    if fill == "rows":
        keys = jnp.broadcast_to(x.keys, x.values.shape)
        x = ilajax.SparseTensor(keys, x.values, grid)
    kernel = samples.kernel(3, window, 19, 21, density=kernel_density)
    bias = samples.integers(3, (21,))
    run = program("auto", geometry.sites, "value", (padding, strides, dilation))
    check(run, x, kernel, bias, geometry, geometry.sites, "value")


@pytest.mark.nans
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_forms_of_a_line_where_a_value_is_not_finite(bad):
    """A zero factor adds nothing, whatever it meets, in each form and its gradient."""
    grid = (9, 20)
    x = samples.tensor(4, 2, 5, grid, capacity=180, density=0.9, zeros=True)
    x = x.with_values(x.values.at[0, 2, 70].set(bad))
    kernel = samples.kernel(4, (3, 3), 5, 6, density=0.2, zeros=True)
    bias = samples.integers(4, (6,))
    run = program("auto", 180, "value")
    g = cotangent(4, 2, 6, 180).at[1, 3, 50].set(bad)
    features, responses, gradients = run(x, kernel, bias, g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILAJAX_BACKEND", "reference")
        want = program("reference", 180, "value")(x, kernel, bias, g)
    oracles.assert_tensor(features, want[0].keys, want[0].values)
    np.testing.assert_array_equal(responses, want[1])
    for got, wanted in zip(gradients, want[2], strict=True):
        np.testing.assert_array_equal(got, wanted)


LARGE = {
    # Several slabs, more than one word of a bitmap, a border inside a word.
    "slabs": ((300, 701), (3, 3), 1, "SAME", 1, 2, 5, 300),
    "slabs-3d": ((70, 33, 50), (3, 3, 3), 1, "SAME", 2, 1, 4, 50),
    "slabs-strided": ((400, 900), (3, 2), (2, 3), "VALID", 1, 1, 6, 90),
    "one-long-row": ((200_000,), (5,), 1, "SAME", 3, 1, 4, 500),
    # Several blocks of channels.
    "wide": ((9, 11), (1, 1), 1, "SAME", 1, 20, 37, 30),
    "wide-window": ((20, 21), (3, 3), 1, "SAME", 1, 3, 18, 100),
    # Selections that are refined many times over, and that cut next to nothing.
    "many-candidates": ((90, 100), (3, 3), 1, "SAME", 1, 1, 2, 40),
    "large-capacity": ((150, 160), (3, 3), 1, "SAME", 1, 1, 1, 19_000),
}


@pytest.mark.crossed(7)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("name", LARGE)
def test_larger_problems(backend, name, select):
    """Catches what only size shows: the borders of slabs, blocks and words, and long selections."""
    grid, window, strides, padding, dilation, cin, cout, capacity = LARGE[name]
    sites = math.prod(grid)
    slots = 4000 if name == "large-capacity" else 600 // cin
    x = samples.tensor(13, 2, cin, grid, capacity=slots, density=min(0.5, slots / sites))
    kernel = samples.kernel(13, window, cin, cout, density=0.3 if cout > 9 else 0.6)
    geometry = oracles.Geometry(grid, window, strides, padding, dilation)
    run = program(backend, capacity, select, (padding, strides, dilation))
    check(run, x, kernel, samples.integers(13, (cout,)), geometry, capacity, select)


# --- One shape, many contents: a single compilation for each mode ----------------------------------

GRID = (5, 6)
GEOMETRY = oracles.Geometry(GRID, (3, 3))


def entries(*segments):
    """[2][2] segments of {key: value} with 30 slots."""
    return samples.from_entries(GRID, [segments[:2], segments[2:]], 30)


def full(value=None):
    segment = {k: value if value is not None else (-1) ** k * (k % 5 + 1) for k in range(30)}
    return entries(segment, segment, segment, segment)


def weights(live):
    """A kernel [3, 3, 2, 3] of 54 slots from {key: value}."""
    keys, values = np.full(54, 54, np.int32), np.zeros(54, np.float32)
    for slot, key in enumerate(sorted(live)):
        keys[slot], values[slot] = key, live[key]
    return ilajax.SparseKernel(jnp.asarray(keys), jnp.asarray(values), (3, 3, 2, 3))


ALL = {key: (-1) ** key * (key % 3 + 1) for key in range(54)}
CENTRE = {taps + 4: 1 for taps in range(0, 54, 9)}  # the identity from both inputs to all outputs
SOME = entries({0: 2, 7: -1, 29: 3}, {}, {14: 1}, {14: -1, 15: 4})

CONTENTS = {
    "empty-input": (entries({}, {}, {}, {}), weights(ALL)),
    "one-entry": (entries({}, {17: 2}, {}, {}), weights(ALL)),
    "one-entry-in-each-corner": (entries({0: 1}, {5: 1}, {24: 1}, {29: 1}), weights(ALL)),
    "full-grid": (full(), weights(ALL)),
    "empty-kernel": (SOME, weights({})),
    "one-weight": (SOME, weights({31: 2})),
    "only-the-last-channel": (SOME, weights(dict.fromkeys(range(36, 54), 1))),
    "one-input-channel": (SOME, weights({k: 1 for k in ALL if k % 18 < 9})),
    "stored-zeros": (entries({3: 0, 4: 0}, {3: 1}, {0: 0}, {}), weights(ALL)),
    "live-zeros": (SOME, weights({k: 0 if k % 2 else 1 for k in ALL})),
    "ties": (full(1), weights(ALL)),
    "all-tied": (entries({9: 1}, {}, {20: 1}, {}), weights(dict.fromkeys(ALL, 1))),
    "magnitude-ties": (entries({9: 1}, {}, {20: -1}, {}), weights({k: (-1) ** k for k in ALL})),
    "negative": (full(-1), weights(dict.fromkeys(ALL, 1))),
    "cancellation": (entries({8: 1, 9: 1}, {8: -1}, {}, {}), weights(CENTRE)),
}


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("contents", CONTENTS)
def test_contents(backend, contents, select):
    """Catches mistakes at the extremes: nothing there, one entry, everything there, ties, cancellation."""
    x, kernel = CONTENTS[contents]
    bias = jnp.array([0.0, 1.0, -2.0])
    check(program(backend, 7, select), x, kernel, bias, GEOMETRY, 7, select)


INF, NAN = np.inf, np.nan
HOT = {
    "nan-input": (entries({0: NAN, 9: 5}, {}, {3: 1}, {3: NAN, 20: -2}), weights(ALL)),
    "inf-input": (entries({7: INF}, {8: -2}, {7: -INF, 22: 3}, {}), weights(ALL)),
    "inf-minus-inf": (entries({7: INF, 8: INF}, {}, {}, {14: 2}), weights(ALL)),
    "nan-weight": (SOME, weights({**ALL, 22: NAN})),
    "inf-weight": (SOME, weights({**ALL, 22: INF, 40: -INF})),
    "inf-against-stored-zero": (entries({7: 0, 8: 1}, {}, {}, {}), weights({4: INF, 22: -INF})),
    "inf-against-live-zero": (entries({7: INF, 8: NAN}, {}, {}, {}), weights({4: 0, 22: 0, 5: 0})),
    "all-nan": (full(NAN), weights(ALL)),
}


@pytest.mark.nans
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("contents", HOT)
def test_nan_and_inf(backend, contents, select):
    """Catches a NaN that hides or ranks last, and one born of an absent or zero factor against inf."""
    x, kernel = HOT[contents]
    bias = jnp.array([0.0, 1.0, -2.0])
    with np.errstate(invalid="ignore"):
        features = check(program(backend, 7, select), x, kernel, bias, GEOMETRY, 7, select)
    if contents.startswith("inf-against"):
        assert not np.isnan(features.values).any()
    if contents == "all-nan":
        assert (np.asarray(features.counts) == 7).all()


@pytest.mark.nans
def test_nan_of_either_sign_ranks_first(backend):
    """Catches a rank by the bits of a float, which puts a negative NaN last."""
    negative = np.array([0xFFC00000], np.uint32).view(np.float32)[0]
    x = entries({3: 1, 9: negative, 12: INF, 20: 7}, {}, {}, {})
    for select in SELECTS:
        features, _, _ = program(backend, 1, select)(
            x, weights({4: 1}), jnp.zeros(3), jnp.zeros((2, 3, 1))
        )
        assert features.keys[0, 0, 0] == 9
        assert np.isnan(features.values[0, 0, 0])


@pytest.mark.nans
def test_a_bias_may_be_nan(backend):
    """Catches a NaN bias that leaks to zero responses, or that is dropped."""
    for select in SELECTS:
        features, responses, _ = program(backend, 7, select)(
            SOME, weights(CENTRE), jnp.array([NAN, 0.0, 1.0]), jnp.zeros((2, 3, 7))
        )
        np.testing.assert_array_equal(responses[:, 0], [3, 1])
        np.testing.assert_array_equal(features.counts[:, 0], [3, 1])
        assert np.isnan(features.values[0, 0, :3]).all()


@pytest.mark.parametrize(
    ("select", "stored"),
    [("value", [0, 7, 29]), ("positive", [0, 29]), ("magnitude", [0, 7, 29])],
)
def test_a_bias_that_cancels(backend, select, stored):
    """Catches a response dropped, or kept under "positive", where its bias brings it to 0."""
    x = entries({0: 2, 7: 1, 29: 3}, {}, {}, {})
    bias = jnp.array([-1.0, 5.0, 0.0])
    features, responses, _ = program(backend, 7, select)(
        x, weights(CENTRE), bias, jnp.zeros((2, 3, 7))
    )
    np.testing.assert_array_equal(features.keys[0, 0, : len(stored)], stored)
    assert features.counts[0, 0] == responses[0, 0] == len(stored)
    # A zero response does not get the bias, however large.
    assert features.counts[1].max() == 0
    assert features.counts[0, 1] == 3


def test_without_a_bias(backend):
    """Catches a difference between no bias and a bias of 0."""
    x, kernel = full(), weights(ALL)

    def run(bias):
        features, responses = ilajax.conv(x, kernel, bias, capacity=9, select="value")
        return features.keys, features.values, responses

    got = jax.jit(functools.partial(run, None))()
    want = jax.jit(run)(jnp.zeros(3))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_positive_is_the_default(backend):
    """Catches another default of `select`."""
    x, kernel, bias = full(), weights(ALL), jnp.array([1.0, -3.0, 0.0])
    features, responses = jax.jit(functools.partial(ilajax.conv, capacity=9))(x, kernel, bias)
    keys, values, counts = oracles.conv(x, kernel, bias, GEOMETRY, 9, "positive")
    oracles.assert_tensor(features, keys, values)
    np.testing.assert_array_equal(responses, counts)


@pytest.mark.nans
def test_a_zero_cotangent_sends_nothing(backend):
    """Catches 0 * inf in the backward pass."""
    x, kernel = entries({7: INF, 20: 1}, {}, {}, {}), weights({4: 1, 5: INF, 22: 2})
    run = program(backend, 7, "magnitude")
    features, _, _ = run(x, kernel, jnp.zeros(3), jnp.zeros((2, 3, 7)))
    finite = jnp.isfinite(features.values) & (features.keys < 30)
    _, _, (x_bar, w_bar, b_bar) = run(x, kernel, jnp.zeros(3), jnp.where(finite, 1.0, 0.0))
    assert np.isfinite(x_bar).all()
    assert np.isfinite(w_bar).all()
    np.testing.assert_array_equal(b_bar, finite.sum((0, 2)))
