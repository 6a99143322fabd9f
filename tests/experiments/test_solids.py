"""The generated solids."""

import numpy as np
import pytest

from experiments.data.solids import CLASSES, SURFACES, SparseInput, make_solids, slots


@pytest.fixture(scope="module")
def solids():
    """Four of each class."""
    return make_solids(4 * len(CLASSES), 64, seed=3)


def test_a_seed_gives_the_same_solids(solids):
    """It would catch a generator that hangs on the number of solids, or on what was drawn before."""
    again = make_solids(len(CLASSES), 64, seed=3)
    np.testing.assert_array_equal(again.keys, solids.keys[: len(CLASSES)])
    other = make_solids(len(CLASSES), 64, seed=4)
    assert not np.array_equal(other.keys, again.keys)


def test_every_class_has_surfaces_and_none_is_dense(solids):
    """It would catch an empty or a filled solid, a class that is missing, and slots that are too few."""
    counts = solids.counts()
    assert list(np.bincount(solids.labels)) == [4] * len(CLASSES)
    assert counts.min() > 500
    assert counts.max() <= slots(64) <= 0.03 * 64**3


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_the_input_is_valid(resolution):
    """It would catch keys that repeat, descend or lie outside, and solids that touch the grid's faces."""
    solids = make_solids(len(CLASSES), resolution, seed=0)
    x = SparseInput(resolution)(solids.keys)
    x.validate()
    assert x.shape == (len(CLASSES), *(resolution,) * 3, 1)
    for keys in solids.keys:
        position = np.unravel_index(keys[keys < resolution**3], x.spatial_shape)
        assert np.min(position) > 0
        assert np.max(position) < resolution - 1


def test_solids_are_turned(solids):
    """It would catch boxes along the axes: there a plane of voxels holds much of the surface."""
    boxes = solids.keys[solids.labels == CLASSES.index("box")]
    for keys in boxes:
        position = np.stack(np.unravel_index(keys[keys < 64**3], (64,) * 3))
        most = max(np.bincount(axis).max() for axis in position)
        assert most < 0.2 * position.shape[1]


@pytest.mark.parametrize("name", CLASSES)
def test_surfaces_are_closed_around_the_origin_and_reproducible(name):
    """It would catch points far off, a wrong shape, and a sampler with random state of its own."""
    points, again = (SURFACES[name](3000, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(points, again)
    assert points.shape == (3000, 3)
    assert np.abs(points).max() < 2.5
    # Every solid reaches to both sides of each axis.
    assert (points.min(axis=0) < -0.3).all()
    assert (points.max(axis=0) > 0.3).all()


def test_what_lies_inside_of_a_cross_is_left_out():
    """It would catch faces of one bar that run through the others."""
    points = np.abs(SURFACES["cross"](5000, np.random.default_rng(0)))
    assert ((points < 0.2499).sum(axis=1) < 2).all()


def test_a_pyramid_has_five_flat_faces():
    """It would catch sides that do not meet the base, or points beside them."""
    x, y, z = SURFACES["pyramid"](5000, np.random.default_rng(0)).T
    out = np.maximum(np.abs(x), np.abs(y))
    on_base = np.isclose(z, -1) & (out <= 1 + 1e-9)
    on_side = np.isclose(z, 1 - 2 * out)
    assert (on_base | on_side).all()
    assert on_base.any()
    assert on_side.any()
