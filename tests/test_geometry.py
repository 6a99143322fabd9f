"""Window arithmetic against XLA's own shapes and against NumPy's index arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilajax
import oracles
from ilajax import geometry


@pytest.mark.parametrize(
    ("bound", "grid", "want"),
    [
        (0.1, (10, 10, 10), 100),  # 0.1 * 1000 is 100.00000000000001 in floats
        (0.29, (10, 10), 29),  # 0.29 * 100 is 28.999999999999996
        (1 / 3, (3, 3, 3), 9),
        (0.7, (10, 1), 7),  # 7.000000000000001 or 6.999999999999999
        (0.57, (10, 10), 57),  # 56.99999999999999
        (0.035, (24, 24), 20),  # 20.16: rounded down
        (1.0, (7, 3), 21),
        (1, (5,), 5),
        (1e-9, (4, 4), 1),  # at least one slot
        (0.999, (4, 4), 15),
        (1.0, (1290, 1290, 1290), 1290**3),  # the largest grids keep every site
        (0.5, (2**31 - 1,), 2**30 - 1),
    ],
)
def test_capacity(bound, grid, want):
    """Catches a slot lost to floating-point rounding, and a capacity of 0."""
    got = ilajax.capacity(bound, grid)
    assert got == want
    assert type(got) is int


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_capacity_of_a_fraction(numerator, sites):
    """Catches any k / n of n sites that does not give k slots."""
    k = min(numerator, sites)
    assert ilajax.capacity(k / sites, (sites,)) == k


@pytest.mark.parametrize("bound", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_capacity_rejects_a_bound_outside_0_1(bound):
    """Catches a bound that is silently clipped."""
    with pytest.raises(ValueError, match=r"density_bound.*\(0, 1\].*" + str(bound)):
        ilajax.capacity(bound, (4, 4))


@pytest.mark.parametrize("grid", [(2**31,), (2**16, 2**15), (1291, 1291, 1291), (2**40, 2**40)])
def test_grids_beyond_int32_are_rejected(grid):
    """Catches keys that would overflow, and a product that wraps around to a small number."""
    with pytest.raises(ValueError, match=r"spatial_shape.*2\*\*31"):
        geometry.check_spatial_shape(grid)


@pytest.mark.parametrize("grid", [(), (0,), (4, 0), (-1, 4)])
def test_empty_grids_are_rejected(grid):
    """Catches a grid without sites."""
    with pytest.raises(ValueError, match="spatial_shape"):
        geometry.check_spatial_shape(grid)


def test_the_largest_grid_is_legal():
    """Catches an off-by-one at 2**31 - 1 sites."""
    assert geometry.check_spatial_shape((2**31 - 1,)) == (2**31 - 1,)
    assert geometry.check_spatial_shape(np.array([3, 4])) == (3, 4)


WINDOWS = [
    # grid, window, strides, padding, dilation
    ((7,), (3,), 1, "SAME", 1),
    ((7,), (2,), 1, "SAME", 1),
    ((7,), (4,), 3, "SAME", 1),
    ((8,), (3,), 2, "SAME", 2),
    ((8,), (3,), 2, "VALID", 2),
    ((6,), (1,), 4, "SAME", 1),
    ((5, 6), (3, 2), 1, "SAME", 1),
    ((5, 6), (1, 1), 1, "VALID", 1),
    ((5, 6), (2, 4), (2, 3), "SAME", (2, 1)),
    ((5, 6), (3, 3), 1, ((2, 0), (0, 3)), 1),
    ((3, 3), (5, 4), 1, ((2, 2), (1, 2)), 1),
    ((9, 9), (3, 3), 2, ((-1, 0), (0, -2)), 1),
    ((4, 3, 5), (3, 3, 3), 1, "SAME", 1),
    ((4, 3, 5), (2, 1, 3), (2, 1, 2), "VALID", 1),
    ((2, 3, 2, 3), (2, 2, 2, 2), 1, "SAME", 1),
]


@pytest.mark.parametrize(("grid", "window", "strides", "padding", "dilation"), WINDOWS)
def test_conv_window_has_the_shape_of_lax(grid, window, strides, padding, dilation):
    """Catches an output shape other than that of `conv_general_dilated`."""
    got = geometry.conv_window(grid, window, strides=strides, padding=padding, dilation=dilation)
    want = oracles.Geometry(grid, window, strides, padding, dilation)
    x = jax.ShapeDtypeStruct((1, *grid, 1), jnp.float32)
    w = jax.ShapeDtypeStruct((*window, 1, 1), jnp.float32)
    lax_shape = jax.eval_shape(lambda x, w: oracles.dense_conv(x, w, want), x, w).shape
    assert got.output_shape == want.shape == lax_shape[1:-1]
    assert got.low == tuple(low for low, _ in want.pads)
    assert (got.taps, got.input_sites, got.output_sites) == (
        math.prod(window),
        math.prod(grid),
        math.prod(want.shape),
    )


@pytest.mark.parametrize(("grid", "window", "strides", "padding", "dilation"), WINDOWS)
def test_keys_through_a_tap(grid, window, strides, padding, dilation):
    """Catches a wrong site for a tap in either direction, first and last taps and borders included."""
    geo = oracles.Geometry(grid, window, strides, padding, dilation)
    got = geometry.conv_window(grid, window, strides=strides, padding=padding, dilation=dilation)
    sites = math.prod(grid)
    inputs, outputs = np.arange(sites), jnp.arange(geo.sites, dtype=jnp.int32)
    keys = jnp.arange(sites + 1, dtype=jnp.int32)
    both = jax.jit(lambda tap: (got.output_keys(keys, tap), got.input_keys(outputs, tap)))
    for tap in {0, got.taps // 2, got.taps - 1}:
        updated = [geo.update_id(key, tap) for key in inputs]
        want = [geo.sites if key is None else key for key in updated]
        updates, reads = both(tap)
        np.testing.assert_array_equal(updates[:-1], want)
        assert updates[-1] == geo.sites  # padding reaches nothing
        want = np.full(geo.sites, sites)
        for key, uid in zip(inputs, updated, strict=True):
            if uid is not None:
                want[uid] = key
        np.testing.assert_array_equal(reads, want)


@pytest.mark.parametrize("key", [-1, -(2**31), 2**31 - 1, 12])
def test_broken_keys_reach_nothing(key):
    """Catches a key outside the grid that wraps around into it."""
    window = geometry.conv_window((3, 4), (3, 3))
    for tap in range(9):
        assert window.output_keys(jnp.array([key], jnp.int32), jnp.int32(tap))[0] == 12


@settings(max_examples=50)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_ravel_and_unravel(shape, random):
    """Catches a row-major order that is not NumPy's, and positions outside the grid taken as inside."""
    sites = math.prod(shape)
    keys = np.arange(sites)
    got = geometry.unravel(keys, shape)
    want = np.unravel_index(keys, shape)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    position = [np.array([random.randint(-9, 9)]) for _ in shape]
    inside = all(0 <= p[0] < size for p, size in zip(position, shape, strict=True))
    key = int(np.asarray(geometry.ravel(position, shape))[0])
    assert key == (np.ravel_multi_index([p[0] for p in position], shape) if inside else sites)


