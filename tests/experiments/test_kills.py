"""A run that is killed while it writes a checkpoint, for real, ends with the bits of one that is not."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import kills
from experiments.checkpoints import Checkpoints


def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Catches what is lost between processes: random state, optimizer slots, marks, the place in the data."""
    monkeypatch.setattr(kills, "DIGITS", 80)
    monkeypatch.setattr(kills, "STEPS", 20)
    (trial,) = kills.main(["--trials", "1", "--out", str(tmp_path / "out")])
    assert len(trial.kills) == 1
    assert trial.kills[0].writing or trial.kills[0].behind
    assert trial.difference is None
    written = json.loads((tmp_path / "out" / "kills.json").read_text())
    assert written["trials"][0]["difference"] is None
    assert "the same bits" in (tmp_path / "out" / "kills.md").read_text()


def save(out, values, row, *, number=4):
    with Checkpoints(out / "checkpoints" / "net") as checkpoints:
        checkpoints.save(number, {"w": nnx.Param(jnp.asarray(values))}, {"rows": [row]})
    return out


@pytest.fixture
def reference(tmp_path):
    return save(tmp_path / "reference", [1.0, -0.0], {"loss": 0.5, "seconds": 1.0})


def test_times_may_differ(tmp_path, reference):
    other = save(tmp_path / "other", [1.0, -0.0], {"loss": 0.5, "seconds": 2.0})
    assert kills.difference(reference, other) is None


@pytest.mark.parametrize(
    ("values", "loss", "number", "said"),
    [
        ([1.0, 0.0], 0.5, 4, "w differs"),  # equal as numbers, not as bits
        ([1.0, -0.0], 0.25, 4, "the rows differ"),
        ([1.0, -0.0], 0.5, 3, "the newest checkpoint is 3, not 4"),
    ],
)
def test_a_difference_is_named(tmp_path, reference, values, loss, number, said):
    other = save(tmp_path / "other", values, {"loss": loss, "seconds": 1.0}, number=number)
    assert kills.difference(reference, other) == said


def test_what_a_kill_left_behind_is_named(tmp_path, reference):
    other = save(tmp_path / "other", [1.0, -0.0], {"loss": 0.5, "seconds": 1.0})
    (other / "checkpoints" / "net" / "5.orbax-checkpoint-tmp").mkdir()
    assert kills.difference(reference, other) == "5.orbax-checkpoint-tmp is left"
