"""The benchmark, run for real on small layers and networks."""

import dataclasses
import json

import pytest

import ilajax
from benchmarks import __main__ as benchmarks
from benchmarks import measure, peers, report, rows
from benchmarks.rows import (
    ROWS,
    TORCH,
    Problem,
    Row,
    both,
    layer_row,
    parts_rows,
    pruned_row,
    step_row,
)
from benchmarks.timing import spread
from benchmarks.work import ceilings

BUDGET = ["--budget", "0.01"]
SMALL = Problem(8, 2)
SHARED = Problem(12, 8, sites="shell", subset=None)
BACKWARD = Problem(12, 8, batch=2, sites="shell", bound=0.1, kernel_density=0.5, backward=True)


def cpu(**targets):
    return {"cpu": targets}


def test_the_benchmark_measures_and_writes(tmp_path, capsys):
    rows = [
        layer_row("layer", SMALL, {"cpu": {"XLA dense": 1e9}}),
        layer_row("no target", SMALL, {"cpu": {"XLA dense": None}}),
        pruned_row("pruned", SMALL, 1e-9),
    ]
    limits = ceilings(large=1, matrix=64, rounds=2)
    records = benchmarks.main([*BUDGET, "--report", str(tmp_path)], rows, limits)
    assert [record["row"] for record in records] == ["layer", "no target", "pruned"]
    layer, other, pruned = (record["candidates"] for record in records)
    assert layer["XLA dense"]["met"] is False
    assert other["XLA dense"]["met"] is None
    assert pruned["rho_f=1"]["met"] is True
    assert layer["ilajax"]["median_s"] > 0
    assert layer["ilajax"]["input_entries"] == 2 * 64
    assert pruned["rho_f=0.1"]["weights"] < pruned["rho_f=1"]["weights"]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"] == records
    assert written["ceilings"] == limits
    assert pruned["rho_f=0.1"]["work"]["products"] < pruned["rho_f=1"]["work"]["products"]
    for each in ("ns_per_product", "ns_per_candidate"):
        assert layer["ilajax"]["work"]["reached"][each] > 0
    _, times, work, memory, *_ = (tmp_path / "bench.md").read_text().split("\n## ")
    for table, row in ((times, "layer"), (work, "pruned, rho_f=0.1"), (memory, "layer")):
        assert f"| {row} |" in table
    output = capsys.readouterr().out
    assert "1e+09x NO" in output
    assert "1 of 2 targets met, 0 errors" in output


def test_a_row_that_fails_leaves_the_others(tmp_path):
    def broken():
        return ilajax.conv(None, None)

    rows = [Row("broken", {"ilajax": broken}, cpu()), layer_row("layer", SMALL, cpu())]
    first, second = benchmarks.main([*BUDGET, "--report", str(tmp_path)], rows)
    assert "TypeError" in first["error"]
    assert second["candidates"]["ilajax"]["median_s"] > 0


def test_rows_are_picked_by_device_and_by_a_part_of_their_names(capsys):
    rows = [layer_row(name, SMALL, cpu()) for name in ("r64 A", "r64 b", "r8")]
    rows.append(layer_row("r64 gpu", SMALL, {"gpu": {}}))
    picked = benchmarks.main([*BUDGET, "--rows", "4 a", "R8"], rows)
    assert [record["row"] for record in picked] == ["r64 A", "r8"]
    capsys.readouterr()
    for device, names in (("cpu", "r64 A\nr64 b\n"), ("gpu", "r64 gpu\n")):
        assert benchmarks.main(["--list", "--device", device, "--rows", "r64"], rows) == []
        assert capsys.readouterr().out == names
    for arguments in (["--rows", "none"], ["--device", "gpu"]):
        with pytest.raises(SystemExit):
            benchmarks.main(arguments, rows)


def test_names_are_unique(tmp_path):
    rows = [*ROWS, *parts_rows(tmp_path)]
    assert len({row.name for row in rows}) == len(rows)
    for device in measure.DEVICES:
        chosen = [row for row in rows if device in row.targets]
        batches = measure.tasks(chosen, device, measure.SMALL)
        names = [name for batch in batches.values() for name in batch]
        assert len(set(names)) == len(names)
        assert set(names) == {step.name for row in chosen for step in measure.steps(row, device)}


def test_a_problem_is_what_it_says():
    """On small grids: nothing is cut where nothing should be."""
    uncut = dataclasses.replace(Problem(256, 1).small(), cut=False).layer()
    assert uncut.output.responses.max() <= uncut.capacity
    cut = Problem(256, 1).small().layer()
    assert cut.output.responses.max() > cut.capacity
    small = Problem(64, 8, batch=32, sites="shell", subset=0.75, density=1 / 32, bound=1 / 32)
    layer = small.small().layer()
    assert (layer.x.batch_size, layer.x.capacity, layer.capacity) == (2, 150, 150)
    for seed in (1, 2):
        assert small.small().features(seed).capacity == 150
    shared = SHARED.layer()
    assert shared.capacity == 2 * shared.x.capacity
    assert dataclasses.replace(SHARED, support="input").layer().capacity is None


# --- Times on a GPU, here on the CPU ----------------------------------------------------------------


def sources(row, who):
    """The tasks that measure a candidate."""
    return [step.name for step in measure.steps(row, "gpu") if step.who == who]


