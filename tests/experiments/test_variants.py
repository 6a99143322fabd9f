"""Variants of OctNet3 side by side: the experiments on bounds, regularisation and attention, run for real."""

import csv
import json

import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

import ilajax
from experiments import attention, grid, regularisation, resolution, training
from experiments.variants import Variant, over_bound

SMALL = ["--train-size", "16", "--test-size", "8", "--batch-size", "8", "--budget", "0.01"]
pytestmark = pytest.mark.usefixtures("small_nets")


def figures(epochs):
    """What the epochs tell, without their times."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in epochs]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two scales after three epochs, with two seeds each, and the folder with what the run wrote."""
    out = tmp_path_factory.mktemp("run")
    how = ["--scales", "0", "0.3", "--seeds", "2", "--epochs", "3", "--threshold", "0.1"]
    return regularisation.main([*SMALL, *how, "--out", str(out), "--report", str(out / "r")]), out


def test_the_record_tells_of_every_net(finished):
    """Catches figures of another net, a pruned scale 0, and weights that come back."""
    record, out = finished
    plain, scaled = record["variants"]
    with (out / "regularisation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["net"], row["seed"]) for row in rows] == [
        (label, seed) for seed in "01" for label in ("scale 0", "scale 0.3")
    ]
    for each in (plain, scaled):
        shown = [float(row["test_accuracy"]) for row in rows if row["net"] == each["label"]]
        assert each["accuracies"] == shown
        assert each["mean"] == pytest.approx(np.mean(shown))
        for row in (row for rows in each["epochs"] for row in rows):
            assert 0 <= row["over_bound"] <= 1
    all_weights = 27 * (4 * 8 + 2 * 8 * 8 + 8 * 16 + 2 * 16 * 16)
    for plain_rows, rows in zip(plain["epochs"], scaled["epochs"], strict=True):
        assert [row["live_weights"] for row in plain_rows] == [all_weights] * 3
        weights = [row["live_weights"] for row in rows]
        assert weights == sorted(weights, reverse=True)
        assert weights[0] == all_weights > 2 * weights[1]
    written = json.loads((out / "r" / "regularisation.json").read_text())["variants"]
    assert [each["epochs"] for each in written] == [plain["epochs"], scaled["epochs"]]


def test_differences_are_paired_by_seed(finished):
    plain, scaled = finished[0]["variants"]
    pairs = zip(scaled["accuracies"], plain["accuracies"], strict=True)
    differences = [after - before for after, before in pairs]
    assert scaled["difference"] == pytest.approx(np.mean(differences))
    assert scaled["interval"] == pytest.approx(grid.interval(differences))
    assert plain["interval"] is None


def test_the_page_and_the_picture(finished):
    """Catches a speed that is that of another net, and a picture without its panels."""
    record, out = finished
    plain, scaled = record["variants"]
    gain = plain["sparse layers"]["median_s"] / scaled["sparse layers"]["median_s"]
    assert scaled["sparse layers"]["median_s"] < scaled["step"]["median_s"]
    text = (out / "r" / "regularisation.md").read_text()
    (line,) = (
        line for line in text.splitlines() if line.startswith("| scale 0.3 | ") and "x" in line
    )
    assert line.endswith(f"| {gain:.2f}x |")
    height, width, _ = imread(out / "r" / "regularisation.png").shape
    assert width > 1.5 * height > 900


def test_a_stopped_run_goes_on_to_the_same_figures(finished, tmp_path, monkeypatch):
    """Catches a regulariser, or what is watched, that does not come back from the middle of an epoch."""
    how = ["--scales", "0.3", "--epochs", "3", "--threshold", "0.1", "--checkpoint-every", "1"]
    arguments = [*SMALL, *how, "--out", str(tmp_path)]
    real, taken = training._timed_step, []

    def stopping(*given, **options):
        taken.append(given)
        if len(taken) == 4:  # in the second epoch of two steps
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(training, "_timed_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        regularisation.main(arguments)
    (again,) = regularisation.main([*arguments, "--resume"])["variants"]
    assert len(taken) == 3 + 1 + 3
    assert figures(again["epochs"][0]) == figures(finished[0]["variants"][1]["epochs"][0])


def test_what_stands_above_its_bound():
    """Catches a bound that is compared with another layer's density."""
    model = ilajax.models.OctNet3(
        16, num_classes=2, density_bounds=(0.1, 0.3), in_features=4, rngs=nnx.Rngs(0)
    )
    for block, density in zip(model.blocks, (0.2, 0.2), strict=True):
        for conv in (block.conv1, block.conv2, block.conv3):
            conv.density[...] = np.full(conv.out_features, density, np.float32)
    model.blocks[1].conv1.density[0] = 0.4
    assert over_bound(model) == {"over_bound": pytest.approx((3 * 8 + 1) / (3 * 8 + 3 * 16))}


def test_bounds_and_resolutions():
    """Catches a net that is compared with one of another resolution, and bounds that are not the paper's."""
    options = resolution._parser().parse_args(
        ["--resolutions", "16", "64", "--trivial", "16", "--dense", "64"]
    )
    assert [each[:3] for each in resolution._variants(options)] == [
        ("16^3, 1, 1", 16, (1.0, 1.0)),
        ("16^3, 0.06, 0.12", 16, (0.06, 0.12)),
        ("16^3, 0.12, 0.24", 16, (0.12, 0.24)),
        ("16^3, 0.33, 0.33", 16, (0.33, 0.33)),
        ("64^3, 0.06, 0.14, 0.33", 64, (0.06, 0.14, 0.33)),
        ("64^3, dense", 64, ()),
    ]
    options = resolution._parser().parse_args(["--resolutions", "16", "--bounds", "0.33"])
    assert [each.bounds for each in resolution._variants(options)] == [(1, 1), (0.33, 0.33)]


def test_selections_with_and_without_the_bias():
    options = attention._parser().parse_args(
        ["--bounds", "0.6", "--selections", "value", "--scale", "0.2"]
    )
    plain = Variant("value, bound 0.6", 16, (0.6, 1.0), "value")
    biased = plain._replace(label="value, bound 0.6, scale 0.2", scale=0.2)
    assert attention._variants(options) == [plain, biased]


@pytest.mark.parametrize(
    ("experiment", "how", "drawn"),
    [
        (resolution, ["--resolutions", "16", "--trivial", "16"], "16^3, 0.06, 0.12"),
        (attention, ["--bounds", "0.06", "--selections", "magnitude"], "magnitude, bound 0.06"),
    ],
    ids=["resolution", "attention"],
)
def test_the_other_experiments(experiment, how, drawn, tmp_path, monkeypatch):
    """Catches a page without a net, and a picture that cannot be drawn."""
    name = experiment.__name__.rpartition(".")[2]
    made = experiment._variants
    monkeypatch.setattr(experiment, "_variants", lambda options: made(options)[:2])
    record = experiment.main([*SMALL, *how, "--epochs", "1", "--out", str(tmp_path)])
    assert drawn in [each["label"] for each in record["variants"]]
    text = (tmp_path / f"{name}.md").read_text()
    assert f"| {drawn} | " in text
    assert imread(tmp_path / f"{name}.png").shape[1] > 1500
    for layer in record["variants"][1]["layers"]:
        assert layer["kept"] <= layer["bound"] + 1e-3
