"""The runtime experiment, run for real on small grids."""

import csv
import json

import pytest

from experiments import runtime

OPTIONS = ["--filter-densities", "0.2", "1", "--against", "xla", "--budget", "0.01"]


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
    x = runtime.features(16, "shell", seed=0).validate()
    assert x.capacity == 256
    assert 0.75 < x.counts[0, 0] / 256 <= 1


def test_parts_need_their_folder(tmp_path):
    with pytest.raises(SystemExit):
        runtime.main(["--data", "parts", "--out", str(tmp_path)])


def test_exponents_are_of_large_grids_only():
    def row(resolution, seconds):
        named = {"network": "ilajax", "rho_f": 1.0, "cut": True, "resolution": resolution}
        return named | {"input_entries": resolution**2, "median_s": seconds}

    rows = [row(16, 1.0), row(64, 1.0), row(128, 4.0), row(256, 16.0)]
    (entry,) = runtime.exponents(rows)
    assert entry["exponent"] == pytest.approx(1.0)
