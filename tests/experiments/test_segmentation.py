"""The segmentation experiment, run for real on a few coarse rooms."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from matplotlib.image import imread

from experiments import segmentation, segmentation_score
from experiments.checkpoints import Checkpoints
from experiments.data.scenes import CLASSES
from experiments.training import checkpoint_directory

SMALL = [
    *("--scenes", "4", "--test-scenes", "3", "--batch-size", "2", "--rays", "300"),
    *("--resolution", "32", "--capacity", "256", "--density-bounds", "0.2", "0.5", "1", "1"),
    *("--features", *"44444444"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both nets after two epochs of two steps, and the folder of what the run wrote."""
    out = tmp_path_factory.mktemp("run")
    more = ["--epochs", "2", "--out", str(out), "--report", str(out / "report")]
    return segmentation.main([*SMALL, *more]), out


def weights(out, net):
    with Checkpoints(checkpoint_directory(out, net), read_only=True) as checkpoints:
        number = checkpoints.numbers()[0]
        return {name: np.asarray(v).tobytes() for name, v in checkpoints.arrays(number).items()}


def test_each_net_is_reported_with_its_classes(finished):
    record, out = finished
    assert [net["net"] for net in record["nets"]] == ["submanifold", "dilating"]
    with (out / "report" / "segmentation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["net"] for row in rows] == ["baseline", "submanifold", "dilating"]
    for row, net in zip(rows[1:], record["nets"], strict=True):
        ious = [net[f"iou_{name}"] for name in CLASSES]
        assert net["mean_iou"] == pytest.approx(np.mean([iou for iou in ious if iou is not None]))
        assert float(row["mean_iou"]) == net["mean_iou"] == net["epochs"][-1]["test_mean_iou"]
        seconds = np.cumsum([epoch["seconds"] for epoch in net["epochs"]])
        assert net["seconds"] == pytest.approx(seconds[-1])
        np.testing.assert_allclose([m for m, _ in net["curve"]], seconds / 60)
    assert json.loads((out / "report" / "segmentation.json").read_text())["scenes"]["scenes"] == 3
    text = (out / "report" / "segmentation.md").read_text()
    assert f"| dilating | {record['nets'][1]['mean_iou']:.1%} |" in text
    height, width, _ = imread(out / "report" / "segmentation.png").shape
    assert min(height, width) > 800


def test_the_dilating_net_reaches_sites_of_its_own(finished):
    record, _ = finished
    one, other = (net["epochs"][-1] for net in record["nets"])
    assert other["density_level1"] > 1.5 * one["density_level1"] > 0
    assert record["nets"][0]["parameters"] == record["nets"][1]["parameters"]


def test_a_run_that_was_stopped_in_an_epoch_goes_on_to_the_same_bits(finished, tmp_path, capsys):
    record, out = finished
    stopped = tmp_path / "run"
    more = [*SMALL, "--epochs", "2", "--nets", "submanifold", "--out", str(stopped)]
    segmentation.main([*more, "--checkpoint-every", "1"])
    checkpoints = checkpoint_directory(stopped, "submanifold")
    shutil.rmtree(checkpoints / "4")
    assert (checkpoints / "3").is_dir()  # in the second epoch
    again = segmentation.main([*more, "--resume"])
    assert f"goes on from {checkpoints / '3'}" in capsys.readouterr().out
    assert weights(stopped, "submanifold") == weights(out, "submanifold")
    assert again["nets"][0]["mean_iou"] == record["nets"][0]["mean_iou"]


def test_a_run_keeps_its_plan_when_it_goes_on(tmp_path):
    (tmp_path / "plan.json").write_text('{"submanifold": 7, "dilating": 5}')
    options = segmentation._parser().parse_args([*SMALL, "--out", str(tmp_path), "--resume"])
    plan = segmentation._plan(tmp_path / "plan.json", ["dilating"], None, options, None)
    assert plan["dilating"] == 5


def test_equal_time_gives_the_slower_net_fewer_epochs(monkeypatch, tmp_path):
    options = segmentation._parser().parse_args([*SMALL, "--minutes", "2", "--out", str(tmp_path)])
    training, _ = segmentation._sources(options)

    def timed(calls, **_):
        seconds = {"submanifold": 1.5, "dilating": 4.0}
        return segmentation.timing.Timings({net: {0: seconds[net]} for net in calls})

    monkeypatch.setattr(segmentation.timing, "side_by_side", timed)
    with segmentation.frame.Reporter() as reporter:
        path = tmp_path / "plan.json"
        plan = segmentation._plan(path, list(segmentation.NETS), training, options, reporter)
    assert plan == {"submanifold": 40, "dilating": 15}  # two steps an epoch
    assert json.loads(path.read_text()) == plan


@pytest.mark.parametrize("option", ["--rays", "--minutes", "--batch-size", "--epochs", "--seed"])
def test_resume_with_other_options_names_the_option(finished, capsys, option):
    _, out = finished
    given = [*SMALL, "--epochs", "2", "--out", str(out), "--resume", option, "3"]
    with pytest.raises(SystemExit) as caught:
        segmentation.main(given)
    assert caught.value.code == 2
    assert f"{option} does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--batch-size", "201"), "--batch-size 201 is more than the 200 scenes"),
        (("--resolution", "33"), "even number, got 33"),
        (("--density-bounds", "0.1", "0.1", "0.1", "1.5"), "in (0, 1]"),
        (("--density-bounds", "0.1"), "expected 4 arguments"),
        (("--test-scenes", "1"), "--test-scenes must be at least 2"),
        (("--minutes", "0"), "above 0"),
        (("--workers", "-1"), "at least 0"),
        (("--nets", "dense"), "invalid choice"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(tmp_path, capsys, given, expected):
    with pytest.raises(SystemExit) as caught:
        segmentation.main(["--out", str(tmp_path / "out"), *given])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_iou_is_what_a_loop_over_points_counts():
    rng = np.random.default_rng(0)
    classes = len(CLASSES)
    labels = rng.integers(-1, classes - 1, (3, 50)).astype(np.int32)  # the last class is in none
    logits = rng.normal(size=(3, 50, classes)).astype(np.float32)
    logits[..., -1] = -9  # and found in none
    model = nnx.Dict()

    def fixed(model, inputs, labels):
        return segmentation_score.test_step.__wrapped__(
            lambda x: x, inputs, labels, to_input=lambda x: x
        )

    row = segmentation_score.test_row(
        lambda inputs, labels: fixed(model, inputs, labels), logits, labels, batch=2
    )
    found = logits.argmax(axis=-1)
    expected = []
    for name, c in zip(CLASSES, range(classes), strict=True):
        both = either = 0
        for label, told in zip(labels.ravel(), found.ravel(), strict=True):
            if label >= 0:
                both += label == c == told
                either += c in (label, told)
        if not either:
            assert row[f"iou_{name}"] is None
            continue
        expected.append(both / either)
        assert row[f"iou_{name}"] == pytest.approx(both / either)
    assert len(expected) == classes - 1
    assert row["test_mean_iou"] == pytest.approx(np.mean(expected))
    counts = labels >= 0
    assert row["test_accuracy"] == pytest.approx((found == labels)[counts].mean())
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[counts], labels[counts])
    assert row["test_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_padding_does_not_count_in_training():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 30, 8)), rng.integers(0, 8, (2, 30))
    labels[1, 10:] = -1
    loss, share = segmentation_score.score_points(jnp.asarray(logits), jnp.asarray(labels))
    other = np.where((labels >= 0)[..., None], logits, 7.0)
    again, _ = segmentation_score.score_points(jnp.asarray(other), jnp.asarray(labels))
    counts = labels >= 0
    one = optax.softmax_cross_entropy_with_integer_labels(logits[counts], labels[counts])
    assert float(loss) == pytest.approx(float(one.mean()), rel=1e-5)
    assert float(loss) == float(again)
    assert float(share) == pytest.approx((logits.argmax(-1) == labels)[counts].mean())


def test_points_of_a_scene_do_not_see_the_others_of_the_batch():
    """Logits of a scene do not depend on its row, and those of padding are 0."""
    options = segmentation._parser().parse_args(SMALL)
    model = segmentation.make_net("submanifold", options)
    model.eval()
    training, _ = segmentation._sources(options)
    run = nnx.jit(lambda model, clouds: model(clouds))
    logits = [
        np.asarray(run(model, training.batch(np.array(c), 1).inputs)) for c in ([0, 1], [1, 0])
    ]
    np.testing.assert_allclose(logits[0], logits[1][::-1], rtol=1e-4, atol=1e-5)
    present = training.batch(np.array([0, 1]), 1).inputs.present
    assert (logits[0][present] != 0).any(axis=-1).mean() > 0.9  # few have no channel above 0
    assert not logits[0][~present].any()


def test_the_baseline_knows_floors_but_not_furniture():
    options = segmentation._parser().parse_args(["--rays", "2000"])
    ious = segmentation_score.class_ious(
        segmentation_score.baseline(*segmentation._sources(options), most=12)
    )
    named = dict(zip(CLASSES, ious, strict=True))
    assert named["floor"] > 0.85
    assert named["chair"] < 0.5
    assert jax.numpy.isfinite(ious).all()
