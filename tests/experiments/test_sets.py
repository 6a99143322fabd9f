"""One door to the data sets: their poses in the grid, and each set by its name."""

import argparse
import itertools
import math
import re

import numpy as np
import pytest

import ilajax
from experiments.data.augment import Pose, pose
from experiments.data.point_sets import make_point_sets
from experiments.data.sets import add_data, load_dataset, where

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(300, 3)) * (3, 2, 1)
SETS = make_point_sets(6, 40, seed=0)


def test_a_turn_is_about_the_vertical():
    """Catches another axis, the other direction, and a turn that scales."""
    np.testing.assert_allclose(
        Pose(math.pi / 2).turned(np.array([[2, 0, 5], [0, 3, 7]])),
        [[0, 2, 5], [-3, 0, 7]],
        atol=1e-15,
    )
    turned = Pose(0.3).turned(POINTS)
    np.testing.assert_array_equal(turned[:, 2], POINTS[:, 2])
    np.testing.assert_allclose(np.hypot(*turned.T[:2]), np.hypot(*POINTS.T[:2]))
    np.testing.assert_array_equal(Pose().turned(POINTS), POINTS)
    # Vertices of a mesh are float32: they are turned in float64 nevertheless.
    coarse = POINTS.astype(np.float32)
    np.testing.assert_array_equal(Pose(0.3).turned(coarse), Pose(0.3).turned(coarse.astype(float)))


@pytest.mark.parametrize("angle", [0.0, 2.0])
@pytest.mark.parametrize("resolution", [1, 16, 27])
def test_voxels_are_those_of_the_library(angle, resolution):
    """Catches another scale than `voxelize` has, and lost border points."""
    here = Pose(angle)
    samples = [POINTS, POINTS[:1], POINTS[:0]]
    grid = {"spatial_shape": (resolution,) * 3, "capacity": 100}
    want = ilajax.data.voxelize([here.turned(points) for points in samples], **grid)
    placed = [here.placed(points, resolution) for points in samples]
    got = ilajax.data.voxelize(placed, **grid, voxel_size=1.0, origin=(0.0, 0.0, 0.0))
    np.testing.assert_array_equal(got.tensor.keys, want.tensor.keys)
    np.testing.assert_array_equal(got.overflow, want.overflow)
    assert (want.overflow[0] > 0) == (resolution > 1)
    assert not got.outside.any()


def test_a_placed_shape_keeps_its_margin():
    """Catches a scale for each axis, a shape off centre, and one that leaves the grid."""
    still = Pose(margin=2.0).placed(POINTS, 20)
    low, high = still.min(axis=0), still.max(axis=0)
    np.testing.assert_allclose(
        (high - low) / np.ptp(POINTS, axis=0), 16 / np.ptp(POINTS, axis=0).max()
    )
    np.testing.assert_allclose(low + high, 20)
    moved = Pose(0.0, (2.0, -2.0, 0.5), 2.0).placed(POINTS, 20)
    np.testing.assert_allclose(moved - still, np.tile([2, -2, 0.5], (300, 1)), atol=1e-12)
    for corner in ((2.0,) * 3, (-2.0,) * 3):
        for place in (Pose(0.0, corner, 2.0).placed(POINTS * 1e6, 20), Pose().placed(POINTS, 20)):
            assert place.min() >= 0
            assert place.max() < 20
    with pytest.raises(ValueError, match=r"shift must be at most the margin .* 2.0 voxels"):
        Pose(0.0, (0.0, -2.1, 0.0), 2.0)


def test_a_pose_is_drawn_from_its_arguments():
    """Catches a jitter that changes the turns of runs without one, and shifts that are not spread evenly."""
    assert pose(None, 1, 2, 0.5) == Pose(margin=0.5)
    assert pose(7, 1, 2, 0.5) == pose(7, 1, 2, 0.5)
    assert pose(7, 1, 2).angle == np.random.default_rng([7, 1, 2]).uniform(0, 2 * math.pi)
    assert pose(7, 1, 2, 0.5).angle == pose(7, 1, 2).angle
    assert len({pose(*place).angle for place in ((7, 1, 2), (7, 2, 2), (7, 1, 3), (8, 1, 2))}) == 4
    shifts = np.array([pose(0, 1, index, 3.0).shift for index in range(400)])
    assert np.abs(shifts).max() < 3
    np.testing.assert_allclose(np.abs(shifts).mean(axis=0), 1.5, atol=0.2)
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=0.3)


def test_shapes_are_made():
    """Catches a test set that is the training set, a turn without a seed, and cut surfaces."""
    sizes = {"train_size": 16, "test_size": 16}
    data = load_dataset("shapes", resolution=16, seed=1, jitter=1.0, **sizes)
    chosen = np.arange(16)
    first, second = (data.training.batch(chosen, epoch) for epoch in (1, 2))
    assert data.class_names == tuple(SETS.class_names)
    assert first.inputs.capacity == 6 * 16**2
    assert first.overflow.sum() == 0
    # Eight points a voxel: nearly closed surfaces, of the size that the docstring says.
    assert 1.5 < first.inputs.counts.mean() / 16**2 < 4
    assert (first.inputs.keys != second.inputs.keys).any()
    test, again = (data.test.batch(chosen, epoch) for epoch in (1, 2))
    np.testing.assert_array_equal(test.inputs.keys, again.inputs.keys)
    plain = load_dataset("shapes", resolution=16, jitter=1.0, **sizes).training.batch(chosen, 1)
    assert (test.inputs.keys != plain.inputs.keys).any(axis=(1, 2)).all()


