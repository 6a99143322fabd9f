"""The experiment about what comes back, run for real on a few solids, and the methods that it compares."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from matplotlib.image import imread

import ilajax
import samples
from experiments import revival
from experiments.revival import SPARED, BoostedConv, Regrowth

SMALL = ["--train-size", "8", "--test-size", "8", "--batch-size", "8", "--epochs", "4"]
pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods after four epochs, with two seeds each, and the folder of the report."""
    out = tmp_path_factory.mktemp("run")
    how = ["--methods", "pruned", "momentum", "--seeds", "2", "--out", str(out)]
    return revival.main([*SMALL, *how, "--report", str(out / "report")]), out / "report"


def test_the_report_compares_seed_by_seed(finished):
    """Catches a method that is compared with another seed's net, and figures of another epoch."""
    trained, report = finished
    assert [each.setting for each in trained] == [
        (method, seed) for seed in (0, 1) for method in ("pruned", "momentum")
    ]
    record = json.loads((report / "revival.json").read_text())
    pruned, momentum = record["methods"]
    last = {each.setting: each.rows[-1] for each in trained}
    for each in (pruned, momentum):
        rows = [last[each["method"], seed] for seed in (0, 1)]
        assert each["accuracies"] == [row["test_accuracy"] for row in rows]
        left = [row["density_weights"] for row in rows]
        assert each["weights_left"] == pytest.approx(np.mean(left))
    pairs = zip(momentum["accuracies"], pruned["accuracies"], strict=True)
    assert sum(momentum["interval"]) / 2 == pytest.approx(np.mean([a - b for a, b in pairs]))
    assert pruned["interval"] is None
    assert f"| momentum | {momentum['mean']:.1%} | " in (report / "revival.md").read_text()
    assert imread(report / "revival.png").shape[1] > 800


def test_momentum_brings_weights_back(finished):
    """Catches regrowth that the next pruning undoes."""
    left = {each.setting: [row["density_weights"] for row in each.rows] for each in finished[0]}
    for seed in (0, 1):
        assert left["pruned", seed][1] < 0.5  # the first epoch that may prune
        assert left["momentum", seed][-1] > left["pruned", seed][-1]


def test_a_batch_larger_than_the_data_is_refused(tmp_path, capsys):
    """Catches a run that trains on nothing."""
    with pytest.raises(SystemExit):
        revival.main(["--train-size", "8", "--batch-size", "9", "--out", str(tmp_path)])
    assert "--batch-size 9 is more than the 8 samples" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [None, 0], ids=["largest", "drawn"])
def test_regrowth(seed):
    """Catches a choice of small gradients, too many, one in the second half, and one that is not spared."""
    model = ilajax.nn.Conv(4, 10, (5,), density_bound=0.5, rngs=nnx.Rngs(0))
    recipe = ilajax.optim.sparse_training(model, optax.adam(1e-3), threshold=0.1)
    optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
    marks = {
        name: optax.tree.get(optimizer.opt_state, name)["kernel"]
        for name in ("pruned", "warned", "mu")
    }
    marks["pruned"].set_value(jnp.arange(200) >= 100)
    marks["warned"].set_value(jnp.ones(200, bool))
    gradient = np.random.default_rng(1).permutation(200)
    marks["mu"].set_value(jnp.asarray(-gradient, jnp.float32))
    after_epoch = Regrowth(4, seed)
    after_epoch(model, optimizer, 1)
    back = np.flatnonzero(~np.asarray(marks["pruned"][...])[100:]) + 100
    assert len(back) == 10  # a tenth of those left
    largest = 100 + np.argsort(gradient[100:])[-10:]
    assert (set(back) == set(largest)) == (seed is None)
    warned = np.asarray(marks["warned"][...])
    assert not warned[back].any()
    assert warned.sum() == 190
    for epoch in range(3, 1 + SPARED + 1):
        marks["warned"].set_value(jnp.ones(200, bool))
        after_epoch(model, optimizer, epoch)
        assert not marks["pruned"][...][back].any()
        assert (
            np.sum(~np.asarray(marks["pruned"][...])) == 110
        )  # nothing more: it is the second half
        assert bool(marks["warned"][...][back].any()) == (epoch >= 1 + SPARED)


def test_boosting_counts_a_quiet_channel_for_more():
    """Catches a factor that stays in the responses, one for the wrong channel, and one outside training."""
    conv = ilajax.nn.Conv(
        3, 4, (3, 3), density_bound=0.1, select="magnitude", select_by="site", use_bias=False,
        kernel_density=0.9, rngs=nnx.Rngs(0),
    )  # fmt: skip
    ilajax.nn.refill(conv)
    channel = conv.kernel_keys[...] // 27
    conv.kernel.set_value(jnp.where(channel == 2, 1e-2, 1.0) * conv.kernel[...])
    x = samples.tensor(0, 2, 3, (12, 12), capacity=20, density=0.1, shared=True)
    plain, boosted = conv(x), BoostedConv(conv, 30.0)
    boosted.share[...] = jnp.array([0.33, 0.33, 0.01, 0.33])
    found = boosted(x)
    everywhere = ilajax.conv(x, conv.sparse_kernel, support=found).features
    np.testing.assert_allclose(found.values, everywhere.values, rtol=1e-5, atol=1e-6)

    def share(y):
        squares = jnp.sum(y.values**2, axis=(0, 2))
        return float(squares[2] / squares.sum())

    assert share(found) > share(plain)
    assert float(boosted.share[2]) == pytest.approx(0.99 * 0.01 + 0.01 * share(found), rel=1e-4)
    boosted.eval()
    jax.tree.map(np.testing.assert_array_equal, boosted(x), plain)
