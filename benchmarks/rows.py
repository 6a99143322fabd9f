"""The rows of the benchmark: what is timed on which device, beside what, and how quick it should be."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import steps
from benchmarks.problems import Problem
from benchmarks.timing import Candidate

# Device -> peer -> how many times as long it should take as the first candidate, at least; None: no target.
Targets = Mapping[str, Mapping[str, float | None]]

MOST_LAUNCHES = 4  # of one layer, forward


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      name: what is computed; unique.
      candidates: name -> the layer that ilajax computes, or what makes a call; all others are compared with
        the first.
      targets: the devices that the row runs on, and for each one the peers and other candidates.
      most_s: seconds that the first candidate should take on a GPU, at most.
    """

    name: str
    candidates: Mapping[str, Problem | Callable[[], Candidate]]
    targets: Targets
    most_s: float | None = None

    @property
    def problems(self) -> dict[str, Problem]:
        """The candidates that are layers."""
        return {n: made for n, made in self.candidates.items() if isinstance(made, Problem)}

    def peers(self, device: str) -> list[str]:
        """Other libraries, in the order of the targets."""
        return [name for name in self.targets[device] if name not in self.candidates]

    def small(self) -> "Row":
        """The same kind of row on small grids."""
        return dataclasses.replace(
            self, candidates={n: p.small() for n, p in self.problems.items()}
        )


def layer_row(name: str, problem: Problem, targets: Targets, most_s: float | None = None) -> Row:
    """A row about one convolution."""
    return Row(name, {"ilajax": problem}, targets, most_s)


def pruned_row(name: str, problem: Problem, target: float) -> Row:
    """A row about a layer with a tenth of its weights, beside the same layer with all of them."""
    pruned = dataclasses.replace(problem, kernel_density=0.1)
    return Row(name, {"rho_f=0.1": pruned, "rho_f=1": problem}, {"cpu": {"rho_f=1": target}})


def step_row(
    name: str,
    make: Callable[[bool], Candidate],
    target: float,
    **others: Callable[[], Candidate],
) -> Row:
    """A row about a training step, beside its dense twin's, and beside `others` without a target."""
    candidates = {"ilajax": lambda: make(False), "dense twin": lambda: make(True), **others}
    wanted: dict[str, float | None] = {"dense twin": target} | dict.fromkeys(others)
    return Row(name, candidates, {"cpu": wanted, "gpu": dict.fromkeys(wanted)})


def parts_rows(data_dir: Path) -> list[Row]:
    """Rows about real parts, see `workloads.parts`."""
    return [
        layer_row(
            f"r{resolution} 1->8 b8 parts",
            Problem(resolution, 1, batch=8, sites=data_dir),
            on_cpu(None, None),
        )
        for resolution in (32, 64)
    ]


def on_cpu(xla: float | None, torch: float | None) -> Targets:
    return {"cpu": {"XLA dense": xla, "PyTorch dense": torch}}


def on_gpu(target: float | None = None) -> Targets:
    """The target holds against the quicker of the two precisions; ilajax's sums are float32."""
    return {"gpu": {"XLA dense": target, "XLA dense, TF32": target}}


# The paper's random grids, and thin surfaces: every channel on a part of one shell.
RANDOM = Problem(256, 1)
TENTH = dataclasses.replace(RANDOM, kernel_density=0.1)
SHELL_64 = Problem(64, 8, batch=4, sites="shell", bound=0.06)
SHARED_128 = Problem(128, 8, sites="shell", subset=None)
WIDE = Problem(32, 64, 64, density=0.33)
# On a GPU a batch is large, and the input has as many slots as the output.
GPU_64 = Problem(64, 8, batch=32, sites="shell", subset=0.75, density=1 / 32, bound=1 / 32)
GPU_128 = dataclasses.replace(GPU_64, resolution=128, density=1 / 64, bound=1 / 64)


def backward(problem: Problem) -> Problem:
    return dataclasses.replace(problem, backward=True)


def shared(problem: Problem, support: str) -> Problem:
    return dataclasses.replace(problem, subset=None, support=support)


ROWS = [
    layer_row(
        "r256 1->8 rho_f=0.1, no selection",
        dataclasses.replace(TENTH, cut=False),
        on_gpu(14),
        most_s=100e-6,
    ),
    layer_row("r256 1->8 random, rho_f=0.1", TENTH, on_cpu(200, 20) | on_gpu()),
    layer_row("r256 1->8 random, rho_f=1", RANDOM, on_cpu(80, 8) | on_gpu(7), most_s=150e-6),
    layer_row("r64 8->8 b4 shell 60%, forward", SHELL_64, on_cpu(80, 5)),
    layer_row("r64 8->8 b4 shell 60%, f + b", backward(SHELL_64), on_cpu(80, 3)),
    layer_row(
        "r128 8->8 disjoint random",
        Problem(128, 8, sites="disjoint"),
        {"cpu": {"PyTorch dense": 2}},
    ),
    layer_row("r128 8->8 shell", SHARED_128, {"cpu": {"spconv": 3}}),
    layer_row(
        'r128 8->8 shell, support="input"',
        shared(SHARED_128, "input"),
        {"cpu": {"spconv": 1.5}},
    ),
    layer_row("r64 1->8 b8 solids", Problem(64, 1, batch=8, sites="solids"), on_cpu(None, None)),
    layer_row("r128 shell 8->8 b32", GPU_128, on_gpu(6)),
    layer_row("r128 shell 8->8 b32, f + b", backward(GPU_128), on_gpu()),
    layer_row(
        "r512 shell 8->8 b32",
        dataclasses.replace(GPU_64, resolution=512, density=1 / 512, bound=1 / 512),
        {"gpu": {}},
    ),
    layer_row(
        "r1024 shell 8->8 b8",
        dataclasses.replace(GPU_64, resolution=1024, batch=8, density=1 / 1024, bound=1 / 1024),
        {"gpu": {}},
    ),
    layer_row("r64 shell 8->8 b32", GPU_64, on_gpu()),
    layer_row("r64 shell 8->8 b32, f + b", backward(GPU_64), on_gpu()),
    layer_row(
        "r128 shell 8->8 b32, bfloat16",
        dataclasses.replace(GPU_128, dtype="bfloat16"),
        {"gpu": {}},
    ),
    layer_row(
        "r128 shared shell 8->8 b32", shared(GPU_128, "dilate"), {"gpu": dict.fromkeys(["spconv"])}
    ),
    layer_row(
        "r128 shared shell 8->8 b32, submanifold",
        shared(GPU_128, "input"),
        {"gpu": dict.fromkeys(["spconv"])},
    ),
    step_row("step OctNet3-64 b8 solids", steps.solids_step, 30),
    step_row("step OctNet3-24 b32 MNIST", steps.mnist_step, 3, head=steps.mnist_head_step),
    pruned_row("pruning r32 64->64 rho=0.33", WIDE, 2),
    pruned_row("pruning r32 64->64 rho=0.33, f + b", backward(WIDE), 2),
    pruned_row("pruning r256 1->8 random", RANDOM, 1),
    pruned_row("pruning r64 8->8 b4 shell 60%", SHELL_64, 1),
    pruned_row("pruning r64 8->8 b4 shell 60%, f + b", backward(SHELL_64), 1),
    pruned_row("pruning r16 8->8 random", Problem(16, 8), 1),
]
