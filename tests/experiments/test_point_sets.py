"""Point clouds with labels: files of the kicad set's format, clouds made on the spot, and both as voxels."""

import dataclasses
import pickle

import numpy as np
import pytest

from experiments.data.point_sets import SCALE, load_point_sets, make_point_sets
from experiments.data.solids import CLASSES
from experiments.data.voxels import VoxelSource

SETS = make_point_sets(10, 50, seed=0)


def write(path, **changes):
    """A file of the format, with some arrays changed, or removed where None is given."""
    arrays = {**vars(SETS), **changes}
    np.savez_compressed(path, **{name: a for name, a in arrays.items() if a is not None})
    return path


def test_what_is_written_is_loaded(tmp_path):
    """Catches an array under another name, and one that comes back changed."""
    loaded = load_point_sets(write(tmp_path / "train.npz"))
    assert len(loaded) == 10
    for name, array in vars(SETS).items():
        np.testing.assert_array_equal(getattr(loaded, name), array)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label": None}, "has no array label, only points, class_names, model_names"),
        (
            {"points": SETS.points / 65535},
            r"points must be uint16\[N, P, 3\], got float64\[10, 50, 3\]",
        ),
        ({"points": SETS.points[..., :2]}, r"points must be .* got uint16\[10, 50, 2\]"),
        ({"points": SETS.points[:, :0]}, "points must hold at least one point a cloud, got none"),
        ({"points": SETS.points[:4]}, "points holds 4 clouds, but label 10"),
        ({"model_names": SETS.model_names[1:]}, "model_names holds 9 clouds, but label 10"),
        ({"label": SETS.label - 1}, "label holds -1 to 6, but class_names has 8 classes"),
        ({"class_names": SETS.class_names[:7]}, "label holds 0 to 7, but class_names has 7"),
        ({"label": SETS.label.astype(float)}, r"label must be integer\[N\], got float64\[10\]"),
        ({"label": SETS.label[:, None]}, r"label must be integer\[N\], got int32\[10, 1\]"),
        ({"model_names": np.array([None] * 10)}, "the array model_names cannot be read.*pickle"),
    ],
)
def test_a_wrong_file_is_named_with_its_array(tmp_path, changes, expected):
    """Catches a wrong file that shows late, in a training step, and a pickle that is run."""
    path = write(tmp_path / "odd.npz", **changes)
    with pytest.raises(ValueError, match=f"odd.npz.*{expected}"):
        load_point_sets(path)


def test_a_broken_file_is_named(tmp_path):
    """Catches errors of the unpacking libraries, which do not say what to do."""
    with pytest.raises(FileNotFoundError, match=r"none\.npz.*Give an \.npz file"):
        load_point_sets(tmp_path / "none.npz")
    path = write(tmp_path / "cut.npz")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"cut\.npz is not an \.npz file, or is truncated"):
        load_point_sets(path)
    path.write_bytes(content[:200] + bytes(64) + content[264:])
    with pytest.raises(ValueError, match=r"cut\.npz: the array points cannot be read"):
        load_point_sets(path)


def test_a_seed_makes_the_same_clouds():
    """Catches clouds that hang on their number, leave the cube, or do not fill it."""
    again = make_point_sets(8, 50, seed=0)
    np.testing.assert_array_equal(again.points, SETS.points[:8])
    assert (make_point_sets(8, 50, seed=1).points != again.points).any()
    assert list(again.class_names[again.label]) == CLASSES
    # Two of a class are no copies: boxes of other proportions.
    sizes = [np.ptp(SETS.points[i].astype(int), axis=0) for i in (0, 8)]
    assert np.abs(sizes[0] - sizes[1]).max() > SCALE / 50
    box = again.points.max(axis=1).astype(int) - again.points.min(axis=1)
    np.testing.assert_array_equal(box.max(axis=1), SCALE)


def test_points_that_are_not_stored_are_the_same():
    """Catches a cloud that hangs on others, or on when it is asked for, and one that there is not."""
    made = make_point_sets(10, 50, seed=0, stored=False)
    assert made.points.shape == SETS.points.shape
    for index in (7, 0, 7):
        np.testing.assert_array_equal(made.points[index], SETS.points[index])
    np.testing.assert_array_equal(made.points[np.array([3, 1])], SETS.points[[3, 1]])
    with pytest.raises(IndexError):
        made.points[10]
    batches = [
        VoxelSource(s, 16, 50, seed=3).batch(np.array([4, 9]), epoch=2) for s in (SETS, made)
    ]
    np.testing.assert_array_equal(batches[0].inputs.keys, batches[1].inputs.keys)
    # Six petabytes, were they stored.
    endless = make_point_sets(1000, 10**9, seed=0, stored=False)
    assert len(pickle.dumps(endless)) < 100_000


