"""Checkpoints give back every variable, and refuse another network's."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.checkpoints import Checkpoints, check_options, remove_checkpoints


class Net(nnx.Module):
    def __init__(self, features, seed):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List(
            [nnx.Linear(3, features, rngs=rngs), nnx.Linear(features, 2, rngs=rngs)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def modules(features=4, seed=0):
    net = Net(features, seed)
    return {"model": net, "optimizer": nnx.Optimizer(net, optax.adagrad(0.1), wrt=nnx.Param)}


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(tree, nnx.Param))]


def test_a_restored_network_goes_on_as_the_saved_one(tmp_path):
    saved, restored = modules(seed=0), modules(seed=1)
    x = np.ones((5, 3), np.float32)
    saved["model"].dropout(x)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, saved, {"note": [1.5, "x"]})
        assert checkpoints.latest() == 3
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.notes(3) == {"note": [1.5, "x"]}
        checkpoints.restore(3, restored)
    for a, b in zip(leaves(saved), leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(saved["model"].dropout(x), restored["model"].dropout(x))


def test_the_newest_ones_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, modules(), {})
        assert checkpoints.latest() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_another_shape_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, modules(4), {})
        with pytest.raises(
            ValueError, match=r"layers.0.bias it holds float32\[4\], .* float32\[5\]"
        ):
            checkpoints.restore(1, modules(5))


def test_a_variable_too_few_or_too_many_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        whole = modules()
        checkpoints.save(1, {"model": whole["model"]}, {})
        with pytest.raises(ValueError, match=r"optimizer\..* it holds nothing"):
            checkpoints.restore(1, whole)
        checkpoints.save(2, whole, {})
        with pytest.raises(ValueError, match=r"optimizer\..* this one needs nothing"):
            checkpoints.restore(2, {"model": whole["model"]})


def test_another_option_is_named(tmp_path):
    folder = tmp_path / "run"
    check_options(folder, {"density_bound": 0.1})
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, modules(), {"options": {"density_bound": 0.1, "seed": 0}})
    check_options(folder, {"density_bound": 0.1, "seed": 0})
    with pytest.raises(ValueError, match=r"--density-bound does not fit: it is 0.2 now.*with 0.1"):
        check_options(folder, {"density_bound": 0.2, "seed": 0})
    with pytest.raises(ValueError, match=r"--momentum does not fit: it is 0.9 now.*with None"):
        check_options(folder, {"density_bound": 0.1, "seed": 0, "momentum": 0.9})
    remove_checkpoints(folder)
    check_options(folder, {"density_bound": 0.2})
