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


def test_a_short_call_wakes_the_cores_before_it_counts():
    calls = {"first": 0.01, "second": 0.001}
    log = []

    def sleepy():
        """Slow after a pause, as a processor is."""
        log.append(time.perf_counter())
        idle = len(log) < 2 or log[-1] - log[-2] > 0.05
        time.sleep(calls["first" if idle else "second"])

    timings = side_by_side({"a": sleepy}, rounds=5, pause=0.06)
    assert len(timings.seconds("a")) == 5
    assert timings.median("a") < calls["first"]


def test_a_long_call_is_made_once(monkeypatch):
    monkeypatch.setattr(timing, "SHORT_SECONDS", 0.005)
    log = []
    side_by_side({"a": recorded(log, "a", 0.01)}, rounds=5, pause=0.001)
    assert len(log) == 2 + 5


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


def test_a_machine_that_is_not_quiet_is_seen():
    even, uneven = dict(enumerate([1.0, 1.1, 1.0, 1.2])), dict(enumerate([1.0, 2.0, 1.0, 2.0]))
    assert Timings({"a": even}).disturbed is None
    assert Timings({"a": even}, others=0.05).disturbed is None
    assert Timings({"a": even}, others=0.5).disturbed == "others took 0.5 cores"
    assert Timings({"a": even, "b": uneven}).disturbed == "b's quartiles are 2x apart"
    assert Timings({"few": {0: 1.0, 1: 9.0}}).disturbed is None


def test_time_of_others(tmp_path, monkeypatch):
    """All but idle, waiting, and this process; None where nothing counts."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 5000 600 7 8 35 0 0\ncpu0 1 1\n")
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(timing.time, "process_time", lambda: 0.5)
    assert timing._others_time(stat) == pytest.approx(2.0 - 0.5)
    for text in ("cpu 0 0 0 0 0 0 0 0 0 0", "cpu", ""):
        stat.write_text(text)
        assert timing._others_time(stat) is None
    assert timing._others_time(tmp_path / "missing") is None


def test_own_work_is_not_that_of_others(monkeypatch):
    """Too short a run tells nothing; of a longer one the count is what the clock moved."""
    assert side_by_side({"a": lambda: None}, rounds=2, pause=0.0).others is None
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(timing, "_others_time", lambda: next(clock))
    others = side_by_side({"a": lambda: time.sleep(0.1)}, rounds=4, pause=0.0).others
    assert 0.5 < others < 1.3


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
