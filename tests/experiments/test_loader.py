"""The loader: the order, worker processes that do without JAX's devices, and going on in the middle."""

import contextlib
import itertools
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import ilajax
from experiments import frame
from experiments.data.loader import Arrays, batches, feed
from experiments.data.point_sets import make_point_sets
from experiments.data.voxels import VoxelSource
from experiments.training import Run, train

ROOT = Path(__file__).parents[2]
SETS = make_point_sets(22, 60, seed=0)
CLOUDS = VoxelSource(SETS, 16, 40, seed=1)


@pytest.fixture
def _no_device_in_workers(monkeypatch):
    """Whoever asks JAX for a device in a worker fails: JAX reads this when it is imported."""
    pytest.importorskip("grain")  # a machine with a GPU may have none
    monkeypatch.setenv("JAX_PLATFORMS", "none")


def taken(source, count=None, **options):
    with contextlib.closing(feed(source, 4, seed=2, epochs=2, **options)) as fed:
        # Copies: a worker's arrays lie in shared memory.
        return [jax.tree.map(np.array, batch) for batch in itertools.islice(fed, count)]


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_the_order_is_that_of_the_epochs():
    """Catches a sample that comes twice, and an order that is not the one of earlier runs."""
    numbers = Arrays(np.arange(22) * 10, np.arange(22))
    got = taken(numbers)
    want = np.concatenate([batches(22, 4, seed=2, epoch=epoch) for epoch in (1, 2)])
    np.testing.assert_array_equal([batch.labels for batch in got], want)
    np.testing.assert_array_equal([batch.inputs for batch in got], want * 10)
    # Written down, so that figures of earlier runs stay those of this code.
    np.testing.assert_array_equal(batches(10, 4, seed=1, epoch=2), [[8, 5, 6, 0], [9, 1, 4, 3]])


@pytest.mark.usefixtures("_no_device_in_workers")
def test_workers_change_nothing():
    """Catches batches that come out of order or twice, turns drawn anew, and a worker that wakes a device."""
    same(taken(CLOUDS, workers=2), taken(CLOUDS))


@pytest.mark.parametrize("start", [0, 3, 5, 7, 10])
def test_going_on_after_some_batches(start):
    """Catches a batch that is skipped, repeated or turned another way after a stop."""
    same(taken(CLOUDS, start=start), taken(CLOUDS)[start:])


@pytest.mark.usefixtures("_no_device_in_workers")
def test_going_on_with_other_workers():
    """Catches a position that is right for one number of workers only, and workers that are never ended."""
    first = taken(CLOUDS, 3, workers=2)
    assert multiprocessing.active_children() == []
    same(first + taken(CLOUDS, start=3, workers=1), taken(CLOUDS))


def test_too_few_samples():
    """Catches an endless wait for a batch that never fills."""
    with pytest.raises(ValueError, match=r"size must be at most the 22 samples .* got 23"):
        feed(CLOUDS, 23, seed=0, epochs=1)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.conv = ilajax.nn.Conv(1, 4, (3, 3, 3), density_bound=0.1, strides=2, rngs=rngs)
        self.logits = nnx.Linear(4, 8, rngs=rngs)

    def __call__(self, x):
        return self.logits(ilajax.global_avg_pool(self.conv(x)))


def as_it_is(x):
    return x


def trained(folder, workers):
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1)), wrt=nnx.Param)
    run = Run(
        name="net",
        model=model,
        optimizer=optimizer,
        to_input=as_it_is,
        directory=folder,
        seed=5,
    )
    test = VoxelSource(SETS, 16, 60).batch(np.arange(22), epoch=0)
    with frame.Reporter() as reporter:
        rows = train(
            run,
            CLOUDS,
            (test.inputs, test.labels),
            epochs=2,
            batch_size=4,
            reporter=reporter,
            test_batch=8,
            workers=workers,
        )
    for row in rows:
        del row["seconds"], row["seconds_per_step"]
    return rows, [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.mark.usefixtures("_no_device_in_workers")
def test_training_on_clouds_from_workers(tmp_path, capsys):
    """Catches a net that workers train otherwise, and cut voxels that no row and no line tells of."""
    rows, weights = trained(tmp_path / "here", workers=0)
    again, same_weights = trained(tmp_path / "workers", workers=2)
    assert rows == again
    assert all(map(np.array_equal, weights, same_weights))
    made = [
        sum(
            int(CLOUDS.batch(chosen, epoch).overflow.sum())
            for chosen in batches(22, 4, seed=5, epoch=epoch)
        )
        for epoch in (1, 2)
    ]
    assert [row["voxels_cut"] for row in rows] == made
    assert min(made) > 0
    assert f"{made[0]:,} voxels cut" in capsys.readouterr().out


def test_the_page_runs_as_pasted(tmp_path, capsys):
    """Catches a section of docs/data.md whose blocks, as a script, do not do what the page says."""
    pytest.importorskip("grain")
    sections = (ROOT / "docs" / "data.md").read_text().split("\n## ")[1:]
    scripts = ["\n".join(re.findall(r"```python\n(.*?)```", s, re.DOTALL)) for s in sections]
    *scripts, spawning = scripts  # workers import the script that spawns them
    printed = []
    for script in scripts:
        exec(script, {})
        printed.append(capsys.readouterr().out)
    assert "did not fit" in printed[1]
    assert re.search(r"\[\d{4} +\d{3,4}\] voxels", printed[2])
    path = tmp_path / "example.py"
    path.write_text(spawning)
    run = subprocess.run(
        [sys.executable, "-W", "error", path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "resumed after 5 of 12 batches" in run.stdout
