"""The benchmark, run for real on small layers and networks."""

import functools
import json

import jax.numpy as jnp
import pytest

import ilajax
from experiments import bench, ceilings, peers, workloads
from experiments.bench_rows import (
    ROWS,
    layer_row,
    mnist_step,
    parts_rows,
    pruned_row,
    random_layer,
    shared_layer,
    shell_layer,
    solids_step,
    step_row,
)
from experiments.peers import PEERS, Layer, contest, largest_difference

BUDGET = ["--budget", "0.01"]
# Made once, so that each compiles once.
LAYERS = {
    name: functools.cache(make)
    for name, make in {
        "random": lambda: random_layer(8, 2, kernel_density=0.5),
        "disjoint": lambda: random_layer(8, 2, disjoint=True),
        "shell, backward": lambda: shell_layer(12, 2, bound=0.1, backward=True, kernel_density=0.5),
        "shared": lambda: shared_layer(12, support="dilate"),
    }.items()
}


@pytest.mark.parametrize("layer", LAYERS)
def test_xla_computes_the_same(layer):
    calls, differences = contest(LAYERS[layer](), ["XLA dense"])
    assert list(calls) == ["ilajax", "XLA dense"]
    assert differences["XLA dense"] < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", LAYERS)
def test_torch_computes_the_same(layer):
    pytest.importorskip("torch")
    assert contest(LAYERS[layer](), ["PyTorch dense"])[1]["PyTorch dense"] < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("support", ["dilate", "input"])
def test_spconv_computes_the_same(support):
    """On one thread; on several its CPU path returns wrong rows."""
    pytest.importorskip("spconv")
    assert contest(shared_layer(12, support=support), ["spconv"])[1]["spconv"] < 1e-5


@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_that_computes_something_else_is_seen(backward):
    """Also where it is in a gradient alone."""
    x = workloads.shell(12, 2)
    layer, other = (
        Layer(x, workloads.kernel(2, 4, seed=seed), jnp.zeros(4), 100, backward) for seed in (0, 1)
    )
    assert largest_difference(layer, PEERS["XLA dense"](other)) > 0.1
    if backward:
        call, read = PEERS["XLA dense"](layer)
        features, gradient = read(call())
        wrong = peers.Peer(lambda: None, lambda _: (features, 2 * gradient))
        assert largest_difference(layer, wrong) > 0.1


def test_the_bench_measures_and_writes(tmp_path, capsys):
    rows = [
        layer_row("layer", {"XLA dense": 1e9}, LAYERS["random"]),
        layer_row("no bar", {"XLA dense": None}, LAYERS["random"]),
        pruned_row("pruned", 1e-9, lambda density: random_layer(8, 2, kernel_density=density)),
    ]
    limits = ceilings.measure(large=1, matrix=64, rounds=2)
    records = bench.main([*BUDGET, "--report", str(tmp_path)], rows, limits)
    assert [record["row"] for record in records] == ["layer", "no bar", "pruned"]
    assert records[0]["against"]["XLA dense"]["met"] is False
    assert records[1]["against"]["XLA dense"]["met"] is None
    assert records[2]["against"]["rho_f=1"]["met"] is True
    assert records[0]["candidates"]["ilajax"]["median_s"] > 0
    assert records[0]["input_entries"] == 2 * 64
    assert records[2]["rho_f=0.1"]["weights"] < records[2]["rho_f=1"]["weights"]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"] == records
    assert written["ceilings"] == limits
    work = records[2]["work"]
    assert work["rho_f=0.1"]["products"] < work["rho_f=1"]["products"]
    for each in ("ns_per_product", "ns_per_candidate"):
        assert records[0]["work"]["ilajax"]["reached"][each] > 0
    bars, table = (tmp_path / "bench.md").read_text().split(f"## {bench.WORK}")
    assert "| layer |" in bars
    assert "| layer |" in table
    assert "| pruned, rho_f=0.1 |" in table
    output = capsys.readouterr().out
    assert "NOT MET" in output
    assert "1 of 2 bars met" in output


def test_a_row_that_fails_leaves_the_others(tmp_path):
    def broken():
        return ilajax.conv(None, None)

    rows = [layer_row("broken", {}, broken), layer_row("layer", {}, LAYERS["random"])]
    first, second = bench.main(BUDGET, rows)
    assert "TypeError" in first["error"]
    assert second["candidates"]["ilajax"]["median_s"] > 0


def test_rows_are_picked_by_a_part_of_their_names(capsys):
    rows = [layer_row(name, {}, LAYERS["random"]) for name in ("r64 A", "r64 b", "r8")]
    assert [r["row"] for r in bench.main([*BUDGET, "--rows", "4 a", "R8"], rows)] == ["r64 A", "r8"]
    capsys.readouterr()
    assert bench.main(["--list", "--rows", "r64"], rows) == []
    assert capsys.readouterr().out == "r64 A\nr64 b\n"
    with pytest.raises(SystemExit):
        bench.main(["--rows", "none"], rows)


def test_names_are_unique(tmp_path):
    rows = [*ROWS, *parts_rows(tmp_path)]
    assert len({row.name for row in rows}) == len(rows)


def losses(step):
    """Of eight calls, each a step on the same batch."""
    return [float(step()[0][0]) for _ in range(8)]


def test_the_digits_step_learns_as_its_dense_twin_does():
    candidates = step_row("step", 1.0, lambda dense: mnist_step(dense, batch=8)).build().candidates
    assert list(candidates) == ["ilajax", "dense twin"]
    for step in candidates.values():
        first, *others = losses(step)
        assert min(others) < first


@pytest.mark.parametrize("dense", [False, True])
def test_the_solids_step_learns(dense):
    first, *others = losses(solids_step(dense, resolution=16, batch=2))
    assert min(others) < first
