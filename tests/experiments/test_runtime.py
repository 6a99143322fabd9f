"""The runtime experiment, run for real on small grids."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import runtime
from experiments.data.point_sets import make_point_sets
from experiments.data.sets import load_dataset

OPTIONS = ["--filter-densities", "0.2", "1", "--against", "xla", "--budget", "0.01"]


def asked(*arguments):
    return runtime._parser().parse_args(arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runtime")
    files = ["--out", str(out), "--report", str(out / "results")]
    rows = runtime.main([*OPTIONS, "--resolutions", "16", *files])
    return rows, out


def test_a_row_for_each_line(finished):
    rows, _ = finished
    lines = {("ilajax", density, cut) for density in (0.2, 1.0) for cut in (True, False)}
    lines |= {("XLA dense", None, None)}
    assert {(row["network"], row["rho_f"], row["cut"]) for row in rows} == lines
    assert len(rows) == len(lines)
    assert all(row["median_s"] > 0 and row["calls"] >= 2 for row in rows)


def test_the_selection_cuts_where_it_says(finished):
    rows, _ = finished
    sparse = [row for row in rows if row["network"] == "ilajax"]
    assert all(row["input_entries"] == row["resolution"] ** 2 for row in sparse)
    assert all((row["responses_max"] > row["input_entries"]) == row["cut"] for row in sparse)
    assert all(row["times XLA dense"] > 0 for row in sparse)


def test_what_is_written(finished):
    rows, out = finished
    with (out / "uniform.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table] == [row["network"] for row in rows]
    assert json.loads((out / "uniform.json").read_text())["rows"] == rows
    assert (out / "uniform.png").read_bytes().startswith(b"\x89PNG")
    for suffix in (".csv", ".json", ".png"):
        report = (out / "results" / f"runtime{suffix}").read_bytes()
        assert report == (out / f"uniform{suffix}").read_bytes()


def test_a_resumed_run_keeps_what_is_there(finished):
    before, out = finished
    more = [*OPTIONS, "--out", str(out), "--resume"]
    rows = runtime.main([*more, "--resolutions", "8", "16"])
    assert rows[: len(before)] == before
    assert {row["resolution"] for row in rows[len(before) :]} == {8}
    with pytest.raises(SystemExit):
        runtime.main([*more, "--seed", "1"])


def test_a_thin_surface():
    x = runtime.features(16, asked("--data", "shell"), None).validate()
    assert x.capacity == 256
    assert 0.75 < x.counts[0, 0] / 256 <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "kicad"], "kicad needs --data-dir DIR, a folder with train.npz"),
        (["--data", "modelnet40"], "modelnet40 needs --data-dir DIR, a folder with CLASS"),
        (["--data", "shell", "--data-dir", "x"], "shell is made on the spot"),
    ],
)
def test_a_folder_where_one_is_needed(tmp_path, capsys, arguments, expected):
    """Catches a folder that is not looked at, and one that is missed after minutes."""
    with pytest.raises(SystemExit):
        runtime.main([*arguments, "--out", str(tmp_path)])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("data", ["shapes", "kicad"])
def test_a_name_is_the_same_data_as_elsewhere(tmp_path, data):
    """Catches a name that stands for other data than in another experiment."""
    folder = None if data == "shapes" else tmp_path
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", **vars(make_point_sets(5, 100, seed=0)))
    want = load_dataset(data, folder, resolution=16).training
    named = ["--data", data, "--seed", "2", "--resolutions", "8", "16"]
    options = asked(*named, *(["--data-dir", str(folder)] if folder else []))
    number = np.random.default_rng(2).choice(len(want), 1)
    for resolution in (8, 16):
        x = runtime.features(resolution, options, runtime.training_set(options)).validate()
        batch = dataclasses.replace(want, resolution=resolution).batch(number, epoch=0)
        np.testing.assert_array_equal(x.keys, batch.inputs.keys[..., : x.capacity])
        assert x.capacity == batch.inputs.counts[0, 0]


def test_a_mesh_has_a_slot_for_each_voxel(tmp_path):
    """Catches slots that nothing lies in, which the sparse convolution would be timed with."""
    pytest.importorskip("trimesh")
    for part in ("train", "test"):
        folder = tmp_path / "plate" / part
        folder.mkdir(parents=True)
        (folder / "plate_0001.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    options = asked("--data", "modelnet40", "--data-dir", str(tmp_path))
    x = runtime.features(16, options, runtime.training_set(options)).validate()
    # The triangle meets the voxels below its diagonal, and on it those that it touches.
    assert x.capacity == x.counts[0, 0]
    assert 16 * 15 / 2 < x.capacity <= 16 * 17 / 2 + 15
    assert float(x.values.min()) == float(x.values.max()) == 1


def test_an_earlier_table_outlives_data_that_do_not_fit(tmp_path, capsys):
    """Catches a table that is emptied before its data are read, and rows of two data sets in one table."""
    table, out = tmp_path / "kicad.csv", ["--out", str(tmp_path), "--data", "kicad"]
    table.write_text("measured before")
    with pytest.raises(SystemExit):
        runtime.main([*out, "--data-dir", str(tmp_path)])
    assert "train.npz. Give an .npz file" in capsys.readouterr().err
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", **vars(make_point_sets(5, 100, seed=0)))
    options = asked(*out, "--data-dir", str(tmp_path))
    before = {name: getattr(options, name) for name in runtime.FIXED} | {"fingerprint": "other"}
    (tmp_path / "kicad.json").write_text(json.dumps({"options": before, "rows": []}))
    with pytest.raises(SystemExit):
        runtime.main([*out, "--data-dir", str(tmp_path), "--resume"])
    assert "was made with" in capsys.readouterr().err
    assert table.read_text() == "measured before"


def test_exponents_are_of_large_grids_only():
    def row(resolution, seconds):
        named = {"network": "ilajax", "rho_f": 1.0, "cut": True, "resolution": resolution}
        return named | {"input_entries": resolution**2, "median_s": seconds}

    rows = [row(16, 1.0), row(64, 1.0), row(128, 4.0), row(256, 16.0)]
    (entry,) = runtime.exponents(rows)
    assert entry["exponent"] == pytest.approx(1.0)
