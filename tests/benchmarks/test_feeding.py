"""The measurement of the loader, run for real on a few clouds."""

import json
import re

import numpy as np
import pytest

from experiments.data.point_sets import make_point_sets

pytest.importorskip("grain")  # a machine with a GPU may have none
feeding = pytest.importorskip("benchmarks.feeding")

SMALL = ["--shapes", "16", "--batch-size", "4", "--batches", "10", "--resolution", "16"]


def test_it_trains_and_says_what_it_saw(tmp_path, capsys):
    """Catches a step that compiles for each batch, and workers whose memory is not seen."""
    record = feeding.main([*SMALL, "--report", str(tmp_path)])
    assert record["compilations"] == 1
    assert 0 < record["waiting_share"] < 1
    assert record["voxels_cut"] == 0
    assert [at["batches"] for at in record["memory"]] == list(range(1, 11))
    for at in record["memory"]:
        assert len(at["workers"]) == 2
        assert min(at["parent"], *at["workers"]) > 50e6
    assert "compilations of the step" in capsys.readouterr().out
    stem = tmp_path / "feeding-shapes-16-b4"
    stored = json.loads(stem.with_suffix(".json").read_text())
    assert stored["waiting_share"] == record["waiting_share"]
    table = stem.with_suffix(".md").read_text()
    assert "| compilations of the step | 1 |" in table
    assert "Data: shapes, 16 samples, 1,536 slots each" in table


def test_without_a_step(tmp_path):
    """Catches a file that is not read, and cut voxels that are not summed."""
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", **vars(make_point_sets(9, 100, seed=0)))
    more = ["--no-step", "--workers", "0", "--data", "kicad", "--data-dir", str(tmp_path)]
    more += ["--report", str(tmp_path / "report")]
    record = feeding.main([*SMALL, *more, "--capacity", "20"])
    assert (record["samples"], record["capacity"]) == (9, 20)
    assert record["voxels_cut"] > 1000
    assert record["compilations"] is record["waiting_share"] is None
    assert record["memory"][-1]["workers"] == []
    # Another name than that of the run with a step, or of other data.
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == [f"feeding-kicad-16-b4-no-step.{suffix}" for suffix in ("json", "md")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "kicad"], "--data kicad needs --data-dir"),
        (["--data", "kicad", "--data-dir", "nowhere"], "no file .*train.npz"),
        (["--shapes", "3"], "--batch-size 8 is more than 3 samples"),
        (["--resolution", "24"], "invalid choice: 24"),
        (["--workers", "-1"], "at least 0"),
        (["--batches", "1"], "a whole number of at least 2"),
        (["--skip-broken"], "--skip-broken are for --data modelnet40, but --data is shapes"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, expected):
    """Catches a wrong argument that shows after the workers have started."""
    with pytest.raises(SystemExit):
        feeding.main(arguments)
    assert re.search(expected, capsys.readouterr().err)
