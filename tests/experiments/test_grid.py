"""The frame of a grid of settings: what experiments that train several nets share."""

import argparse

import numpy as np
import pytest

from experiments import grid


def test_the_interval_is_students():
    """Against the table: t = 2.776 for five pairs."""
    low, high = grid.interval([0.01, 0.02, 0.03, 0.04, 0.05])
    half = 2.776 * np.std([1, 2, 3, 4, 5], ddof=1) / 100 / 5**0.5
    assert (low, high) == pytest.approx((0.03 - half, 0.03 + half), abs=1e-5)
    assert grid.interval([0.02]) is None


def test_seeds_beyond_what_a_seed_can_be():
    """Catches a run that fails at its last net."""
    options = argparse.Namespace(seed=2**32 - 2, seeds=2)
    assert list(grid.seeds(options)) == [2**32 - 2, 2**32 - 1]
    options.seeds = 3
    with pytest.raises(ValueError, match="--seeds 3 from --seed 4294967294"):
        grid.seeds(options)