def test_ravel_does_not_overflow():
    """Catches a far position whose product wraps around into the grid."""
    big = jnp.array([2**31 - 1, -(2**31)], jnp.int32)
    shape = (1290, 1290, 1290)
    np.testing.assert_array_equal(geometry.ravel([big, big, big], shape), [1290**3] * 2)


@pytest.mark.parametrize(
    ("grid", "window", "want"),
    [((4, 4), 2, (2, 2)), ((5, 7), 2, (3, 4)), ((5, 7), (5, 3), (1, 3)), ((3,), 8, (1,))],
)
def test_pool_window(grid, window, want):
    """Catches an output size other than ceil(S / window)."""
    got = geometry.pool_window(grid, window)
    assert got.output_shape == want
    assert got.strides == got.window_shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_shape": (3,)}, r"kernel.*\(3,\)"),
        ({"window_shape": (9, 3), "padding": "VALID"}, r"window.*9.*axis 0.*5"),
        ({"window_shape": (3, 3), "dilation": (1, 3), "padding": "VALID"}, r"window.*7.*axis 1.*6"),
        ({"strides": 0}, "strides"),
        ({"strides": (1, 2, 3)}, "strides"),
        ({"dilation": -1}, "kernel_dilation"),
        ({"padding": "FULL"}, "padding.*FULL"),
        ({"padding": ((1, 1),)}, "padding"),
    ],
)
def test_bad_windows(arguments, message):
    """Catches an argument that is clipped or misread instead of named in a ValueError."""
    window = arguments.pop("window_shape", (3, 3))
    with pytest.raises(ValueError, match=message):
        geometry.conv_window((5, 6), window, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"strides": 1.5}, {"dilation": "2"}, {"padding": 3}, {"padding": (1, 1)}]
)
def test_windows_of_the_wrong_type(arguments):
    """Catches a float or a string that is silently converted."""
    name = next(iter(arguments)).replace("dilation", "kernel_dilation")
    with pytest.raises(TypeError, match=name):
        geometry.conv_window((5, 6), (3, 3), **arguments)


def test_spreading_apart():
    """Catches an entry that ends up on another line, and work on keys that stay where they are."""
    keys = jnp.array([0, 5, 7, 11, 12])
    plain = geometry.conv_window((3, 4), (3, 3))
    assert geometry.spread_apart(keys, plain)[0] is keys
    window = geometry.conv_transpose_window((3, 4), (3, 3), strides=(2, 3))
    moved, spread = geometry.spread_apart(keys, window)
    assert spread.input_shape == (5, 10)
    np.testing.assert_array_equal(moved, [0, 2 * 10 + 3, 2 * 10 + 9, 4 * 10 + 9, 50])