def test_kicad_is_loaded(tmp_path):
    """Catches the splits exchanged, classes that do not agree, and a capacity that cuts."""
    for part, count in (("train", 6), ("test", 4)):
        np.savez(tmp_path / f"{part}.npz", **vars(make_point_sets(count, 40, seed=0)))
    data = load_dataset("kicad", tmp_path, resolution=16)
    assert (len(data.training), len(data.test)) == (6, 4)
    assert data.training.capacity == 40
    assert load_dataset("kicad", tmp_path, resolution=3).test.capacity == 27
    assert load_dataset("kicad", tmp_path, resolution=16, capacity=7).test.capacity == 7
    others = {**vars(SETS), "class_names": SETS.class_names[::-1]}
    np.savez(tmp_path / "test.npz", **others)
    with pytest.raises(ValueError, match="Give sets of the same classes"):
        load_dataset("kicad", tmp_path, resolution=16)


# A tetrahedron with its right angle at the origin, and a triangle that stands on the ground.
OFF = """OFF
4 4 0
0 0 0
4 0 0
0 1.9 0
0 0 0.9
3 0 1 2
3 0 1 3
3 0 2 3
3 1 2 3
"""
LYING = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


def test_modelnet40_is_loaded(tmp_path):
    """Catches the splits or classes exchanged, and meshes that are not turned as clouds are."""
    pytest.importorskip("trimesh")
    for name, mesh in (("sofa", LYING), ("bed", OFF)):
        for part, count in (("train", 2), ("test", 1)):
            folder = tmp_path / name / part
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{name}_{number:04}.off").write_text(mesh)
    data = load_dataset("modelnet40", tmp_path, resolution=8, seed=0)
    assert data.class_names == ("bed", "sofa")
    assert (len(data.training), len(data.test)) == (4, 2)
    inputs, labels, overflow = data.test.batch(np.arange(2), epoch=0)
    assert (inputs.capacity, overflow.sum()) == (6 * 8**2, 0)
    for label, keys in zip(labels, inputs.keys[:, 0], strict=True):
        x, y, z = np.unravel_index(keys[keys < 512], (8, 8, 8))
        assert set(x) == set(range(8))
        # One scale for all axes, in the middle: 8 x 3.8 x 1.8 voxels, and 8 x 8 x 0.
        assert np.ptp(y) + 1 == (4 if data.class_names[label] == "bed" else 8)
        assert np.ptp(z) + 1 == (2 if data.class_names[label] == "bed" else 1)
    first, second = (data.training.batch(np.arange(4), epoch) for epoch in (1, 2))
    assert (first.inputs.keys != second.inputs.keys).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "kicad"], "--data kicad needs --data-dir DIR, a folder with train.npz and"),
        (["--data", "modelnet40"], "needs --data-dir DIR, a folder with CLASS/train"),
        (["--data-dir", "there"], "shapes is made on the spot, but --data-dir is there. Leave it"),
        (["--skip-broken"], "--skip-broken are for --data modelnet40, but --data is shapes"),
        (["--cache-dir", "there"], "--cache-dir and .* are for --data modelnet40"),
        (["--data", "kicad", "--data-dir", "nowhere"], r"no file .*nowhere.train\.npz"),
    ],
)
def test_arguments_that_do_not_fit(arguments, expected):
    """Catches a folder that is not asked for, or not looked at."""
    parser = argparse.ArgumentParser()
    add_data(parser)
    options = parser.parse_args(arguments)
    with pytest.raises((OSError, ValueError), match=expected):
        load_dataset(options.data, **where(options), resolution=16)


def test_modelnet40_with_a_broken_file_that_cannot_be_written_to(tmp_path, capsys):
    """Catches options that do not arrive, errors that do not name them, and files left out without a word."""
    pytest.importorskip("trimesh")
    data, kept = tmp_path / "data", tmp_path / "kept"
    for name, part in itertools.product(("bed", "sofa"), ("train", "test")):
        (data / name / part).mkdir(parents=True)
        for number in range(3 if part == "train" else 1):
            (data / name / part / f"{name}_{number}.off").write_text(OFF)
    for number in range(2):
        (data / "bed" / "train" / f"bed_{number}.off").write_text("OFF\n")
    (data / "ilajax-cache").write_text("no folder")
    parser = argparse.ArgumentParser()
    add_data(parser)

    def loaded(*more):
        options = parser.parse_args(["--data", "modelnet40", "--data-dir", str(data), *more])
        return load_dataset(options.data, **where(options), resolution=8)

    with pytest.raises(OSError, match=r"Give another folder by --cache-dir"):
        loaded("--skip-broken")
    with pytest.raises(ValueError, match=r"2 of 8 files .* leave them out by --skip-broken"):
        loaded("--cache-dir", str(kept))
    assert len(loaded("--cache-dir", str(kept), "--skip-broken").training) == 4
    assert re.search(r"left out 2 files:\n.*bed_0\.off .*\n.*bed_1\.off", capsys.readouterr().out)


@pytest.mark.parametrize("resolution", [0, -3])
def test_a_grid_without_voxels(resolution):
    with pytest.raises(ValueError, match=rf"every axis at least one site, got \({resolution},"):
        load_dataset("shapes", resolution=resolution)


def test_an_unknown_set():
    with pytest.raises(ValueError, match=r"name must be one of .*kicad.* got 'chairs'"):
        load_dataset("chairs", resolution=16)
