"""The classification experiment, run for real on a few made solids in a small grid."""

import csv
import json

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import classification, training

SMALL = ["--resolution", "16", "--train-size", "16", "--test-size", "8", "--batch-size", "8"]
SMALL += ["--epochs", "2", "--budget", "0.01"]
pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both nets after two epochs, and the folder with what the run wrote."""
    out = tmp_path_factory.mktemp("run")
    return classification.main([*SMALL, "--out", str(out), "--report", str(out / "report")]), out


def figures(trained):
    """What the epochs tell, without their times."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in trained.rows]


def test_every_net_has_a_line(finished):
    """Catches a net that is left out, and figures of another run than the line says."""
    trained, out = finished
    named = [("resnet", 0), ("octnet3", 0)]
    assert [tuple(each.setting) for each in trained] == named
    with (out / "classification.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["net"], int(row["seed"])) for row in rows] == named
    last = [each.rows[-1]["test_accuracy"] for each in trained]
    assert [float(row["test_accuracy"]) for row in rows] == last

    record = json.loads((out / "report" / "classification.json").read_text())
    resnet, octnet3 = record["nets"]
    assert [resnet["test_accuracies"], octnet3["test_accuracies"]] == [last[:1], last[1:]]
    weights = 27 * (4 * 8 + 2 * 8 * 8 + 8 * 16 + 2 * 16 * 16) + 3 * (8 + 16)
    assert octnet3["parameters"] == weights + (8**3 * 16 + 1) * 32 + 33 * 8
    text = (out / "report" / "classification.md").read_text()
    for net, accuracy in zip(("resnet", "octnet3"), last, strict=True):
        assert f"| {net} | {accuracy:.2%} | {accuracy:.2%} | " in text
    height, width, _ = imread(out / "report" / "classification.png").shape
    assert width > 2 * height > 800


def test_what_the_bounds_cut_is_measured_in_every_bounded_layer(finished):
    """Catches a layer that is left out, one read from another place, and a bound that is not kept."""
    record = json.loads((finished[1] / "classification.json").read_text())
    resnet, octnet3 = (net["layers"] for net in record["nets"])
    assert [layer["layer"] for layer in resnet] == [f"stages.{n}.0.conv1" for n in range(4)]
    assert [layer["bound"] for layer in resnet] == [0.8, 1, 1, 1]
    assert [layer["layer"] for layer in octnet3] == [
        f"blocks.{block}.conv{conv}" for block in range(2) for conv in (1, 2, 3)
    ]
    for layer in (*resnet, *octnet3):
        assert 0 < layer["kept"] <= layer["density"] * (1 + 1e-5)
        assert layer["kept"] <= layer["bound"] + 1e-3
    # Where nothing can be cut, both sides count the same responses.
    for layer in resnet[1:]:
        assert layer["kept"] == pytest.approx(layer["density"])


def test_a_stopped_run_goes_on_to_the_same_figures(finished, tmp_path, monkeypatch):
    """Catches batches, weights or rates that do not come back, and seeds that change nothing."""
    arguments = [*SMALL, "--out", str(tmp_path), "--nets", "resnet"]
    real, called = training.evaluate, []

    def stopping(*given):
        called.append(given)
        if len(called) == 2:  # in the second epoch, of which there is no checkpoint yet
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        classification.main(arguments)
    first, second = classification.main([*arguments, "--resume", "--seeds", "2"])
    assert len(called) == 2 + 1 + 2
    assert figures(first) == figures(finished[0][0])
    assert [row["train_loss"] for row in first.rows] != [r["train_loss"] for r in second.rows]

    (net,) = json.loads((tmp_path / "classification.json").read_text())["nets"]
    last = [each.rows[-1]["test_accuracy"] for each in (first, second)]
    assert net["test_accuracies"] == last
    assert net["mean"] == pytest.approx(np.mean(last))
    assert net["deviation"] == pytest.approx(np.std(last, ddof=1))
    text = (tmp_path / "classification.md").read_text()
    assert (
        f"| resnet | {net['mean']:.2%} ± {net['deviation']:.2%} | {last[0]:.2%}, {last[1]:.2%} |"
        in text
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("--epochs", "3"), ("--learning-rate", "0.1"), ("--train-size", "24"), ("--capacity", "90")],
)
def test_resume_with_other_options_names_the_option(finished, capsys, option, value):
    """Catches a schedule that changes on the way."""
    with pytest.raises(SystemExit) as caught:
        classification.main([*SMALL, "--out", str(finished[1]), "--resume", option, value])
    assert caught.value.code == 2
    assert f"{option} does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--nets", "unet", "invalid choice"),
        ("--resolution", "24", "invalid choice"),
        ("--data", "kicad", "needs --data-dir"),
        ("--data-dir", "nowhere", "made on the spot"),
        ("--batch-size", "801", "more than the 800 samples"),
        ("--epochs", "0", "at least 1"),
        ("--learning-rate", "0", "above 0"),
        ("--workers", "-1", "at least 0"),
        ("--capacity", "0", "capacity"),
        ("--seed", "4294967296", "in [0, 2**32)"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(tmp_path, capsys, option, value, expected):
    with pytest.raises(SystemExit) as caught:
        classification.main(["--out", str(tmp_path / "out"), option, value])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert expected in error
    assert not (tmp_path / "out").exists()