def test_tasks_of_a_gpu_make_the_records_of_its_rows():
    """Catches a candidate whose tasks are not found again, and a target held against the wrong one."""
    small = dataclasses.replace(BACKWARD.small(), in_channels=2, out_channels=2)
    targets = {"XLA dense": 1e9, "XLA dense, TF32": 1e-9}
    row = layer_row("layer", small, {"gpu": targets}, gpu=1e-9)
    other = layer_row("other", small, {"gpu": dict.fromkeys(targets)})
    batches = measure.tasks([row, other], "gpu", measure.SMALL)
    assert [len(batch) for batch in batches.values()] == [2, 2, 4, 0]  # dense serves both
    done = {n: measure.attempt(task) for batch in batches.values() for n, task in batch.items()}
    assert not [record for record in done.values() if "error" in record]
    first, second = measure.records([row, other], "gpu", done)
    ours, dense, tf32 = first["candidates"].values()
    assert (ours["met"], dense["met"], tf32["met"]) == (False, False, True)
    assert ours["same_bits"]
    assert ours["launches"] > 0
    assert dense["difference"] < 1e-5
    assert dense["median_s"] == min(done[name]["median_s"] for name in sources(row, "XLA dense"))
    assert second["candidates"]["XLA dense"]["median_s"] == dense["median_s"]
    assert second["candidates"]["XLA dense"]["met"] is None


@pytest.mark.parametrize(
    ("targets", "most", "ours", "dense", "met"),
    [
        ([None], None, 1.0, [9.0], [None, None]),
        ([2], None, None, [9.0], [None, None]),
        ([2, 2], None, 1.0, [2.0, 3.0], [None, True, True]),
        ([2, 2], None, 1.0, [1.9, 3.0], [None, False, True]),
        ([2, 2], None, 1.0, [None, 3.0], [None, None, True]),
        ([2], 0.5, 1.0, [None], [False, None]),
        ([], 5, 1.0, [], [True]),
    ],
)
def test_targets(targets, most, ours, dense, met):
    names = ["XLA dense", "XLA dense, TF32"][: len(targets)]
    most_s = {} if most is None else {"gpu": most}
    row = layer_row("row", SMALL, {"gpu": dict(zip(names, targets, strict=True))}, **most_s)

    def times(seconds):
        return {"error": "wrong"} if seconds is None else spread([seconds])

    done = {"row, ilajax": times(ours)}
    for name, seconds in zip(names, dense, strict=True):
        slow, quick = sources(row, name)
        done |= {quick: times(seconds), slow: spread([99.0]) if seconds else {"error": "x"}}
    (record,) = measure.records([row], "gpu", done)
    assert [one.get("met") for one in record["candidates"].values()] == met
    assert len(report.lines([record])) >= max(1, len(dense))


def test_an_error_is_kept_unless_the_other_layout_was_timed():
    row = layer_row("row", SMALL, {"gpu": {"XLA dense": 2}})
    first, second = sources(row, "XLA dense")
    times = spread([1.0])
    different = times | {"error": "the bits differ"}
    done = {"row, ilajax": different, first: {"error": "out of memory"}, second: times}
    (record,) = measure.records([row], "gpu", done)
    ours, dense = record["candidates"].values()
    assert ours["error"]
    assert "error" not in dense


def losses(step):
    """Of eight calls, each a step on the same batch."""
    return [float(step()[0][0]) for _ in range(8)]


@pytest.mark.parametrize("dense", [False, True])
def test_steps_learn(dense):
    for step in (
        rows.mnist_step(dense, batch=8),
        rows.solids_step(dense, resolution=16, batch=2),
    ):
        first, *others = losses(step)
        assert min(others) < first


# --- Beside PyTorch ---------------------------------------------------------------------------------


def test_what_is_not_installed_is_left_out(monkeypatch):
    """Also where it is a candidate; and a target in seconds holds on a CPU too."""
    monkeypatch.setattr(peers, "installed", lambda name: name != TORCH)
    calls = {"ilajax": lambda: lambda: 1, TORCH: lambda: 1 / 0, "gpu only": lambda: 1 / 0}
    pool = rows.Pool(8, 2, batch=2, sites="near shell", density=0.1)
    chosen = [step_row("step", calls, {TORCH: 1}), *both("pool", pool, {TORCH: 1}, (1e-9, 1e9))]
    step, forward, backward = benchmarks.main(BUDGET, chosen)
    assert list(step["candidates"]) == ["ilajax"]
    assert step["missing"] == forward["missing"] == [TORCH]
    met = [record["candidates"]["ilajax"]["met"] for record in (forward, backward)]
    assert met == [False, True]
    assert chosen[0].targets["gpu"] == {"gpu only": None}


def test_the_table_beside_pytorch_and_what_was_not_quiet():
    def record(row, ours, theirs, **facts):
        candidates = {
            "ilajax": {**spread([ours]), **facts},
            "XLA dense": {**spread([9.0]), "ratio": 9.0},
            "PyTorch gather": {**spread([theirs]), "ratio": theirs / ours},
        }
        return {"row": row, "candidates": candidates, "not_quiet": None}

    records = [
        record("a, forward", 1.0, 2.0, backward=False),
        record("a, f + b", 2.0, 6.0, backward=True) | {"not_quiet": "others took 2 cores"},
        record("step", 2.0, 1.0),
        layer_record("alone"),
    ]
    _, *body = report.against_torch(records)
    assert body == [
        ("a", "1.00 s", "2.00 s", "2.00 s", "6.00 s", "2x", "3x"),
        ("step", "", "2.00 s", "", "1.00 s", "", "0.5x"),
    ]
    assert report.not_quiet(records)[1:] == [("a, f + b", "others took 2 cores")]
    assert "a, f + b: not quiet: others took 2 cores" in report.lines(records)
    page = "\n".join(report.page(records))
    assert "in 1 of 4 rows" in page
    assert "| a | 1.00 s |" in page


def layer_record(row):
    return {"row": row, "candidates": {"ilajax": spread([1.0])}}
