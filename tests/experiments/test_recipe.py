"""The measurements behind docs/recipe.md, run for real on a few solids in a small grid."""

import json
import math

import pytest

from experiments import recipe

VALUES = (0.0, 0.03, 0.15)
SMALL = ["--resolution", "16", "--train-size", "16", "--test-size", "8", "--epochs", "3"]
pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a sweep of three values measured, and the folders with what it wrote."""
    out = tmp_path_factory.mktemp("recipe")
    report = ["--report", str(out / "report"), "--out", str(out / "run")]
    sweep = recipe.SWEEPS["threshold"]._replace(values=VALUES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.SWEEPS, "threshold", sweep)
        return recipe.main([*SMALL, "--sweep", "threshold", *report]), out


def by_value(record):
    return {result["value"]: result for result in record["sweeps"]["threshold"]}


def test_each_net_has_its_own_threshold(finished):
    """It would catch numbers that do not reach the shared step: all nets would be pruned alike."""
    record, _ = finished
    totals = {v: [sum(w) for w in r["weights"]] for v, r in by_value(record).items()}
    initial = 27 * (8 + 2 * 64 + 8 * 16 + 2 * 256)
    assert all(
        counts[:2] == [initial] * 2 for counts in totals.values()
    )  # the first epoch only warns
    assert totals[0.0] == [initial] * 4
    left = [totals[value][2] for value in sorted(totals)]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == len(left)


def test_the_first_pruning_follows_the_rule_of_thumb(finished):
    """It would catch weights counted for another layer, and a rule that docs/recipe.md has wrong."""
    record, _ = finished
    for value, result in by_value(record).items():
        start, _, after = result["weights"][:3]
        layers = list(zip(result["fan_in"], start, after, strict=True))
        for fan_in, before, left in layers[1:]:  # the first has 216 weights, too few for a share
            rule = math.erf(value / (math.sqrt(2 / fan_in) * math.sqrt(2)))
            assert 1 - left / before == pytest.approx(rule, abs=0.06)


def test_the_first_pruning_is_the_largest(finished):
    """It would catch a table that names the wrong epoch, and nets that are pruned a first time late."""
    record, _ = finished
    lines = {line[1]: line for line in recipe.summary_cells(record)[1:]}
    assert lines["0"][6] == "nothing"
    assert lines["0.15"][6].startswith("epoch 2")


def test_the_gradients_are_measured(finished):
    """It would catch squares that are read off the wrong place of the optimizer's state."""
    record, _ = finished
    for result in record["sweeps"]["threshold"]:
        assert len(result["gradient"]) == len(result["fan_in"])
        assert all(0 < gradient < 10 for gradient in result["gradient"])


def test_the_report_says_what_was_measured(finished):
    """It would catch files that are not written, or not copied, and tables that lack a setting."""
    record, out = finished
    for folder in (out / "run", out / "report"):
        assert (folder / "recipe.png").stat().st_size > 10_000
        assert json.loads((folder / "recipe.json").read_text())["sweeps"] == record["sweeps"]
        text = (folder / "recipe.md").read_text()
        assert "experiments.recipe" in text
        for value in VALUES:
            assert f"| threshold | {value:g} |" in text
