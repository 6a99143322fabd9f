"""Checkpoints give back every variable, refuse another network's, and find what is torn."""

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from experiments.checkpoints import (
    CheckpointError,
    Checkpoints,
    check_options,
    remove_checkpoints,
)
from experiments.data.loader import Arrays
from experiments.frame import Reporter
from experiments.training import Run, train

ROOT = Path(__file__).parents[2]

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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(tree, nnx.Param))]


def test_a_restored_network_goes_on_as_the_saved_one(tmp_path):
    saved, restored = modules(seed=0), modules(seed=1)
    x = np.ones((5, 3), np.float32)
    saved["model"].dropout(x)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.numbers() == []
        checkpoints.save(3, saved, {"note": [1.5, "x"]})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.numbers() == [3]
        assert checkpoints.notes(3) == {"note": [1.5, "x"]}
        checkpoints.restore(3, restored)
    for a, b in zip(leaves(saved), leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(saved["model"].dropout(x), restored["model"].dropout(x))


def test_the_newest_ones_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, modules(), {})
        assert checkpoints.numbers() == [3, 2]
    assert names(tmp_path) == ["2", "3"]


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
        assert checkpoints.restore_newest(restored, said.append) == 1
        for a, b in zip(leaves(restored), leaves(numbered[1]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [line.partition(" cannot be read (")[0] for line in said] == [
            f"the checkpoint {tmp_path / number}" for number in ("3", "2")
        ]
        for line, number in zip(said, (3, 2), strict=True):
            aside = tmp_path / f"torn-{number}"
            assert line.endswith(f"; it is now {aside}; goes on from {tmp_path / '1'}")
            assert (aside / "arrays").is_dir()
        checkpoints.save(2, restored, {"rows": [1]})
        assert checkpoints.numbers() == [2, 1]
        # Torn once more, it takes the place of the one before.
        (tmp_path / "2" / "notes" / "metadata").unlink()
        assert checkpoints.restore_newest(restored, said.append) == 1
    assert names(tmp_path) == ["1", "torn-2", "torn-3"]
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()


def _too_many_open_files(monkeypatch):
    """For real, under everything that reads."""
    return limited(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1)


def _raising(error):
    def prepare(monkeypatch):
        def raises(*_, **__):
            raise error

        monkeypatch.setattr(ocp.CheckpointManager, "restore", raises)
        return contextlib.nullcontext()

    return prepare


@pytest.mark.parametrize(
    ("failing", "kind", "said"),
    [
        (_too_many_open_files, OSError, rf"Errno {errno.EMFILE}\] Too many open files: '.*/2'"),
        (_raising(PermissionError(errno.EACCES, "no")), OSError, "Permission denied: '.*/2'"),
        (_raising(ValueError("os_error_code='5'")), OSError, "Input/output error: '.*/2'"),
        (_raising(MemoryError("no room")), MemoryError, "no room"),
        (
            _raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")),
            jax.errors.JaxRuntimeError,
            "RESOURCE_EXHAUSTED",
        ),
    ],
)
def test_what_the_machine_lacks_is_no_torn_checkpoint(tmp_path, monkeypatch, failing, kind, said):
    """Catches a good checkpoint that loses its name, and an older one that is taken in its place."""
    net = modules()
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, net, {})
        with (
            monkeypatch.context() as patched,
            pytest.raises(kind, match=said) as raised,
            failing(patched),
        ):
            checkpoints.restore_newest(net, print)
        assert not isinstance(raised.value, CheckpointError)
        assert checkpoints.restore_newest(net, print) == 2
    assert names(tmp_path) == ["1", "2"]


def test_where_none_can_be_read_all_are_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, modules(), {"options": {}})
            (tmp_path / f"{number}" / "notes" / "metadata").write_text("{}")
        expected = rf"{tmp_path}/2 .*{tmp_path}/1 .*anew without --resume"
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.restore_newest(modules(), print)


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    left = tmp_path / "8.orbax-checkpoint-tmp" / "arrays.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "_METADATA").write_text("{")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.numbers() == []
    assert names(tmp_path) == []


@contextlib.contextmanager
def limited(kind, value):
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, limits)


