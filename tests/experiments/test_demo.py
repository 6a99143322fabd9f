"""The demonstration, run for real on a few solids in a small grid."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import ilajax
from experiments import demo, demo_net
from experiments.data.solids import CLASSES

SMALL = ["--resolution", "16", "--train-size", "16", "--test-size", "8", "--budget", "0.05"]
pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run of three epochs measured, and the folders with what it wrote."""
    out = tmp_path_factory.mktemp("demo")
    report = ["--report", str(out / "report"), "--out", str(out / "run")]
    return demo.main([*SMALL, "--epochs", "3", "--threshold", "0.05", *report]), out


def test_weights_go_and_their_number_adds_up(finished):
    """It would catch a recipe that does not prune, and counts that miss a layer or take dense ones in."""
    record, _ = finished
    initial, left = record["weights"]["initial"], record["weights"]["left"]
    assert initial == 27 * (8 + 2 * 64 + 8 * 16 + 2 * 256)
    assert left[0] == initial  # the first epoch only warns
    assert left[2] <= left[1] < initial
    layers = record["layers"]
    assert [layer["name"] for layer in layers] == [f"conv{n}" for n in range(1, 7)]
    assert sum(layer["weights_before"] for layer in layers) == initial
    assert sum(layer["weights_after"] for layer in layers) == left[-1]


def test_the_twin_is_timed_beside_both(finished):
    """It would catch a step that is left out, and memory that is not read off the compiled programs."""
    record, _ = finished
    names = {"sparse, initial weights", "sparse, trained", "dense, XLA"}
    assert names <= set(record["steps"])
    for name in names:
        step = record["steps"][name]
        assert step["median_s"] > 0
        assert step["temporary_bytes"] > 0
        assert step["result_bytes"] > 0


def test_the_report_says_what_was_measured(finished):
    """It would catch files that are not written, or not copied, and tables without the epochs."""
    record, out = finished
    for folder in (out / "run", out / "report"):
        assert (folder / "demo.png").stat().st_size > 10_000
        assert json.loads((folder / "demo.json").read_text())["weights"] == record["weights"]
        text = (folder / "demo.md").read_text()
        assert "| 3 |" in text
        assert "experiments.demo" in text


def test_plain_keeps_all_weights(tmp_path):
    """It would catch a comparison whose plain net is pruned, and a seeds' table that compares nothing."""
    record = demo.main(
        [*SMALL, "--epochs", "2", "--no-dense", "--plain", "--seeds", "1", "--out", str(tmp_path)]
    )
    assert record["weights"]["left"] == [record["weights"]["initial"]] * 2
    (seed,) = record["seeds"]
    assert seed["plain_test_accuracy"] == record["epochs"][-1]["test_accuracy"]
    assert 0 < seed["weights_left"] < 1
    assert "dense, XLA" not in record["steps"]


def test_a_compiled_construction_draws_the_same_weights():
    """It would catch a draw that differs under jit, so that a seed would mean another net."""
    drawn = demo_net.make_net(jax.random.key(5), resolution=16)
    plain = ilajax.models.OctNet3(
        16, num_classes=len(CLASSES), density_bounds=demo_net.BOUNDS[16], rngs=nnx.Rngs(5)
    )
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(net, nnx.Param)) for net in (drawn, plain)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_too_few_solids_are_refused(tmp_path, capsys):
    """It would catch an epoch without a step, whose mean loss is NaN."""
    with pytest.raises(SystemExit):
        demo.main([*SMALL, "--batch-size", "32", "--out", str(tmp_path)])
    assert "--train-size" in capsys.readouterr().err
