"""Shapes as voxels that say where in them the surface lies: what a voxel holds, and how samples vary."""

import jax
import numpy as np

import ilajax
from experiments.data import parts
from experiments.data.augment import Pose
from experiments.data.parts import Parts
from experiments.data.point_sets import SCALE, PointSets, make_point_sets
from experiments.data.voxels import VoxelSource

SETS = make_point_sets(6, 300, seed=0)
SAMPLES = VoxelSource(SETS, 8, 300)


def test_a_voxel_says_where_its_points_lie():
    """Catches axes in another order, a sum in place of a mean, and an offset from a voxel's corner."""
    # The first two span the grid of eight voxels; the others share a voxel.
    points = np.array([[0, 0, 0], [8, 8, 8], [2.25, 4.5, 6.5], [2.75, 4.75, 6.25]])
    cloud = np.rint(points / 8 * SCALE).astype(np.uint16)[None]
    sets = PointSets(cloud, np.array([1]), np.array(["a", "b"]), np.array(["x"]))
    batch = Parts(VoxelSource(sets, 8, 4)).batch(np.array([0]), 1)
    assert batch.labels.tolist() == [1]
    assert batch.overflow.tolist() == [0]
    x = batch.inputs
    at = x.coordinates()[0, 0].tolist().index([2, 4, 6])
    np.testing.assert_allclose(x.values[0, :, at], [1, 0, 0.125, -0.125], atol=1e-3)


def test_test_samples_stand_still_and_the_others_vary():
    """Catches a test set that varies, a training set that does not, and one that hangs on its batch."""
    still, moved = Parts(SAMPLES), Parts(SAMPLES, seed=3)
    chosen = np.arange(6)

    def keys(parts, epoch):
        return parts.batch(chosen, epoch).inputs.keys

    plain = SAMPLES.batch(chosen, 0).inputs.keys
    np.testing.assert_array_equal(keys(still, 1), plain)
    np.testing.assert_array_equal(keys(still, 2), plain)
    np.testing.assert_array_equal(keys(moved, 1), keys(Parts(SAMPLES, seed=3), 1))
    for other in (keys(moved, 2), keys(Parts(SAMPLES, seed=4), 1), plain):
        assert (keys(moved, 1) != other).any(axis=(1, 2)).all()
    # Alone or among others: the same.
    np.testing.assert_array_equal(keys(moved, 1)[3:4], moved.batch(chosen[3:4], 1).inputs.keys)


def test_varied_samples_stay_in_the_grid_and_keep_their_kind():
    """Catches points that leave the grid, a mirrored vertical, and shrinking beyond what is said."""
    varied = Parts(SAMPLES, seed=0)
    still = SETS.positions(0, Pose(), 8)
    mirrored = []
    for epoch in range(1, 40):
        position = varied._positions(0, epoch)
        assert position.min() >= 0
        assert position.max() < 8
        for axis in range(3):
            slope, _ = np.polyfit(still[:, axis], position[:, axis], 1)
            assert 1 - parts.SHRINK - 1e-6 <= abs(slope) <= 1 + 1e-6
            mirrored.append(slope < 0)
    x, y, z = np.reshape(mirrored, (-1, 3)).T
    assert 8 < x.sum() < 31
    assert 8 < y.sum() < 31
    assert (x != y).any()
    assert not z.any()


def test_the_whole_of_a_source_is_its_samples_in_order(monkeypatch):
    """Catches samples that are lost or doubled where the parts meet."""
    monkeypatch.setattr(parts, "AT_ONCE", 4)
    whole, want = parts.whole(Parts(SAMPLES)), Parts(SAMPLES).batch(np.arange(6), 0)
    assert isinstance(whole.inputs, ilajax.SparseTensor)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, want))
