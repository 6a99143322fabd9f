"""The memory experiment: figures of XLA for small grids, against sums by hand."""

import csv
import json

import jax
import pytest

from experiments import memory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("memory")
    options = ["--resolutions", "16", "8", "--batch-size", "3", "--run", "--out", str(out)]
    options += ["--report", str(out / "results")]
    return memory.main(options), out


def test_the_bound_holds(finished):
    rows, _ = finished
    assert [(row["resolution"], row["backward"]) for row in rows] == [
        *((8, False), (8, True)),
        *((16, False), (16, True)),
    ]
    assert all(row["holds"] for row in rows)


def test_outputs_are_keys_values_counts_and_gradients(finished):
    forward, backward = finished[0][-2:]
    slots = 256  # 16^3 / 16
    assert forward["capacity"] == slots
    assert forward["output_bytes"] == 3 * 8 * slots * (4 + 4) + 3 * 8 * 4
    gradients = 3 * 8 * slots * 4 + 27 * 8 * 8 * 4 + 8 * 4
    assert backward["output_bytes"] == forward["output_bytes"] + gradients
    assert forward["dense_bytes"] == 3 * 16**3 * 8 * 4


def test_the_reference_would_not_hold(monkeypatch):
    """The check can fail: jax.numpy's intermediates do not fit into the bound."""
    monkeypatch.setenv("ILAJAX_BACKEND", "reference")
    jax.clear_caches()
    assert not memory.measure(16, 32, backward=False)["holds"]


def test_what_is_written(finished):
    rows, out = finished
    with (out / "memory.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["workspace_bytes"]) for row in table] == [
        row["workspace_bytes"] for row in rows
    ]
    record = json.loads((out / "memory.json").read_text())
    assert record["rows"] == rows
    page = (out / "memory.md").read_text()
    assert f"| dense, forward | {rows[0]['dense_bytes'] / 1e9:.3g} | " in page
    assert page.count("| sparse, ") == 4
    for file in ("memory.csv", "memory.json", "memory.md"):
        report = (out / "results" / file.replace(".", "-b3.")).read_text()
        assert report == (out / file).read_text()
    run = record["run"]
    assert (run["resolution"], run["batch"]) == (16, 3)
    assert run["peak_bytes"] >= run["before_bytes"] > 0
    assert run["finite"]
    assert 0 < run["output_entries"] <= 3 * 8 * 256
