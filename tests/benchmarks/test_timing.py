"""Side-by-side timing: who is called when, and what is made of the seconds."""

import math
import time

import pytest

from benchmarks import timing
from benchmarks.timing import Timings, exponent, show, side_by_side


def recorded(log, name, seconds=0.0):
    def call():
        log.append(name)
        time.sleep(seconds)

    return call


def test_candidates_are_called_in_turn():
    log = []
    candidates = {name: recorded(log, name) for name in "abc"}
    timings = side_by_side(candidates, budget=10.0, rounds=5, pause=0.0)
    assert "".join(log[-15:]) == "abc" * 5
    assert all(len(timings.seconds(name)) == 5 for name in "abc")


def test_a_slow_candidate_takes_part_in_a_few_rounds_all_over_the_run():
    log = []
    candidates = {"fast": recorded(log, "fast"), "slow": recorded(log, "slow", 0.02)}
    timings = side_by_side(candidates, budget=0.07, rounds=10, pause=0.0)
    slow = list(timings.calls["slow"])
    assert len(timings.seconds("fast")) == 10
    assert 2 <= len(slow) <= 3
    assert slow[0] == 0
    assert slow[-1] >= 4
    assert timings.ratio("slow", "fast") > 2


def test_a_call_beyond_the_budget_is_warmed_up_once_and_timed_twice():
    log = []
    timings = side_by_side({"a": recorded(log, "a", 0.01)}, budget=0.001, pause=0.0)
    assert len(log) == 3
    assert len(timings.seconds("a")) == 2


def test_ratios_compare_within_a_stretch_of_the_run():
    """The machine slows down to half in the middle: medians of the whole run would say 1.5."""
    fast = {0: 1.0, 1: 1.0, 2: 9.0, 3: 2.0, 4: 2.0, 5: 2.0}
    timings = Timings({"fast": fast, "slow": {0: 10.0, 3: 20.0}})
    assert timings.ratios("slow", "fast") == [10.0, 10.0]
    assert timings.ratios("fast", "slow") == [0.1, 0.1]
    assert timings.ratio("slow", "fast") == 10.0
    assert timings.median("fast") == 2.0
    assert timings.record("slow") == {
        "median_s": 15.0,
        "min_s": 10.0,
        "max_s": 20.0,
        "calls_s": [10.0, 20.0],
    }


def test_exponent():
    entries = [64**2, 128**2, 256**2]
    assert math.isclose(exponent(entries, [3e-9 * n**1.2 for n in entries]), 1.2)


def test_provenance_says_what_ran():
    record = timing.provenance("benchmarks", ["--rows", "r64 8->8"])
    assert record["command"] == "python -m benchmarks --rows 'r64 8->8'"
    assert record["versions"]["jax"]
    assert record["commit"]
    assert record["machine"] in timing.headline(record)
    reference = timing.headline(record | {"backend": "reference"})
    assert "reference" in reference


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.988, "4.99 s"), (0.0673, "67.3 ms"), (0.00123, "1.23 ms"), (5e-5, "50.0 µs")],
)
def test_show(seconds, shown):
    assert show(seconds) == shown
