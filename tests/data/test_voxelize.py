"""Clouds to voxels: against loops, and in the worker processes that a data loader runs."""

import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import ilajax
import samples

voxelize = ilajax.data.voxelize
NAN, INF = np.nan, np.inf


def clouds(seed, sizes=(50, 1, 0, 30), rank=3):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, rank)) * rng.uniform(0.1, 9, rank) for size in sizes]


def keys_of(places, grid):
    return sorted({int(np.ravel_multi_index(p, grid)) for p in places})


@pytest.mark.parametrize("grid", [(9,), (5, 8), (4, 5, 6), (3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_each_cloud_fills_the_grid(grid, dtype):
    """Catches a cloud that is stretched, off the middle, or cut: against a loop over its points."""
    parts = [c.astype(dtype) for c in clouds(0, rank=len(grid))]
    batch = voxelize(parts, spatial_shape=grid, capacity=60)
    batch.tensor.validate()
    assert batch.tensor.shape == (4, *grid, 1)
    assert not batch.overflow.any()
    assert not batch.outside.any()
    for b, cloud in enumerate(np.asarray(p, float) for p in parts):
        places = []
        if len(cloud):
            low, high = cloud.min(axis=0), cloud.max(axis=0)
            edge = max((high - low) / grid) or 1
            for point in cloud:
                position = [
                    (p - l) / edge + (s - (h - l) / edge) / 2
                    for p, l, h, s in zip(point, low, high, grid, strict=True)
                ]
                places.append([min(int(p), s - 1) for p, s in zip(position, grid, strict=True)])
        keys = keys_of(places, grid)
        assert batch.tensor.keys[b, 0].tolist() == keys + [np.prod(grid)] * (60 - len(keys))
        np.testing.assert_array_equal(
            batch.tensor.values[b, 0], [1] * len(keys) + [0] * (60 - len(keys))
        )


def test_the_borders_of_a_box():
    """Catches a point on the upper border that falls off the grid, and a short axis off the middle."""
    corners = np.array([[1.0, 7.0], [4.0, 8.0]])
    batch = voxelize([corners], spatial_shape=(6, 6), capacity=4)
    assert batch.tensor.coordinates()[0, 0, :2].tolist() == [[0, 2], [5, 4]]
    boxes = np.random.default_rng(0).normal(size=(100, 2, 1)).astype(np.float32)
    batch = voxelize(boxes, spatial_shape=(7,), capacity=2)
    np.testing.assert_array_equal(batch.tensor.keys[:, 0], [[0, 6]] * 100)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
def test_degenerate_clouds(offset):
    """Catches a single point, or a flat cloud, that divides by 0; it lies in the middle."""
    one, flat = np.array([[3.0, 4.0]]), np.array([[0.0, 2.0], [1.0, 2.0]])
    batch = voxelize([one + offset, flat + offset], spatial_shape=(4, 6), capacity=2)
    assert batch.tensor.coordinates()[0, 0].tolist() == [[2, 3], [4, 6]]
    assert batch.tensor.coordinates()[1, 0].tolist() == [[0, 3], [3, 3]]


@pytest.mark.parametrize("size", [0.5, (0.5, 2.0)])
@pytest.mark.parametrize("origin", [None, (-1.0, -2.0)])
def test_a_voxel_size(origin, size):
    """Catches positions taken in another unit or from another corner, and lost points that nobody counts."""
    grid, parts = (8, 5), clouds(1, rank=2)
    batch = voxelize(parts, spatial_shape=grid, capacity=40, voxel_size=size, origin=origin)
    edges = np.broadcast_to(size, 2)
    outside = []
    for b, cloud in enumerate(parts):
        corner = cloud.min(axis=0) if origin is None and len(cloud) else origin
        places = [np.floor((point - corner) / edges).astype(int) for point in cloud]
        inside = [all(0 <= i < s for i, s in zip(p, grid, strict=True)) for p in places]
        keys = keys_of([p for p, i in zip(places, inside, strict=True) if i], grid)
        assert batch.tensor.keys[b, 0, : len(keys) + 1].tolist() == [*keys, 40]
        assert (batch.slots[b] >= 0).tolist() == inside
        outside.append(inside.count(False))
    assert sum(outside) > 10
    np.testing.assert_array_equal(batch.outside, outside)
    assert batch.outside.dtype == np.int32


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_features_and_slots(dtype, reduce):
    """Catches features in the wrong voxel, and slots that do not lead from points back to them."""
    parts = clouds(2)
    rng = np.random.default_rng(2)
    features = [rng.integers(-9, 9, (len(c), 3)).astype(samples.DTYPES[dtype]) for c in parts]
    batch = voxelize(parts, features, spatial_shape=(3, 3, 3), capacity=27, reduce=reduce)
    assert batch.tensor.dtype == samples.DTYPES[dtype]
    assert [s.shape for s in batch.slots] == [(len(c),) for c in parts]
    for b, slots in enumerate(batch.slots):
        assert slots.dtype == np.int32
        back = batch.tensor.values[b][:, slots].T.astype(float)
        for point, slot in enumerate(slots):
            together = features[b][slots == slot].astype(float)
            want = {"mean": np.mean, "sum": np.sum, "max": np.max}[reduce](together, axis=0)
            np.testing.assert_allclose(back[point], want, rtol=1e-2, atol=1e-2)


def test_voxels_that_do_not_fit():
    """Catches voxels lost without a count, points of theirs that keep a slot, and other than the lowest."""
    line = np.arange(6.0)[:, None]
    batch = voxelize([line, line[:3]], spatial_shape=(6,), capacity=4, voxel_size=1.0)
    np.testing.assert_array_equal(batch.overflow, [2, 0])
    np.testing.assert_array_equal(batch.tensor.keys[:, 0], [[0, 1, 2, 3], [0, 1, 2, 6]])
    np.testing.assert_array_equal(batch.slots[0], [0, 1, 2, 3, -1, -1])


def test_labels_go_to_the_majority():
    """Catches a mean of labels, a tie that goes to the higher one, and votes of points without a label."""
    positions = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 9])[:, None]
    labels = [7, 5, 7, 4, 3, -1, -1, 6, -1, 8]
    batch = voxelize(
        [positions, positions[:2], []],
        spatial_shape=(6,),
        capacity=5,
        voxel_size=1.0,
        labels=[labels, np.array([2, 1], np.uint8), []],
    )
    assert batch.labels.dtype == np.int32
    want = [[7, 3, 6, -1, -1], [1, -1, -1, -1, -1], [-1] * 5]
    np.testing.assert_array_equal(batch.labels, want)


def test_labels_of_many_points():
    """Catches votes that mix between voxels or samples: against a count for each voxel."""
    parts = clouds(3, (200, 100))
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 4, len(c)) for c in parts]
    batch = voxelize(parts, spatial_shape=(4, 4, 4), capacity=12, labels=labels)
    assert batch.overflow.all()
    for b, (slots, classes) in enumerate(zip(batch.slots, labels, strict=True)):
        for slot in range(12):
            assert batch.labels[b, slot] == np.bincount(classes[slots == slot]).argmax()


