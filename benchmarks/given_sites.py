"""What a product costs on a CPU in each kind of layer on shared supports, beside PyTorch.

    python -m benchmarks.given_sites                    # some minutes
    python -m benchmarks.given_sites --report           # benchmarks/results/given_sites.{json,md}

A product is a pair of an output site and a stored site that one of its taps reads, times the filter's matrix
of that tap. On the voxels of a sphere, from C to C channels: submanifold; strided onto given sites, and onto
the strongest that a stride reaches; inverse, from there back to the voxels; transposed, onto the strongest
sites that are reached; and submanifold on a smaller sphere in a larger grid, which is nearly empty. Beside
each stands PyTorch with its maps given: gather, matrix product, index_add for each tap. PyTorch is left out
where it is not installed. A second table has four submanifold layers, one after the other: once as they are,
with a site map that all of them share, and once where each looks up its pairs for itself.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from benchmarks import RESULTS, pytorch, report, timing, workloads
from benchmarks.report import Record
from experiments import frame
from ilajax.ffi import plans

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer: `ilajax.conv` or `conv_transpose` with options, from an input to an output."""

    name: str
    x: ilajax.SparseTensor
    operation: Callable[..., Any]
    options: Options

    def values(self, x: Any, kernel: ilajax.SparseKernel) -> Any:
        return self.operation(x, kernel, **self.options).features


