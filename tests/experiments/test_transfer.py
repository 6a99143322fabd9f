"""The transfer experiment, run for real on a few made solids, and what it tunes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

import ilajax
from experiments import transfer
from experiments.data.point_sets import make_point_sets
from experiments.data.voxels import VoxelSource
from experiments.transfer import SomeClasses

SMALL = ["--train-size", "16", "--test-size", "8", "--batch-size", "8", "--epochs", "2"]
pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All methods after two epochs, with one seed, and the folder with what the run wrote."""
    out = tmp_path_factory.mktemp("run")
    how = ["--threshold", "0.1", "--out", str(out), "--report", str(out / "report")]
    return transfer.main([*SMALL, *how]), out


def test_the_record_tells_of_every_method(finished):
    """Catches a pattern that is not kept, filters that are not refilled, and classes that were seen."""
    record, out = finished
    first, methods = record["first"], record["methods"]
    full = first["unpruned"]["weights"]
    assert first["pruned"]["weights"] < full / 2
    assert [each["weights"] for each in methods.values()] == [
        full,
        full,
        first["pruned"]["weights"],
        full,
    ]
    assert not set(record["halves"]["first"]["classes"]) & set(record["halves"]["other"]["classes"])
    # What starts from a trained net is not what starts anew.
    losses = [each["epochs"][0][0]["train_loss"] for each in methods.values()]
    assert len(set(losses)) == 4 or losses[1] == pytest.approx(losses[2], rel=1e-3)
    assert losses[0] != losses[3]
    written = json.loads((out / "report" / "transfer.json").read_text())
    assert written["methods"] == methods
    text = (out / "report" / "transfer.md").read_text()
    assert f"| refilled | {methods['refilled']['mean']:.1%} | " in text
    assert imread(out / "report" / "transfer.png").shape[1] > 1000


def test_a_tuned_net_is_the_trained_one_but_for_its_last_layer():
    """Catches a copy that changes the trained net, and one that starts anew."""
    model = ilajax.models.OctNet3(
        16, num_classes=3, density_bounds=(0.3, 0.3), kernel_density=0.5, rngs=nnx.Rngs(0)
    )
    model.eval()
    dense = np.random.default_rng(0).normal(size=(2, 16, 16, 16, 1)).clip(0)
    x = ilajax.from_dense(jnp.asarray(dense, jnp.float32), 900)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    hidden = []
    for method in ("kept", "refilled"):
        net = transfer.tuned(model, method, 5, seed=1)
        net.eval()
        assert net(x).shape == (2, 5)
        convs = dict(ilajax.nn.iter_convs(net))
        counts = [int(conv.sparse_kernel.count) for conv in convs.values()]
        sizes = [np.prod(conv.kernel_shape) for conv in convs.values()]
        assert (counts == sizes) == (method == "refilled")
        net.logits = nnx.data(lambda features: features)
        hidden.append(net(x))
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-5, atol=1e-5)
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_some_classes():
    """Catches labels that are those of all classes, and samples of another class."""
    sets = make_point_sets(16, 300, seed=0)
    source = VoxelSource(sets, 8, 300)
    some = SomeClasses(source, sets.label, (1, 3, 5))
    wanted = np.flatnonzero(np.isin(sets.label, (1, 3, 5)))
    assert len(some) == len(wanted)
    batch, whole = some.batch(np.arange(len(some)), 1), source.batch(wanted, 1)
    np.testing.assert_array_equal(batch.labels, [(1, 3, 5).index(n) for n in whole.labels])
    np.testing.assert_array_equal(batch.inputs.keys, whole.inputs.keys)


def test_a_batch_that_half_of_the_classes_do_not_fill(capsys, tmp_path):
    """Catches an epoch without a step."""
    with pytest.raises(SystemExit):
        transfer.main([*SMALL, "--batch-size", "12", "--out", str(tmp_path / "out")])
    assert "--batch-size 12 is more than the 8 samples of half" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
