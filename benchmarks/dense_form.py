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
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import ilajax
from benchmarks import RESULTS, report, timing, workloads
from benchmarks.layers import Layer
from benchmarks.report import Record
from experiments import frame
from ilajax.ffi import plans

# Way -> how plans are tuned. The dense form may cost a percentage of the other form's cost.
WAYS: dict[str, dict[str, int]] = {
    "without": {"dense_percent": 0},
    "dense": {"dense_percent": 10**9},
    "chosen": {},
}


class Case(NamedTuple):
    """A layer from C to C channels."""

    resolution: int
    channels: int
    sites: str  # "random", others for each channel, or "shell": most of a thin surface
    density: float  # share of the sites that a channel stores
    live: float  # share of the weights

    @property
    def name(self) -> str:
        r, c, sites, density, live = self
        return f"{r}^3, {c} -> {c}, {sites} {density:.2g}, {live:.2g} live"


CASES = [
    Case(resolution, channels, "random", density, live)
    for resolution, channels, densities in (
        (8, 32, (0.1, 0.3, 1.0)),
        (16, 16, (0.05, 0.15, 0.5)),
        (32, 8, (0.05, 0.15, 0.5)),
        (32, 24, (0.05, 0.15)),
    )
    for density, live in itertools.product(densities, (0.1, 0.3, 1))
] + [
    Case(resolution, channels, "shell", 2 / resolution, live)
    for resolution, channels in ((16, 24), (32, 8), (32, 16))
    for live in (0.03, 0.1, 0.3)
]


def make_layer(case: Case) -> Layer:
    """The layer of a case, on a batch of four."""
    if case.sites == "shell":
        x = workloads.shell(case.resolution, case.channels, batch=4)
    else:
        x = workloads.random_sites(case.resolution, case.channels, batch=4, density=case.density)
    capacity = max(x.capacity, ilajax.capacity(case.density, x.spatial_shape))
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


def measure(case: Case, budget: float) -> list[Record]:
    """A record for each direction."""
    timings = timing.side_by_side(candidates(make_layer(case)), budget=budget)
    records = []
    for direction in ("forward", "backward"):
        seconds = {way: timings.median((direction, way)) for way in WAYS}
        loss = seconds["chosen"] / min(seconds["without"], seconds["dense"])
        records.append({"case": case.name, "direction": direction, **seconds, "loss": loss})
    return records


def cells(record: Record) -> tuple[str, ...]:
    """A line of the table."""
    times = (timing.show(record[way]) for way in WAYS)
    return (f"{record['case']}, {record['direction']}", *times, f"{record['loss']:.2f}")


def main(arguments: list[str] | None = None, cases: Sequence[Case] = CASES) -> list[Record]:
    """Measures all cases; returns their records."""
    parser = frame.parser("benchmarks.dense_form", __doc__)
    add = parser.add_argument
    add("--budget", type=frame.positive, default=0.5, metavar="S", help="seconds for each call")
    frame.add_report(parser, "dense_form.{json,md}", RESULTS)
    options = parser.parse_args(arguments)
    records: list[Record] = []
    with frame.Reporter() as reporter:
        reporter.begin("cases", len(cases), 0)
        for case in cases:
            new = measure(case, options.budget)
            records += new
            for record in new:
                reporter.print("{:54} {:>9} {:>9} {:>9} {:>6}".format(*cells(record)))
            reporter.step(case.name)
        losses = [record["loss"] for record in records]
        mean, most = statistics.geometric_mean(losses), max(losses)
        summary = f"loss of the choice: {mean:.3f} in the geometric mean, {most:.2f} at most"
        reporter.print(summary)
        if options.report:
            provenance = timing.provenance("benchmarks.dense_form", arguments)
            table = frame.markdown_table([("layer", *WAYS, "loss"), *map(cells, records)])
            report.write(
                options.report / "dense_form",
                "The dense form of lines, and its cost model",
                provenance | {"records": records},
                [f"{summary}.", "", *table],
            )
    return records


if __name__ == "__main__":
    main()