def kinds(resolution: int, channels: int) -> list[Kind]:
    """The kinds, on the voxels of a sphere and on what a stride makes of them."""
    slots = ilajax.capacity(1.646 / resolution, (resolution,) * 3)  # 97,000 voxels in 256^3
    radius = workloads.fitting_radius(resolution, slots)
    fine = workloads.shell(resolution, channels, subset=None, radius=radius)
    # 15,500 voxels in 448^3, as few for the grid as a LiDAR's.
    far = workloads.shell(7 * resolution // 4, channels, subset=None, radius=radius / 2.5)
    kernel = workloads.kernel(channels, channels)
    stride: Options = {"strides": 2, "select_by": "site", "select": "magnitude"}
    reached = jax.jit(functools.partial(ilajax.conv, capacity=fine.capacity, **stride))(
        fine, kernel
    )
    sites = int(reached.responses[0, 0])
    coarse = ilajax.k_select(reached.features, sites, select_by="site")
    back = functools.partial(ilajax.conv_transpose, output_shape=fine.spatial_shape)
    up = int(
        jax.jit(functools.partial(back, capacity=8 * sites, **stride))(coarse, kernel).responses[
            0, 0
        ]
    )
    return [
        Kind("submanifold", fine, ilajax.conv, {"support": "input"}),
        Kind("its sites, given", fine, ilajax.conv, {"support": fine}),
        Kind("strided, given", fine, ilajax.conv, {"strides": 2, "support": coarse}),
        Kind("strided, all reached", fine, ilajax.conv, stride | {"capacity": sites}),
        Kind("strided, half kept", fine, ilajax.conv, stride | {"capacity": sites // 2}),
        Kind("inverse", coarse, ilajax.conv_transpose, {"strides": 2, "support": fine}),
        Kind("transposed, all reached", coarse, back, stride | {"capacity": up}),
        Kind("submanifold, nearly empty", far, ilajax.conv, {"support": "input"}),
    ]


def maps(kind: Kind, kernel: ilajax.SparseKernel) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each tap the slots that it reads, and those that it adds them to, of one sample.

    Found by the layer itself: a filter whose one live weight reads the slots' numbers.
    """
    x, window = kind.x, kernel.window_shape
    numbers = x.with_values(jnp.arange(1.0, x.capacity + 1)[None, None])
    out = jax.jit(kind.values)(x, kernel)
    onto = {"support": out} | {k: v for k, v in kind.options.items() if k == "strides"}

    @jax.jit
    def reads(numbers, tap):
        weights = jnp.zeros(kernel.taps).at[tap].set(1.0)
        one = ilajax.SparseKernel(
            jnp.arange(kernel.taps, dtype=jnp.int32), weights, (*window, 1, 1)
        )
        operation = ilajax.conv if kind.operation is ilajax.conv else ilajax.conv_transpose
        return operation(numbers, one, **onto).features.values[0, 0]

    found = []
    for tap in range(kernel.taps):
        slot = np.rint(np.asarray(reads(numbers, tap))).astype(np.int64) - 1
        to = np.flatnonzero(slot >= 0)
        found.append((slot[to], to))
    return found


def ours(kind: Kind, kernel: ilajax.SparseKernel, backward: bool) -> timing.Candidate:
    """The layer by ilajax, with the gradients of input and filter if `backward`."""

    def forward(values: Any, weights: Any) -> Any:
        return kind.values(
            kind.x.with_values(values), dataclasses.replace(kernel, values=weights)
        ).values

    def both(values: Any, weights: Any) -> Any:
        y, pull = jax.vjp(forward, values, weights)
        return y, pull(jnp.ones_like(y))

    operands = (kind.x.values, kernel.values)
    program = jax.jit(both if backward else forward).lower(*operands).compile()
    return functools.partial(program, *operands)


def theirs(
    kind: Kind,
    kernel: ilajax.SparseKernel,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    backward: bool,
) -> timing.Candidate:
    """The same by PyTorch's gathers."""
    rows = np.asarray(kind.x.values)[0].T
    weights = np.array(kernel.to_dense()).reshape(len(pairs), *kernel.shape[-2:])
    slots = int(max(to.max(initial=0) for _, to in pairs)) + 1
    return pytorch.by_gathers(rows, weights, pairs, slots, backward)


def stack(
    kind: Kind, kernel: ilajax.SparseKernel, backward: bool, shared: bool
) -> timing.Candidate:
    """Four layers of a kind, which share a site map if `shared`, with all gradients if `backward`."""

    def forward(values: Any, weights: Any) -> Any:
        x = kind.x.with_values(values)
        for layer in weights:
            x = kind.operation(
                x, dataclasses.replace(kernel, values=layer), **kind.options
            ).features
        return x.values

    def both(values: Any, weights: Any) -> Any:
        y, pull = jax.vjp(forward, values, weights)
        return y, pull(jnp.ones_like(y))

    # A quarter each, so that values neither vanish nor grow.
    operands = (kind.x.values, [kernel.values * (scale / 4) for scale in (0.9, 1.0, 1.1, 1.2)])
    with plans.tuned("cpu", site_maps=int(shared)):
        program = jax.jit(both if backward else forward).lower(*operands).compile()
    return functools.partial(program, *operands)


def measure_sharing(resolution: int, channels: int, budget: float) -> list[Record]:
    """What four submanifold layers gain by one map, a record for each direction."""
    kind, kernel = kinds(resolution, channels)[0], workloads.kernel(channels, channels)
    candidates = {
        (direction, shared): stack(kind, kernel, direction == "f + b", shared)
        for direction in ("forward", "f + b")
        for shared in (True, False)
    }
    timings = timing.side_by_side(candidates, budget=budget)
    return [
        {"channels": channels, "direction": direction}
        | {
            name: timings.median((direction, shared))
            for name, shared in (("shared", True), ("each", False))
        }
        for direction in ("forward", "f + b")
    ]


def measure(resolution: int, channels: int, budget: float) -> list[Record]:
    """A record for each kind and direction."""
    kernel = workloads.kernel(channels, channels)
    torch = importlib.util.find_spec("torch") is not None
    candidates: dict[Any, timing.Candidate] = {}
    counts = {}
    made = kinds(resolution, channels)
    for kind in made:
        pairs = maps(kind, kernel)
        counts[kind.name] = sum(len(to) for _, to in pairs)
        for direction in ("forward", "f + b"):
            candidates[kind.name, direction, "ilajax"] = ours(kind, kernel, direction == "f + b")
            if torch:
                call = theirs(kind, kernel, pairs, direction == "f + b")
                candidates[kind.name, direction, "PyTorch"] = call
    timings = timing.side_by_side(candidates, budget=budget)
    records = []
    for direction in ("forward", "f + b"):
        first = timings.median((made[0].name, direction, "ilajax")) / counts[made[0].name]
        for kind in made:
            who = ("ilajax", "PyTorch") if torch else ("ilajax",)
            seconds = {w: timings.median((kind.name, direction, w)) for w in who}
            each = seconds["ilajax"] / counts[kind.name]
            records.append(
                {"channels": channels, "kind": kind.name, "direction": direction}
                | {"pairs": counts[kind.name], "seconds": seconds}
                | {"ns_a_pair": 1e9 * each, "of_submanifold": each / first}
            )
    return records


def cells(record: Record) -> tuple[str, ...]:
    """A line of the table."""
    ours, torch = record["seconds"]["ilajax"], record["seconds"].get("PyTorch")
    return (
        f"{record['channels']}, {record['kind']}, {record['direction']}",
        f"{record['pairs']:,}",
        timing.show(ours),
        f"{record['ns_a_pair']:.1f}",
        f"{record['of_submanifold']:.2f}x",
        timing.show(torch) if torch else "",
        f"{torch / ours:.2f}x" if torch else "",
    )


def sharing_cells(record: Record) -> tuple[str, ...]:
    """A line of the second table."""
    shared, each = record["shared"], record["each"]
    return (
        f"{record['channels']}, {record['direction']}",
        *map(timing.show, (shared, each)),
        f"{each / shared:.2f}x",
    )


SHARING_HEAD = ("four layers, channels", "one map", "each its own pairs", "ratio")
HEAD = ("channels, layer", "pairs", "ilajax", "ns a pair", "of submanifold's", "PyTorch", "ratio")


def main(arguments: list[str] | None = None) -> list[Record]:
    """Measures all kinds; returns their records."""
    parser = frame.parser("benchmarks.given_sites", __doc__)
    add = parser.add_argument
    add("--budget", type=frame.positive, default=1.0, metavar="S", help="seconds for each call")
    add("--resolution", type=int, default=256, metavar="R", help="sites along an edge of the grid")
    add("--channels", type=int, nargs="+", default=(16, 32, 64), metavar="C")
    frame.add_report(parser, "given_sites.{json,md}", RESULTS)
    options = parser.parse_args(arguments)
    records: list[Record] = []
    sharing: list[Record] = []
    with frame.Reporter() as reporter:
        reporter.begin("numbers of channels", len(options.channels), 0)
        for channels in options.channels:
            new = measure(options.resolution, channels, options.budget)
            records += new
            for record in new:
                reporter.print("{:42} {:>10} {:>9} {:>9} {:>9} {:>9} {:>7}".format(*cells(record)))
            # Small differences of long calls, which a few of them would not show.
            new = measure_sharing(options.resolution, channels, 10 * options.budget)
            sharing += new
            for record in new:
                reporter.print(
                    "four layers: {:30} {:>9} {:>9} {:>7}".format(*sharing_cells(record))
                )
            reporter.step(f"{channels} channels")
        if options.report:
            provenance = timing.provenance("benchmarks.given_sites", arguments)
            table = frame.markdown_table([HEAD, *map(cells, records)])
            second = frame.markdown_table([SHARING_HEAD, *map(sharing_cells, sharing)])
            report.write(
                options.report / "given_sites",
                "Layers on shared supports, by what a product costs",
                provenance | {"records": records, "sharing": sharing},
                [
                    f"The voxels of a sphere in {options.resolution}^3, one sample.",
                    "",
                    *table,
                    "",
                    "Four submanifold layers on the sphere, one after the other:",
                    "",
                    *second,
                ],
            )
    return records


if __name__ == "__main__":
    main()
