"""The measurement of the loader, run for real on a few clouds."""

import json
import re

import numpy as np
import pytest

from experiments.data.point_sets import make_point_sets

pytest.importorskip("grain")  # a machine with a GPU may have none
feeding = pytest.importorskip("experiments.feeding")

SMALL = ["--clouds", "16", "--batch-size", "4", "--batches", "10", "--out"]


def test_it_trains_and_says_what_it_saw(tmp_path, capsys, monkeypatch):
    """Catches a step that compiles for each batch, and workers whose memory is not seen."""
    monkeypatch.setattr(feeding, "RESOLUTION", 16)
    monkeypatch.setattr(feeding, "BOUNDS", (0.08, 0.24))
    record = feeding.main([*SMALL, str(tmp_path / "out"), "--report", str(tmp_path / "report")])
    assert record["compilations"] == 1
    assert 0 < record["waiting_share"] < 1
    assert record["voxels_cut"] == 0
    assert [at["batches"] for at in record["memory"]] == list(range(1, 11))
    for at in record["memory"]:
        assert len(at["workers"]) == 2
        assert min(at["parent"], *at["workers"]) > 50e6
    assert "compilations of the step" in capsys.readouterr().out
    for folder in ("out", "report"):
        stored = json.loads((tmp_path / folder / "feeding.json").read_text())
        assert stored["waiting_share"] == record["waiting_share"]
        assert "| compilations of the step | 1 |" in (tmp_path / folder / "feeding.md").read_text()


def test_without_a_step(tmp_path):
    """Catches a file that is not read, and cut voxels that are not summed."""
    np.savez(tmp_path / "train.npz", **vars(make_point_sets(9, 100, seed=0)))
    more = ["--no-step", "--workers", "0", "--data-dir", str(tmp_path), "--capacity", "20"]
    record = feeding.main([*SMALL, str(tmp_path), *more])
    assert record["clouds"] == 9
    assert record["voxels_cut"] > 1000
    assert record["compilations"] is record["waiting_share"] is None
    assert record["memory"][-1]["workers"] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data-dir", "nowhere"], "no file .*train.npz"),
        (["--clouds", "3"], "--batch-size 8 is more than 3 clouds"),
        (["--workers", "-1"], "at least 0"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, expected):
    """Catches a wrong argument that shows after the workers have started."""
    with pytest.raises(SystemExit):
        feeding.main(arguments)
    assert re.search(expected, capsys.readouterr().err)
