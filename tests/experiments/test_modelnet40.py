"""Meshes: files of every sort of damage, ModelNet40's layout and its cache, and batches of voxels."""

import itertools
import os
import pickle
import resource

import numpy as np
import pytest

import ilajax
from experiments.data.augment import Pose
from experiments.data.meshes import MeshSet, load_mesh, load_mesh_set
from experiments.data.modelnet40 import load_modelnet40
from experiments.data.voxels import VoxelSource

SQUARE = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
TRIANGLE = f"OFF\n4 2 0\n{SQUARE}3 0 1 2\n3 0 2 3\n"
# A pyramid over a square, upright, that is not its own mirror image.
PYRAMID = (
    "OFF\n5 5 0\n0 0 0\n4 0 0\n4 2 0\n0 2 0\n1 1 3\n4 0 1 2 3\n3 0 1 4\n3 1 2 4\n3 2 3 4\n3 3 0 4\n"
)


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "vertices", "faces"),
    [
        (TRIANGLE, 4, [[0, 1, 2], [0, 2, 3]]),
        (TRIANGLE.replace("OFF\n", "OFF"), 4, [[0, 1, 2], [0, 2, 3]]),
        (TRIANGLE.replace("\n", "\r\n"), 4, [[0, 1, 2], [0, 2, 3]]),
        (f"# made by hand\nOFF # a\n\n4 1\n# b\n{SQUARE}\n3 0 1 2 # c", 3, [[0, 1, 2]]),
        (f"OFF\n4 1 4\n{SQUARE}4 0 1 2 3\n", 4, [[0, 1, 2], [2, 3, 0]]),
        (
            f"OFF\n5 1 0\n{SQUARE}-1 .5 0\n5 0 1 2 3 4\n",
            5,
            [[0, 1, 2], [0, 2, 3], [0, 3, 4]],
        ),
        (
            f"OFF\n4 2 0\n{SQUARE}3 0 1 2 255 0 0\n3 0 2 3 0.5 0.5 0.5 1\n",
            4,
            [[0, 1, 2], [0, 2, 3]],
        ),
        (f"OFF\n4 2 0\n{SQUARE}4 0 1 2 3 9 9 9\n3 0 1 2\n", 4, [[0, 1, 2], [0, 1, 2], [2, 3, 0]]),
        (
            f"COFF\n3 1 0\n{SQUARE[:18].replace(chr(10), ' 9 9 9 1' + chr(10))}3 2 1 0",
            3,
            [[2, 1, 0]],
        ),
    ],
    ids=["plain", "glued", "crlf", "comments", "quad", "pentagon", "colours", "mixed", "coff"],
)
def test_off_files(tmp_path, text, vertices, faces):
    """Catches an odd but sound file that is refused, or read as another mesh."""
    mesh = load_mesh(written(tmp_path / "a.off", text))
    assert mesh.vertices.dtype == np.float32
    assert mesh.faces.dtype == np.int32
    assert mesh.vertices.shape == (vertices, 3)
    assert mesh.faces.tolist() == faces
    np.testing.assert_array_equal(mesh.vertices[:3], [[0, 0, 0], [1, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it does not begin with OFF"),
        ("solid\nOFF\n", "it does not begin with OFF"),
        ("OFF\n", "no numbers of vertices and faces"),
        ("OFF BINARY\n4 2 0\n", "no numbers of vertices and faces"),
        (TRIANGLE[:-8], "announces 4 vertices and 2 faces, that is 6 lines, but 5 follow"),
        (TRIANGLE[:-3], r"face 1 has 3 corners and names 2: '3 0 2'"),
        (TRIANGLE + "3 0 1 3\n", "that is 6 lines, but 7 follow"),
        (TRIANGLE.replace("4 2 0", "3 3 0"), "face 0 has 0 corners and names 2"),
        (TRIANGLE.replace("1 1 0", "1 1"), "invalid column index"),
        (TRIANGLE.replace("1 1 0", "1 x 0"), "could not convert string 'x'"),
        (TRIANGLE.replace("1 1 0", "1 nan 0"), "vertex 2 is not finite"),
        (
            TRIANGLE.replace("1 1 0", "1 1e39 0"),
            r"vertex 2 is not finite in float32: \[1.0, 1e\+39",
        ),
        (TRIANGLE.replace("3 0 2 3", "3 0 2 4"), "name vertices 0 to 4, but it has 0 to 3"),
        (TRIANGLE.replace("3 0 2 3", "3 0 2 -1"), "name vertices -1 to 2, but it has 0 to 3"),
        (TRIANGLE.replace("3 0 2 3", "3 0 2 2.5"), r"invalid literal for int.*'2\.5'"),
        (TRIANGLE.replace("3 0 2 3", "2 0 2"), "face 1 has 2 corners"),
        (f"OFF\n4 0 0\n{SQUARE}", "it has no faces"),
        ("OFF\n0 0 0\n", "it has no faces"),
    ],
)
def test_a_broken_off_file_is_named(tmp_path, text, expected):
    """Catches a damaged file that passes for a smaller mesh, and an error without the file's name."""
    with pytest.raises(ValueError, match=rf"odd\.off cannot be read as a mesh: .*{expected}"):
        load_mesh(written(tmp_path / "odd.off", text))


@pytest.fixture
def modelnet(tmp_path):
    """Two classes; chairs are pyramids, and the mesh with the number i is i + 1 times as large."""
    for at, split in itertools.product(range(3), ("train", "test")):
        for name, text in (("chair", PYRAMID), ("bed", TRIANGLE)):
            scaled = text.replace(" 1", f" {at + 1}") if name == "bed" else text
            if name == "chair" or at < 2:
                written(tmp_path / name / split / f"{name}_{at:04}.off", scaled if at else text)
    written(tmp_path / "chair" / "train" / "._chair_0000.off", "not one of them")
    written(tmp_path / "chair" / ".DS_Store", "")
    return tmp_path


def test_the_sets(modelnet):
    """Catches a mesh under another's label or offsets, and a cache that holds something else."""
    told = []
    for _ in range(2):
        training, test = load_modelnet40(modelnet, progress=lambda *at: told.append(at))
        assert len(training) == len(test) == 5
        assert training.class_names.tolist() == ["bed", "chair"]
        assert training.label.tolist() == [0, 0, 1, 1, 1]
        assert training.model_names[3] == "chair_0001"
        for index, label in enumerate(test.label):
            path = modelnet / test.class_names[label] / "test" / f"{test.model_names[index]}.off"
            for read, kept in zip(load_mesh(path), test[index], strict=True):
                np.testing.assert_array_equal(read, kept)
                assert read.dtype == kept.dtype
        assert isinstance(training.vertices, np.memmap)
    assert told == [(i, 10) for i in range(1, 11)]
    assert (modelnet / "ilajax-cache").exists()


def test_the_cache_follows_the_files(modelnet, tmp_path):
    """Catches meshes that are out of date, arrays taken from who maps them, and half a conversion."""
    elsewhere = tmp_path / "elsewhere"
    kept = elsewhere / "ilajax-cache"

    def stopped(done, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_modelnet40(modelnet, cache_dir=elsewhere, progress=stopped)
    assert not list(kept.iterdir())
    training, _ = load_modelnet40(modelnet, cache_dir=elsewhere)
    assert training.vertices.max() == 4
    sent = pickle.dumps(training)
    bed = modelnet / "bed" / "train" / "bed_0001.off"
    bed.write_text(TRIANGLE.replace("1 1 0", "1 9 0"))
    training, _ = load_modelnet40(modelnet, cache_dir=elsewhere)
    assert training.vertices.max() == 9
    bed.write_text(TRIANGLE.replace("1 1 0", "1 8 0"))
    os.utime(bed, ns=(0, 10**18))
    training, _ = load_modelnet40(modelnet, cache_dir=elsewhere)
    assert training.vertices.max() == 8
    bed.unlink()
    training, _ = load_modelnet40(modelnet, cache_dir=elsewhere)
    assert len(training) == 4
    assert len(list(kept.iterdir())) == 4
    load_mesh_set.cache_clear()  # as in a new worker process of a run that goes on
    assert pickle.loads(sent).vertices.max() == 4
    assert not (modelnet / "ilajax-cache").exists()
    with pytest.raises(OSError, match=r"not be kept in .*bed_0000\.off.*Give another folder"):
        load_modelnet40(modelnet, cache_dir=modelnet / "bed" / "train" / "bed_0000.off")


def test_a_cache_in_the_folder_of_the_data(modelnet):
    """Catches a cache that passes for a class."""
    for _ in range(2):
        training, _ = load_modelnet40(modelnet, cache_dir=modelnet)
        assert training.class_names.tolist() == ["bed", "chair"]


@pytest.mark.parametrize(("limit", "broken"), [(100, "vertices"), (600, r"index\.npz")])
def test_a_full_disk(modelnet, limit, broken):
    """Catches an error that does not say which disk, and half of the arrays. No file may be larger."""
    written(modelnet / "bed" / "train" / "broken.off", "OFF\n")  # a long line in `left_out`
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        expected = rf"not be kept in .*ilajax-cache: \[Errno \d+\] .*{broken}.*--cache-dir"
        with pytest.raises(OSError, match=expected):
            load_modelnet40(modelnet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((modelnet / "ilajax-cache").iterdir())


def test_fingerprints_tell_sets_apart(modelnet):
    """Catches another set that passes for the same."""
    training, test = load_modelnet40(modelnet)
    assert training.fingerprint() == pickle.loads(pickle.dumps(training)).fingerprint()
    written(modelnet / "bed" / "test" / "bed_0001.off", PYRAMID)
    _, other = load_modelnet40(modelnet)
    assert test.fingerprint() != other.fingerprint()


def test_broken_files_are_listed(modelnet):
    """Catches a set that is smaller than its files without a word, and an end at the first broken file."""
    for at in range(12):
        written(modelnet / "bed" / "train" / f"broken_{at:02}.off", "OFF\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"12 of 22 files") as raised:
            load_modelnet40(modelnet)
        lines = str(raised.value).splitlines()
        assert len(lines) == 12
        assert "broken_09.off cannot be read as a mesh: after OFF" in lines[10]
        assert lines[11] == "and 2 more"
    training, test = load_modelnet40(modelnet, skip_broken=True)
    assert len(training) == 5
    assert len(training.left_out) == 12
    assert not len(test.left_out)
    for path in (modelnet / "bed" / "test").iterdir():
        path.write_text("OFF\n")
    for path in (modelnet / "chair" / "test").iterdir():
        path.write_text("OFF\n")
    with pytest.raises(ValueError, match=r"17 of 22 files .* sound ones of both train and test"):
        load_modelnet40(modelnet, skip_broken=True)


def test_another_layout(modelnet, tmp_path):
    """Catches a wrong folder that passes for a small or an empty set."""
    with pytest.raises(FileNotFoundError, match=r"no folder .*none"):
        load_modelnet40(modelnet / "none")
    with pytest.raises(FileNotFoundError, match=r"no classes in .*looked for CLASS/train/\*\.off"):
        load_modelnet40(modelnet / "chair")
    (modelnet / "lamp" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no meshes in .*lamp/train: looked for \*\.off"):
        load_modelnet40(modelnet)
    written(modelnet / "lamp" / "train" / "lamp_0001.off", TRIANGLE)
    with pytest.raises(FileNotFoundError, match=r"no meshes in .*lamp/test.*train and test"):
        load_modelnet40(modelnet)


def test_a_pickle_holds_no_arrays_of_the_cache(modelnet):
    """Catches workers that each get gigabytes through a pipe, and those that get other meshes."""
    source = VoxelSource(load_modelnet40(modelnet)[0], 8, 200, seed=1, jitter=1.0)
    sent = pickle.dumps(source)
    assert len(sent) < 600
    again, batch = (s.batch(np.array([4, 0]), 3) for s in (pickle.loads(sent), source))
    np.testing.assert_array_equal(again.inputs.keys, batch.inputs.keys)
    np.testing.assert_array_equal(again.labels, [1, 0])


def test_batches(modelnet):
    """Catches a mesh that is lost, cut in silence, stretched, or turned about another axis."""
    sets = load_modelnet40(modelnet)[0]
    batch = VoxelSource(sets, 13, 900).batch(np.array([2, 1]), 1)
    batch.inputs.validate()
    assert batch.inputs.shape == (2, 13, 13, 13, 1)
    assert batch.labels.tolist() == [1, 0]
    assert batch.overflow.tolist() == [0, 0]
    assert isinstance(batch.inputs.keys, np.ndarray)
    own = ilajax.data.mesh_voxels(*sets[2], spatial_shape=(13, 13, 13))
    expected = np.ravel_multi_index(own.T, (13, 13, 13)).tolist()
    assert batch.inputs.keys[0, 0].tolist() == expected + [13**3] * (900 - len(own))
    cut = VoxelSource(sets, 13, len(own) - 10).batch(np.array([2]), 1)
    assert cut.overflow.tolist() == [10]


CORNERS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
SIDES = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]


@pytest.mark.parametrize("resolution", [7, 16])
def test_a_box_keeps_all_its_sides(resolution):
    """Catches sides on the upper borders that come to lie outside of the grid: no overflow tells of them."""
    rng = np.random.default_rng(0)
    edges = np.concatenate([rng.uniform(1, 20, (10, 1)) * np.ones(3), rng.uniform(1, 20, (20, 3))])
    boxes = (CORNERS * edges[:, None] + rng.uniform(-9, 9, (30, 1, 3))).astype(np.float32)
    faces = np.array([(face[0], *face[i : i + 2]) for face in SIDES for i in (1, 2)], np.int32)
    offsets = (np.arange(31) * len(CORNERS), np.arange(31) * len(faces))
    label, names = np.zeros(30, np.int32), np.array(["box"] * 30)
    sets = MeshSet(
        boxes.reshape(-1, 3),
        np.tile(faces, (30, 1)),
        *offsets,
        label,
        names[:1],
        names,
        names[:0],
        None,
    )
    batch = VoxelSource(sets, resolution, 6 * resolution**2).batch(np.arange(30), 1)
    counts = batch.inputs.counts[:, 0]
    assert counts[:10].tolist() == [resolution**3 - (resolution - 2) ** 3] * 10
    for box, count in zip(boxes, counts, strict=True):
        placed = Pose().placed(box, resolution)
        size = np.floor(placed.max(axis=0)) - np.floor(placed.min(axis=0)) + 1
        assert count == size.prod() - (size - 2).clip(0).prod()


def test_poses(modelnet):
    """Catches a draw that hangs on other samples, a pose that stays, and a mesh that leaves its grid."""
    sets = load_modelnet40(modelnet)[0]
    source = VoxelSource(sets, 16, 900, seed=3, jitter=2.0)
    together = source.batch(np.array([2, 3]), 1).inputs
    alone = source.batch(np.array([3]), 1).inputs
    np.testing.assert_array_equal(together.keys[1], alone.keys[0])
    later = source.batch(np.array([3]), 2).inputs
    assert not np.array_equal(later.keys, alone.keys)
    corners = []
    for epoch in range(12):
        x, y, z = source.batch(np.array([3]), epoch).inputs.coordinates()[0, 0].T
        inside = x < 16
        corners.append((x[inside].min(), y[inside].min(), z[inside].min()))
        # The foot of the pyramid is level: far more voxels than at the tip.
        assert np.bincount(z[inside])[z[inside].min()] > 3 * (z == z[inside].max()).sum()
    assert len(set(corners)) > 6
    still = VoxelSource(sets, 16, 900).batch(np.array([3]), 1).inputs
    np.testing.assert_array_equal(
        still.keys, VoxelSource(sets, 16, 900).batch(np.array([3]), 2).inputs.keys
    )
    for jitter in (-1, 8, np.nan):
        with pytest.raises(ValueError, match=r"jitter must be in .0, 8.,"):
            VoxelSource(sets, 16, 900, jitter=jitter)
