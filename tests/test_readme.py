"""What the README promises: its example runs and learns, its commands and links exist."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_pasted():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (loss,) = re.findall(r"loss ([\d.]+), [\d.]+% of the sites responded", run.stdout)
    # Chance is log 2, 0.69.
    assert float(loss) < 0.5


def test_the_commands_are_targets_of_make():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make ([a-z]+)", README, re.MULTILINE)
    assert commands == ["demo", "test", "mnist"]
    assert set(commands) <= set(targets)


def test_links_into_the_repository_lead_somewhere():
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        links = re.findall(r"\]\(([^)#]+)\)", page)
        assert links
        for link in links:
            assert "://" in link or (ROOT / link).exists(), link


def test_the_first_figures_are_those_of_the_demo():
    """Catches a README that still tells the figures of an earlier `python -m experiments.demo --report`."""
    record = json.loads((ROOT / "experiments" / "results" / "demo.json").read_text())
    steps = record["steps"]
    ours = steps["sparse, trained"]["median_s"]
    mean = {
        name: statistics.mean(seed[name] for seed in record["seeds"]) for name in record["seeds"][0]
    }
    figures = [
        f"{ours * 1e3:.0f} ms",
        f"{steps['dense, PyTorch']['ratio']:.1f} times",
        f"{steps['dense, XLA']['ratio']:.0f} times",
        f"{steps['sparse, trained']['temporary_bytes'] / 1e6:,.0f} MB",
        f"{steps['dense, XLA']['temporary_bytes'] / 1e6:,.0f} MB",
        f"{mean['weights_left']:.0%}",
        f"{mean['test_accuracy']:.1%}",
        f"{mean['plain_test_accuracy']:.1%}",
    ]
    shown = README[README.index("## What it is for") : README.index("## Start")]
    assert [figure for figure in figures if figure not in shown] == []


def test_the_results_are_those_of_mnist():
    """Catches a table of an earlier `python -m experiments.mnist --report`."""
    page = (ROOT / "experiments" / "results" / "mnist.md").read_text()
    nets = [line for line in page.splitlines() if re.match(r"\| (dense|[\d.]+ / [\d.]+) \|", line)]
    assert len(nets) > 2
    assert [line for line in nets if line not in README] == []


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_the_speeds_are_those_of_the_benchmark(page):
    """Catches a table of an earlier `python -m benchmarks --report`, or of an earlier count."""
    results = ROOT / "benchmarks" / "results"
    measured = (results / "bench.md").read_text().splitlines()
    counted = (results / "instructions.md").read_text()
    lines = (ROOT / page).read_text().splitlines()
    shown = [line for line in lines if re.match(r"\| (r\d+|step|hidden|Adagrad) .* \|", line)]
    others = [line for line in shown if line not in measured]
    assert len(shown) - len(others) > 5
    # Of a table of counts the row and its first figure: the others are estimates.
    assert [line for line in others if "|".join(line.split("|")[:3]) + "|" not in counted] == []
