"""The U-Net's step and PyTorch's are the same network's."""

import json

import numpy as np
import pytest

from benchmarks import unet

SMALL = (3, 4, 5, 6, 5, 4, 4, 3)


@pytest.fixture(autouse=True)
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("resolution", [16, 21])
def test_both_start_from_the_same_loss(resolution):
    """Catches a layer, a map or a skip that is not the other network's; odd grids too."""
    x = unet.inputs(resolution, 2)
    model, labels = unet.network(resolution, 14, SMALL), unet.labels_of(x)
    other = unet.theirs(model, x, labels)
    losses = [(float(step), other()) for step in (unet.ours(model, x, labels)()[0],)]
    # The coarsest level has a few sites, which a normalisation makes much of.
    np.testing.assert_allclose(*losses[0], rtol=3e-4)


def test_the_report(tmp_path):
    arguments = ["--resolution", "12", "--features", *map(str, SMALL), "--budget", "0.1"]
    record = unet.main([*arguments, "--report", str(tmp_path)])
    assert record["ratio"] > 0
    assert json.loads((tmp_path / "unet.json").read_text())["record"] == json.loads(
        json.dumps(record)
    )