def test_fingerprints_tell_sets_apart(tmp_path):
    """Catches other points or labels that pass for the same data, and a file that does not."""
    other = SETS.points.copy()
    other[9, 49, 2] ^= 1
    made = [make_point_sets(10, 50, seed=seed, stored=False) for seed in (0, 1)]
    found = [
        SETS.fingerprint(),
        dataclasses.replace(SETS, points=other).fingerprint(),
        dataclasses.replace(SETS, label=SETS.label[::-1]).fingerprint(),
        *(sets.fingerprint() for sets in made),
    ]
    assert len(set(found)) == 5
    wide = {"label": SETS.label.astype(np.int64)}
    assert load_point_sets(write(tmp_path / "again.npz", **wide)).fingerprint() == found[0]
    assert make_point_sets(10, 50, seed=0, stored=False).fingerprint() == found[3]


def test_a_batch_has_the_voxels_of_its_clouds():
    """Catches samples in another order, and labels of others: against a loop over the points."""
    chosen = np.array([7, 2])
    x, labels, overflow = VoxelSource(SETS, 8, 50).batch(chosen, epoch=1)
    x.validate()
    assert x.shape == (2, 8, 8, 8, 1)
    np.testing.assert_array_equal(labels, SETS.label[chosen])
    assert not overflow.any()
    for keys, index in zip(x.keys[:, 0], chosen, strict=True):
        cloud = SETS.points[index] / 65535
        low, high = cloud.min(axis=0), cloud.max(axis=0)
        edge = (high - low).max() / 8
        places = (cloud - low) / edge + (8 - (high - low) / edge) / 2
        want = {tuple(min(int(p), 7) for p in place) for place in places}
        got = np.transpose(np.unravel_index(keys[keys < 512], (8, 8, 8)))
        assert {tuple(place) for place in got.tolist()} == want


def test_what_does_not_fit_is_counted():
    """Catches voxels that are cut and not told of."""
    chosen = np.arange(10)
    whole, cut = (VoxelSource(SETS, 8, capacity).batch(chosen, epoch=1) for capacity in (50, 12))
    np.testing.assert_array_equal(cut.overflow, whole.inputs.counts[:, 0] - 12)
    assert cut.overflow.min() > 0


def test_a_turn_is_a_function_of_seed_epoch_and_cloud():
    """Catches random numbers that hang on what a worker drew before, or on a cloud's place in a batch."""
    clouds = VoxelSource(SETS, 16, 50, seed=3)
    many = clouds.batch(np.array([1, 4, 6]), epoch=2).inputs.keys
    one = clouds.batch(np.array([4]), epoch=2).inputs.keys
    np.testing.assert_array_equal(many[1], one[0])
    for other in (
        clouds.batch(np.array([4]), epoch=3),
        VoxelSource(SETS, 16, 50, seed=4).batch(np.array([4]), epoch=2),
    ):
        assert (other.inputs.keys != one).any()


def test_a_shape_is_moved_by_its_jitter():
    """Catches a shift that leaves the grid, comes without a seed, or is the same for all."""
    still = VoxelSource(SETS, 16, 50, jitter=2.5).batch(np.array([1]), epoch=1).inputs.coordinates()
    assert still.min() >= 2  # the margin
    moved = VoxelSource(SETS, 16, 50, seed=3, jitter=2.5)
    lowest = {
        moved.batch(np.array([1]), epoch=e).inputs.coordinates()[..., 2].min() for e in range(9)
    }
    assert len(lowest) > 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"jitter": 4.0}, r"jitter must be in \[0, 4\), less than half the 8 voxels .* got 4.0"),
        ({"jitter": -0.5}, "jitter must be .* got -0.5"),
        ({"jitter": float("nan")}, "jitter must be .* got nan"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"resolution": 0}, r"every axis at least one site, got \(0, 0, 0\)"),
        ({"resolution": 1291}, "keys are int32"),
    ],
)
def test_a_wrong_number_is_named(changes, expected):
    """Catches a number that shows in a worker, or as a cloud that is turned inside out."""
    with pytest.raises(ValueError, match=expected):
        VoxelSource(**{"sets": SETS, "resolution": 8, "capacity": 50} | changes)
