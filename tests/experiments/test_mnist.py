"""The MNIST experiment, run for real on a handful of digits."""

import csv
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

from experiments import mnist
from experiments.activations import activation_bytes, feature_maps
from experiments.data.idx import write_idx
from experiments.data.loader import batches
from experiments.data.mnist import load_mnist

PRUNING = ["--pruning-threshold", "0.02", "--regularisation", "0.01"]
pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """72 digits to train and 20 to test: nine steps of eight."""
    folder = tmp_path_factory.mktemp("digits")
    for part, digits, count in zip(("train", "t10k"), load_mnist(), (72, 20), strict=True):
        write_idx(folder / f"{part}-images-idx3-ubyte", digits.images[:count])
        write_idx(folder / f"{part}-labels-idx1-ubyte", digits.labels[:count])
    return folder


def arguments(digits, out, *more):
    small = ["--batch-size", "8", "--density-bounds", "0.095", "--budget", "0.01"]
    return ["--data-dir", str(digits), "--out", str(out), *small, *PRUNING, *more]


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """The dense and the sparse net of two seeds after two epochs, and the folder with what the run wrote."""
    out = tmp_path_factory.mktemp("run")
    more = ["--epochs", "2", "--seeds", "2", "--report", str(out / "report")]
    return mnist.main(arguments(digits, out, *more)), out


def bits(trained):
    """All variables of a net and its optimizer, as bytes."""
    leaves = jax.tree.leaves(nnx.state({"model": trained.run.model, "opt": trained.run.optimizer}))
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    plain = [jax.random.key_data(v) if key else v for v, key in zip(leaves, is_key, strict=True)]
    return [np.asarray(leaf).tobytes() for leaf in plain]


def test_same_seed_same_bits_and_another_seed_other_bits(finished, digits, tmp_path):
    first, other = (each for each in finished[0] if each.setting.bound)
    (again,) = mnist.main(arguments(digits, tmp_path, "--epochs", "2", "--nets", "sparse"))
    assert bits(first) == bits(again)
    assert bits(first) != bits(other)


def test_pruning_removes_weights_at_the_end_of_the_second_epoch(finished):
    weights = {
        trained.setting: [row["live_weights"] for row in trained.rows] for trained in finished[0]
    }
    for setting, (first, second) in weights.items():
        assert first == 6984
        assert second == 6984 if setting.bound is None else 0 < second < 6984


