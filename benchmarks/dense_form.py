"""When the CPU kernels should take lines in their dense form, and when they do.

    python -m benchmarks.dense_form                    # some minutes
    python -m benchmarks.dense_form --report           # benchmarks/results/dense_form.{json,md}

Convolutions of 3^3 taps that differ in grid, channels, density and live weights are timed in turn three ways,
forward and backward each by itself: without the dense form, with nothing else, and as the cost model has it,
the prices in xla_kernels/lines/dense.h and the dense_percent of xla_kernels/common/tuning.h. A loss is the
time of the model's choice over that of the quicker form. Change the prices, and see whether the losses fall.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ilajax
from benchmarks import RESULTS, timing, workloads
from benchmarks.peers import Layer
from experiments import frame
from ilajax.ffi import plans

# Way -> how plans are tuned. The dense form may cost a percentage of the other form's cost.
WAYS: dict[str, dict[str, int]] = {
    "without": {"dense_percent": 0},
    "dense": {"dense_percent": 10**9},
    "chosen": {},
}


class Case(NamedTuple):
    """A layer from C to C channels.

    Attributes:
      resolution, channels: of the grid, and C.
      sites: "random", others for each channel, or "shell": most of a thin surface, whatever the density.
      density: share of the sites that a channel stores.
      live: share of the weights.
    """

    resolution: int
    channels: int
    sites: str
    density: float
    live: float

    @property
    def name(self) -> str:
        r, c, sites, density, live = self
        return f"{r}^3, {c} -> {c}, {sites} {density:.2g}, {live:.2g} live"


CASES = [
    Case(*case)
    for resolution, channels, densities in (
        (8, 32, (0.1, 0.3, 1.0)),
        (16, 16, (0.05, 0.15, 0.5)),
        (32, 8, (0.05, 0.15, 0.5)),
        (32, 24, (0.05, 0.15)),
    )
    for case in itertools.product((resolution,), (channels,), ("random",), densities, (0.1, 0.3, 1))
] + [
    Case(resolution, channels, "shell", 2 / resolution, live)
    for resolution, channels in ((16, 24), (32, 8), (32, 16))
    for live in (0.03, 0.1, 0.3)
]


def make_layer(case: Case) -> Layer:
    """The layer of a case, on a batch of four."""
    size = (case.resolution,) * 3
    if case.sites == "shell":
        x = workloads.shell(case.resolution, case.channels, batch=4)
    else:
        x = workloads.random_sites(case.resolution, case.channels, batch=4, density=case.density)
    capacity = max(x.capacity, ilajax.capacity(case.density, size))
    kernel = workloads.kernel(case.channels, case.channels, density=case.live)
    return Layer(x, kernel, jnp.zeros(case.channels), capacity, backward=True)


def candidates(layer: Layer) -> dict[tuple[str, str], timing.Candidate]:
    """(direction, way) -> a call."""

    def features(values: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
        kernel = dataclasses.replace(layer.kernel, values=weights)
        return layer.forward(layer.x.with_values(values), kernel, bias).features.values

    operands = (layer.x.values, layer.kernel.values, layer.bias)
    found: dict[tuple[str, str], timing.Candidate] = {}
    for way, tuning in WAYS.items():
        jax.clear_caches()
        with plans.tuned("cpu", **tuning):
            forward = jax.jit(features).lower(*operands).compile()
            values, pull = jax.vjp(features, *operands)
            backward = jax.jit(lambda pull, g: pull(g)).lower(pull, values).compile()
        found["forward", way] = functools.partial(forward, *operands)
        found["backward", way] = functools.partial(backward, pull, values)
    return found


def measure(case: Case, budget: float) -> list[dict[str, Any]]:
    """A record for each direction."""
    timings = timing.side_by_side(candidates(make_layer(case)), budget=budget)
    records = []
    for direction in ("forward", "backward"):
        seconds = {way: timings.median((direction, way)) for way in WAYS}
        loss = seconds["chosen"] / min(seconds["without"], seconds["dense"])
        records.append({"case": case.name, "direction": direction, **seconds, "loss": loss})
    return records


def summary(records: Sequence[dict[str, Any]]) -> str:
    """How much time the choice loses."""
    losses = [record["loss"] for record in records]
    mean = math.exp(sum(map(math.log, losses)) / len(losses))
    return f"loss of the choice: {mean:.3f} in the geometric mean, {max(losses):.2f} at most"


def cells(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A head, and a line for each record."""
    body = [
        (
            f"{record['case']}, {record['direction']}",
            *(timing.show(record[way]) for way in WAYS),
            f"{record['loss']:.2f}",
        )
        for record in records
    ]
    return [("layer", *WAYS, "loss"), *body]


def main(arguments: list[str] | None = None, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Runs the experiment; returns its records."""
    parser = frame.parser("benchmarks.dense_form", __doc__)
    parser.add_argument(
        "--budget", type=frame.positive, default=0.5, metavar="S", help="seconds for each call"
    )
    frame.add_report(parser, "dense_form.{json,md}", RESULTS)
    options = parser.parse_args(arguments)
    provenance = timing.provenance("benchmarks.dense_form", arguments)
    records: list[dict[str, Any]] = []
    with frame.Reporter() as reporter:
        reporter.begin("cases", len(cases), 0)
        for case in cases:
            new = measure(case, options.budget)
            records += new
            for line in cells(new)[1:]:
                reporter.print("{:54} {:>9} {:>9} {:>9} {:>6}".format(*line))
            reporter.step(case.name)
        reporter.print(summary(records))
        if options.report:
            frame.write_json(options.report / "dense_form.json", provenance | {"records": records})
            body = [f"`{provenance['command']}` at commit {provenance['commit']}.", ""]
            body += [f"{timing.headline(provenance)}.", "", f"{summary(records)}.", ""]
            frame.write_section(
                options.report / "dense_form.md",
                "Every layer",
                "\n".join(body + frame.markdown_table(cells(records))),
                title="The dense form of lines, and its cost model",
            )
    return records


if __name__ == "__main__":
    main()
