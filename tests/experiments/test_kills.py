"""A run that is killed while it writes a checkpoint, for real, ends with the bits of one that is not."""

import json
import random
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import kills
from experiments.checkpoints import Checkpoints


def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Catches what is lost between processes: random state, optimizer slots, marks, the place in the data."""
    monkeypatch.setattr(kills, "DIGITS", 80)
    monkeypatch.setattr(kills, "STEPS", 20)
    # All its processes compile alike, and sooner.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    (trial,) = kills.main(["--trials", "1", "--seed", "5", "--out", str(tmp_path / "out")])
    (kill,) = trial.kills
    assert kill.behind
    assert trial.said == [f"goes on from {kill.behind}"]
    assert trial.difference is None
    written = json.loads((tmp_path / "out" / "kills.json").read_text())
    assert written["trials"][0]["difference"] is None
    assert written["counts"]["killed"] == 1
    page = (tmp_path / "out" / "kills.md").read_text()
    assert "the same bits" in page
    assert "Kills: 1 in 1 trials, " in page


FOLDER = Path("/runs/out/checkpoints/net")
TORN = f"the checkpoint {FOLDER}/10 cannot be read (no); it is now {FOLDER}/torn-10; goes on from {FOLDER}/5"


@pytest.mark.parametrize(
    ("behind", "lines", "said"),
    [
        (10, [f"net: goes on from {FOLDER}/10"], None),
        (10, [TORN, f"net: goes on from {FOLDER}/5"], None),
        (None, [], None),
        (10, [], "it started anew, but there was checkpoint 10"),
        (10, [TORN], "it started anew, but there was checkpoint 10"),
        (10, [f"net: goes on from {FOLDER}/5"], "it went on from 5, but there was checkpoint 10"),
        (
            15,
            [TORN, f"net: goes on from {FOLDER}/5"],
            "it went on from 5, but there was checkpoint 15",
        ),
        (10, ["net: goes on from /elsewhere/10"], "it started anew, but there was checkpoint 10"),
    ],
)
def test_a_run_that_does_not_go_on_is_noticed(behind, lines, said):
    """Catches a --resume that does nothing: the bits are the same."""
    assert kills.wrong_start(behind, ["some line", *lines], FOLDER) == said


def test_a_trial_is_redrawn_until_a_run_was_killed(tmp_path, monkeypatch):
    """Catches a trial that passes because nothing was killed, and one whose --resume did nothing."""
    out = tmp_path / "out"

    def killed(*_, **__):
        out.mkdir()  # that of a run that ended by itself is gone
        return next(ends)

    for lines, said in (
        ([f"net: goes on from {out}/checkpoints/10"], None),
        ([], "it started anew, but there was checkpoint 10"),
    ):
        ends = iter([None, None, kills.Kill(1.0, 10, None)])
        monkeypatch.setattr(kills, "_killed", killed)
        monkeypatch.setattr(kills, "_ended", lambda *_, lines=lines: (0, lines))
        monkeypatch.setattr(kills, "TWICE", 0.0)
        trial = kills._trial(tmp_path, out, random.Random(0), None)
        assert trial.kills == [kills.Kill(1.0, 10, None)]
        assert trial.difference == said
        out.rmdir()


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