def test_each_run_has_a_table_of_its_epochs(finished):
    grid, out = finished
    for trained in grid:
        with (out / f"{trained.setting.name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        first = ["net", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
        densities = [f"density_conv{number}" for number in range(1, 7)]
        assert list(rows[0]) == [*first, "live_weights", *densities, "seconds_per_step", "seconds"]
        assert all(value != "" for row in rows for value in row.values())
        for row, kept in zip(rows, trained.rows, strict=True):
            assert float(row["test_accuracy"]) == kept["test_accuracy"]
            assert 0 <= float(row["density_conv3"]) <= 1


def test_the_grid_has_a_line_for_each_run_and_figures_for_each_net(finished):
    grid, out = finished
    with (out / "mnist.csv").open() as file:
        rows = list(csv.DictReader(file))
    nets = ("", "0"), ("0.095", "0"), ("", "1"), ("0.095", "1")
    assert [(row["density_bound"], row["seed"]) for row in rows] == list(nets)
    last = [trained.rows[-1]["test_accuracy"] for trained in grid]
    assert [float(row["test_accuracy"]) for row in rows] == last
    record = json.loads((out / "report" / "mnist.json").read_text())
    dense, sparse = record["nets"]
    for net, accuracies in ((dense, last[::2]), (sparse, last[1::2])):
        assert net["test_accuracies"] == accuracies
        assert net["mean"] == pytest.approx(np.mean(accuracies))
        assert net["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
        assert net["epoch_s"] == 9 * net["step"]["median_s"]
    assert dense["times_dense"] == 1
    assert sparse["activation_bytes"] < dense["activation_bytes"]
    assert [len(run["epochs"]) for run in record["runs"]] == [2] * 4
    text = (out / "report" / "mnist.md").read_text()
    assert f"| 0.095 / 0.19 | {sparse['mean']:.2%} ± {sparse['deviation']:.2%} |" in text
    height, width, _ = imread(out / "report" / "mnist.png").shape
    assert width > 2 * height > 800


def test_a_finished_run_only_reports_when_it_goes_on(finished, digits, tmp_path, capsys):
    out = shutil.copytree(finished[1], tmp_path / "run")  # it writes the tables anew
    more = ["--epochs", "2", "--resume", "--nets", "sparse"]
    again = mnist.main(arguments(digits, out, *more))
    assert len(again[0].rows) == 2
    assert "goes on from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", "4"),
        ("--regularisation", "0"),
        ("--pruning-threshold", "0"),
        ("--learning-rate", "0.1"),
    ],
)
def test_resume_with_other_options_names_the_option(finished, digits, capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        mnist.main(arguments(digits, finished[1], "--epochs", "2", "--resume", option, value))
    assert caught.value.code == 2
    assert f"{option} does not fit" in capsys.readouterr().err


def test_resume_with_other_data_names_the_option(finished, capsys):
    with pytest.raises(SystemExit):
        mnist.main(["--out", str(finished[1]), "--resume", "--batch-size", "8", *PRUNING])
    assert "--data-dir does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--density-bounds", "0", "in (0, 1]"),
        ("--density-bounds", "1.01", "in (0, 1]"),
        ("--density-bounds", "nan", "in (0, 1]"),
        ("--regularisation", "-1", "at least 0"),
        ("--pruning-threshold", "inf", "at least 0"),
        ("--learning-rate", "0", "above 0"),
        ("--epochs", "0", "at least 1"),
        ("--epochs", "1.5", "at least 1"),
        ("--batch-size", "x", "at least 1"),
        ("--seed", "-1", "in [0, 2**32)"),
        ("--nets", "none", "invalid choice"),
        ("--batch-size", "8001", "more than the 8000 digits"),
        ("--data-dir", "nowhere", "looked for train-images"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(tmp_path, capsys, option, value, expected):
    with pytest.raises(SystemExit) as caught:
        mnist.main(["--out", str(tmp_path / "out"), option, value])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert option in error or "digits to train" in error or "folder" in error
    assert not (tmp_path / "out").exists()


def test_both_nets_start_from_the_same_weights():
    dense, sparse = (mnist.make_net(bound, seed=5) for bound in (None, 0.095))
    for a, b in zip(dense.blocks, sparse.blocks, strict=True):
        for name in ("conv1", "conv2", "conv3"):
            kernel = getattr(b, name).sparse_kernel.to_dense()
            np.testing.assert_array_equal(getattr(a, name).kernel[...], kernel)
    np.testing.assert_array_equal(dense.hidden.kernel[...], sparse.hidden.kernel[...])
    np.testing.assert_array_equal(dense.logits.kernel[...], sparse.logits.kernel[...])


def test_bytes_of_activations_are_those_of_the_shapes():
    images = np.zeros((2, 28, 28), np.uint8)
    sparse, dense = (
        nnx.eval_shape(functools.partial(mnist.make_net, bound, seed=0)) for bound in (0.095, None)
    )
    sites = [784] * 3 + [196] * 4
    channels = [8] * 3 + [8] + [16] * 3
    slots = [74] * 3 + [74] + [37] * 3
    values = sum(c * k for c, k in zip(channels, slots, strict=True)) + 100
    assert activation_bytes(sparse, mnist.SparseInput(100)(images)) == 2 * values * 8
    values = sum(c * s for c, s in zip(channels, sites, strict=True)) + 784
    assert activation_bytes(dense, mnist.dense_input(images)) == 2 * values * 4


def test_feature_maps_lead_to_the_logits():
    """Behind the last map stands only what a dense layer does: the maps are those of the forward pass."""
    model = mnist.make_net(None, seed=0)
    model.eval()
    images = mnist.dense_input(load_mnist()[1].images[:4])
    last = feature_maps(model, images)["conv6"]
    logits = model.logits(nnx.relu(model.hidden(last.reshape(4, -1))))
    np.testing.assert_allclose(logits, model(images), rtol=1e-5, atol=1e-5)


def test_every_digit_comes_once_in_an_epoch_in_an_order_of_its_own():
    first, second = (batches(100, 10, seed=1, epoch=epoch) for epoch in (1, 2))
    np.testing.assert_array_equal(np.sort(first.ravel()), np.arange(100))
    assert (first != second).any()
    np.testing.assert_array_equal(first, batches(100, 10, seed=1, epoch=1))
    assert (first != batches(100, 10, seed=2, epoch=1)).any()
    assert batches(105, 10, seed=1, epoch=1).shape == (10, 10)
