"""Checkpoints give back every variable, refuse another network's, and find what is torn."""

import contextlib
import gc
import resource

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.checkpoints import (
    CheckpointError,
    Checkpoints,
    check_options,
    remove_checkpoints,
)

# Where one array cannot be read or written, tensorstore reports the others to an event loop that Orbax has
# closed: to nobody, when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _collected_here():
    yield
    gc.collect()


class Net(nnx.Module):
    def __init__(self, features, seed):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List(
            [nnx.Linear(3, features, rngs=rngs), nnx.Linear(features, 2, rngs=rngs)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def modules(features=4, seed=0):
    net = Net(features, seed)
    return {"model": net, "optimizer": nnx.Optimizer(net, optax.adagrad(0.1), wrt=nnx.Param)}


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(tree, nnx.Param))]


def test_a_restored_network_goes_on_as_the_saved_one(tmp_path):
    saved, restored = modules(seed=0), modules(seed=1)
    x = np.ones((5, 3), np.float32)
    saved["model"].dropout(x)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, saved, {"note": [1.5, "x"]})
        assert checkpoints.latest() == 3
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.notes(3) == {"note": [1.5, "x"]}
        checkpoints.restore(3, restored)
    for a, b in zip(leaves(saved), leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(saved["model"].dropout(x), restored["model"].dropout(x))


def test_the_newest_ones_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, modules(), {})
        assert checkpoints.latest() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_another_shape_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, modules(4), {})
        with pytest.raises(
            ValueError, match=r"layers.0.bias it holds float32\[4\], .* float32\[5\]"
        ):
            checkpoints.restore(1, modules(5))


def test_a_variable_too_few_or_too_many_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        whole = modules()
        checkpoints.save(1, {"model": whole["model"]}, {})
        with pytest.raises(ValueError, match=r"optimizer\..* it holds nothing"):
            checkpoints.restore(1, whole)
        checkpoints.save(2, whole, {})
        with pytest.raises(ValueError, match=r"optimizer\..* this one needs nothing"):
            checkpoints.restore(2, {"model": whole["model"]})


def test_another_option_is_named(tmp_path):
    folder = tmp_path / "run"
    check_options(folder, {"density_bound": 0.1})
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, modules(), {"options": {"density_bound": 0.1, "seed": 0}})
    check_options(folder, {"density_bound": 0.1, "seed": 0})
    with pytest.raises(ValueError, match=r"--density-bound does not fit: it is 0.2 now.*with 0.1"):
        check_options(folder, {"density_bound": 0.2, "seed": 0})
    with pytest.raises(ValueError, match=r"--momentum does not fit: it is 0.9 now.*with None"):
        check_options(folder, {"density_bound": 0.1, "seed": 0, "momentum": 0.9})
    remove_checkpoints(folder)
    check_options(folder, {"density_bound": 0.2})


DAMAGES = {
    "truncated": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "missing": lambda file, _: file.unlink(),
    "flipped": lambda file, content: file.write_bytes(
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_or_does_no_harm(tmp_path, damage):
    """Every file of a checkpoint in turn; the largest holds an array, whose bytes Orbax does not check."""
    saved, restored = modules(4000, seed=0), modules(4000, seed=1)
    before = nnx.clone(restored)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, saved, {"rows": [1]})
        files = [path for path in checkpoints.path(7).rglob("*") if path.is_file()]
        found = []
        for file in files:
            content = file.read_bytes()
            DAMAGES[damage](file, content)
            nnx.update(restored, nnx.state(before))
            said = ""
            try:
                checkpoints.restore(7, restored)
            except CheckpointError as error:
                said = str(error)
                found.append(file)
            assert not said or said.startswith(f"the checkpoint {tmp_path / '7'} cannot be read (")
            for a, b in zip(leaves(restored), leaves(before if said else saved), strict=True):
                np.testing.assert_array_equal(a, b)
            file.write_bytes(content)
    assert max(files, key=lambda file: file.stat().st_size) in found
    assert tmp_path / "7" / "notes" / "metadata" in found


def test_the_newest_that_can_be_read_is_used_and_newer_ones_are_written_again(tmp_path):
    numbered = {number: modules(seed=number) for number in (1, 2, 3)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number, saved in numbered.items():
            checkpoints.save(number, saved, {"rows": [number]})
    (tmp_path / "3" / "notes" / "metadata").unlink()
    (tmp_path / "2" / "arrays" / "manifest.ocdbt").write_bytes(b"")
    restored, said = modules(seed=9), []
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_notes() == (2, {"rows": [2]})
        assert checkpoints.restore_newest(restored, said.append) == 1
        for a, b in zip(leaves(restored), leaves(numbered[1]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [line.partition(" cannot be read (")[0] for line in said] == [
            f"the checkpoint {tmp_path / number}" for number in ("3", "2")
        ]
        assert all(line.endswith(f"; goes on from {tmp_path / '1'}") for line in said)
        checkpoints.save(2, restored, {"rows": [1]})
        assert checkpoints.numbers() == [2, 1]


def test_where_none_can_be_read_all_are_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, modules(), {"options": {}})
            (tmp_path / f"{number}" / "notes" / "metadata").write_text("{}")
        expected = rf"{tmp_path}/2 .*{tmp_path}/1 .*anew without --resume"
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.restore_newest(modules(), print)
    with pytest.raises(CheckpointError, match=expected):
        check_options(tmp_path, {"seed": 1})


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    left = tmp_path / "8.orbax-checkpoint-tmp" / "arrays.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "_METADATA").write_text("{")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def files_of_at_most(size):
    """Longer ones cannot be written, which the system reports as it does a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_room_the_last_checkpoint_is_named_and_nothing_is_left(tmp_path):
    first, second = modules(4000, seed=1), modules(4000, seed=2)
    with Checkpoints(tmp_path) as checkpoints:
        with files_of_at_most(50_000), pytest.raises(CheckpointError) as none:
            checkpoints.save(1, first, {})
        checkpoints.save(1, first, {})
        with files_of_at_most(50_000), pytest.raises(CheckpointError) as one:
            checkpoints.save(2, second, {})
        assert list(tmp_path.iterdir()) == [tmp_path / "1"]
        checkpoints.save(2, second, {})
        checkpoints.restore(2, first)
    assert f"{tmp_path / '1'} cannot be written (File too large). There is none before" in str(
        none.value
    )
    assert f"{tmp_path / '2'} cannot be written (File too large)" in str(one.value)
    assert f"The last one is {tmp_path / '1'}" in str(one.value)
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_number_that_is_not_above_the_newest_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, modules(), {})
        with pytest.raises(ValueError, match="number must be above 5, the newest one's, got 4"):
            checkpoints.save(4, modules(), {})