def test_only_empty_clouds():
    """Catches an empty cloud, as a list or an array, that crashes."""
    nothing = [[], np.zeros((0, 2), np.float32)]
    batch = voxelize(nothing, spatial_shape=(3, 3), capacity=2, labels=[[], []])
    batch.tensor.validate()
    assert not batch.tensor.counts.any()
    assert batch.labels.tolist() == [[-1, -1]] * 2


TWO = [np.zeros((3, 2)), np.ones((2, 2))]


@pytest.mark.nans
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[]], {}, ValueError, "clouds.*at least one"),
        ([[TWO[0], np.zeros((3, 3))]], {}, ValueError, r"clouds\[1\].*\[N, 2\].*\(3, 3\)"),
        ([[TWO[0], np.array([[0, 1], [0, NAN]])]], {}, ValueError, r"clouds\[1\].*nan.*point 1"),
        ([[np.array([[INF, 0]])]], {}, ValueError, r"clouds\[0\].*inf.*point 0"),
        ([[np.array([["a", "b"]])]], {}, TypeError, r"clouds\[0\].*numbers"),
        ([TWO, [np.ones((3, 1))]], {}, ValueError, "features.*one array for each cloud, 2.*1"),
        ([TWO, [np.ones((3, 1))] * 2], {}, ValueError, r"features\[1\].*N = 2.*\(3, 1\)"),
        (
            [TWO, [np.ones((3, 1)), np.ones((2, 4))]],
            {},
            ValueError,
            r"features\[1\].*\[N, C\].*features\[0\].*\(2, 4\)",
        ),
        ([TWO, [np.ones(3), np.ones(2)]], {}, ValueError, r"features\[0\].*\[N, C\].*\(3,\)"),
        (
            [TWO, [np.ones((3, 1)), np.array([[0], [NAN]])]],
            {},
            ValueError,
            r"features\[1\] of point 1 are NaN",
        ),
        ([TWO, [np.ones((3, 1), int), np.ones((2, 1), int)]], {}, TypeError, "features.*int"),
        ([TWO, [[["a"]] * 3, [["b"]] * 2]], {}, TypeError, "features must be float32.*U1"),
        ([TWO], {"labels": [[0, 1, 2]]}, ValueError, "labels.*one array for each cloud"),
        ([TWO], {"labels": [[0, 1, 2], [0]]}, ValueError, r"labels\[1\].*N = 2"),
        ([TWO], {"labels": [[0, 1, 2], [0, 0.5]]}, TypeError, "labels.*integers"),
        ([TWO], {"labels": [[0, 1, 2], [0, -2]]}, ValueError, "labels.*-2 to 2"),
        ([TWO], {"origin": (0, 0)}, ValueError, "origin needs a voxel_size"),
        ([TWO], {"voxel_size": 0}, ValueError, "voxel_size must be above 0"),
        ([TWO], {"voxel_size": (1, 2, 3)}, ValueError, r"voxel_size.*2 of them.*\(1, 2, 3\)"),
        ([TWO], {"voxel_size": 1, "origin": (0, NAN)}, ValueError, "origin.*finite"),
        ([TWO], {"capacity": 0}, ValueError, "capacity"),
        ([TWO], {"reduce": "min"}, ValueError, "reduce.*'min'"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    """Catches a mistake that passes, or an error that does not name the argument and the cloud."""
    with pytest.raises(error, match=message):
        voxelize(*arguments, **{"spatial_shape": (4, 4), "capacity": 4, **options})


def test_voxels_are_a_pytree():
    """Catches a batch that a loader cannot send, or that jit does not take."""
    batch = voxelize(clouds(4), spatial_shape=(4, 4, 4), capacity=60)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    total = jax.jit(lambda x: ilajax.to_dense(x).sum())(batch.tensor)
    assert total == batch.tensor.counts.sum()


def test_voxelize_takes_milliseconds():
    """Catches a loop over points: 20 batches of 8 x 2048 of them must not take two seconds."""
    parts = clouds(5, (2048,) * 8)
    start = time.perf_counter()
    for _ in range(20):
        voxelize(parts, spatial_shape=(32, 32, 32), capacity=2048)
    assert time.perf_counter() - start < 2


WORKERS = """
import multiprocessing
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ilajax


# What JAX computes on NumPy's arrays it transfers first: this finds every call, also one that is lucky.
@jax.transfer_guard("disallow_explicit")
def work(seed):
    clouds = [np.random.default_rng(seed).normal(size=(300, 3)) for _ in range(4)]
    batch = ilajax.data.voxelize(
        clouds, spatial_shape=(16, 16, 16), capacity=300, labels=[np.arange(300) % 5] * 4
    )
    x = batch.tensor
    # All that a worker may do with what it holds.
    x.validate(), repr(x), x.density, x.unshare().with_values(x.values).map(np.abs)
    return x, x.counts, x.coordinates(), batch.labels


if __name__ == "__main__":
    # A training step that is still busy when the workers start.
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 300, lambda _, a: jnp.tanh(a @ a), a))
    busy(jnp.ones((400, 400))).block_until_ready()
    running = busy(jnp.ones((400, 400)))
    os.environ["JAX_PLATFORMS"] = "none"  # whoever asks JAX for a device in a spawned worker fails
    want = jax.tree.leaves([work(seed) for seed in range(4)])
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        got = jax.tree.leaves(pool.map_async(work, range(4)).get(timeout=60))
    assert all(type(a) is np.ndarray for a in got)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    running.block_until_ready()
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_a_worker(start, tmp_path):
    """Catches a call of JAX, which hangs in a process forked while JAX computes, and wakes a device up."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    # Python warns of a fork beside JAX's threads, and rightly; the workers here do without JAX.
    run = subprocess.run(
        [sys.executable, script, start],
        cwd=pathlib.Path(ilajax.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