@contextlib.contextmanager
def files_of_at_most(size):
    """Longer ones cannot be written, which the system reports as it does a full disk."""
    with limited(resource.RLIMIT_FSIZE, size):
        yield


def wait_for_writers(folder):
    """Orbax leaves the other threads of a save that failed at work: in a next run there are none."""
    seen = []
    while seen[-3:] != [files := sorted(folder.rglob("*"))] * 3:
        seen.append(files)
        time.sleep(0.3)


def test_without_room_the_last_checkpoint_is_named_and_the_next_run_starts_clean(tmp_path):
    first, second = modules(4000, seed=1), modules(4000, seed=2)  # arrays of up to 48 kB
    with Checkpoints(tmp_path) as checkpoints:
        with files_of_at_most(20_000), pytest.raises(CheckpointError) as none:
            checkpoints.save(1, first, {})
        checkpoints.save(1, first, {})
        with files_of_at_most(20_000), pytest.raises(CheckpointError) as one:
            checkpoints.save(2, second, {})
    wait_for_writers(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert names(tmp_path) == ["1"]
        checkpoints.save(2, second, {})
        checkpoints.restore(2, first)
    assert f"{tmp_path / '1'} cannot be written (File too large). There is none before" in str(
        none.value
    )
    assert f"{tmp_path / '2'} cannot be written (File too large)" in str(one.value)
    assert f"The last one is {tmp_path / '1'}" in str(one.value)
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


HOLDER = """
import sys, time
from pathlib import Path
from experiments import checkpoints
lock = checkpoints._locked(Path(sys.argv[1]))
print("holds", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    """Another waits for nothing and removes nothing, a reader reads on, and a killed run holds no lock."""
    folder = tmp_path / "net"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, modules(), {"options": {"seed": 0}})
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == b"holds\n"
        being_written = folder / "2.orbax-checkpoint-tmp"
        being_written.mkdir()
        for write in (Checkpoints, remove_checkpoints):
            with pytest.raises(CheckpointError, match=f"another run writes to {folder}. Wait"):
                write(folder)
        check_options(folder, {"seed": 0})
        assert names(folder) == ["1", "2.orbax-checkpoint-tmp"]
        other.send_signal(signal.SIGKILL)
    with Checkpoints(folder):
        assert names(folder) == ["1"]
        with pytest.raises(CheckpointError, match="another run"):
            Checkpoints(folder)
    with Checkpoints(folder, read_only=True), Checkpoints(folder):
        pass


@pytest.mark.parametrize("so_far", [[], [[0.5, 0.5, 0.1, None]]])
def test_fewer_epochs_than_the_checkpoint_has_are_refused(tmp_path, so_far):
    """Catches a report of a run that did not happen; nothing is written."""
    net = modules()
    run = Run(
        name="net",
        model=net["model"],
        optimizer=net["optimizer"],
        to_input=np.asarray,
        directory=tmp_path,
        seed=0,
        options={},
    )
    rows = [{"net": "net", "epoch": epoch} for epoch in range(1, 4 - len(so_far))]
    with Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(9, net, {"options": {}, "rows": rows, "so_far": so_far})
    (tmp_path / "net.csv").write_text("of three epochs")
    images, labels = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
    expected = rf"--epochs 2, but the checkpoint {run.checkpoints}/9 has 3\. Give at least that"
    with pytest.raises(CheckpointError, match=expected), Reporter() as reporter:
        train(
            run,
            Arrays(images, labels),
            (images, labels),
            epochs=2,
            batch_size=2,
            reporter=reporter,
        )
    assert (tmp_path / "net.csv").read_text() == "of three epochs"
