"""The rows of the benchmark: what is timed on which device, beside what, and how quick it should be."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx

import ilajax
from benchmarks import workloads
from benchmarks.peers import Layer
from benchmarks.timing import Candidate
from experiments import mnist
from experiments.data.mnist import load_mnist
from experiments.training import as_it_is, train_step
from ilajax.models import OctNet3
from ilajax.models.octnet3 import TABLE_2

# Device -> peer -> how many times as long it should take as the first candidate, at least; None: no target.
Targets = Mapping[str, Mapping[str, float | None]]

MOST_LAUNCHES = 4  # of one layer, forward


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution of 3^3 taps on a cubic grid."""

    resolution: int
    in_channels: int
    out_channels: int = 8
    batch: int = 1
    # "random", other sites in each channel; "disjoint", random sites that no two channels share; "shell", a
    # sphere's surface; "solids", generated meshes; or a folder with parts.
    sites: str | Path = "random"
    subset: float | None = 0.6  # of a shell, that each channel stores; None: all of it, shared
    density: float | None = None  # of slots; None: 1 / resolution if random, else what is stored
    bound: float | None = None  # of the output; None: as many slots if random, else twice as many
    kernel_density: float = 1.0
    cut: bool = True  # False: at most as many candidates as slots, so that nothing is selected
    backward: bool = False
    support: str = "dilate"
    dtype: str = "float32"

    @property
    def dense(self) -> str:
        """What a dense convolution computes of it, which is the same for several problems."""
        channels = f"{self.in_channels}->{self.out_channels}"
        what = "f + b" if self.backward else "forward"
        return f"r{self.resolution} {channels} b{self.batch} {what}"

    def features(self, seed: int) -> ilajax.SparseTensor:
        """An input, another one for each seed."""
        size, options = self.resolution, {"batch": self.batch, "seed": seed}
        if self.sites == "solids":
            return workloads.solids(size, **options)[0]
        if isinstance(self.sites, Path):
            return workloads.parts(size, self.sites, **options)
        options |= {"dtype": self.dtype}
        if self._random:
            options |= {"density": self.density, "disjoint": self.sites == "disjoint"}
            return workloads.random_sites(size, self.in_channels, **options)
        if self.density is not None:
            slots = ilajax.capacity(self.density, (size,) * 3)
            options |= {"capacity": slots, "radius": workloads.fitting_radius(size, slots)}
        return workloads.shell(size, self.in_channels, subset=self.subset, **options)

    def layer(self) -> Layer:
        """The layer, with the first input."""
        x = self.features(0)
        channels = (self.in_channels, self.out_channels)
        kernel = workloads.kernel(*channels, density=self.kernel_density, cut=self.cut)
        bias = jnp.zeros(self.out_channels)
        capacity = None
        if self.support == "dilate" and self.bound is not None:
            capacity = ilajax.capacity(self.bound, x.spatial_shape)
        elif self.support == "dilate":
            capacity = x.capacity if self._random else 2 * x.capacity
        return Layer(x, kernel, bias, capacity, self.backward, self.support)

    def small(self) -> Self:
        """The same kind of problem in a small grid, to try a benchmark itself."""
        size = {1024: 16, 512: 14, 256: 12}.get(self.resolution, 10)
        least = {
            name: None if value is None and not self._random else max(value or 0, 0.15)
            for name, value in (("density", self.density), ("bound", self.bound))
        }
        return dataclasses.replace(self, resolution=size, batch=min(self.batch, 2), **least)

    @property
    def _random(self) -> bool:
        return self.sites in ("random", "disjoint")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: candidates, of which the others are compared with the first, and peers."""

    name: str  # unique
    candidates: Mapping[str, Problem | Callable[[], Candidate]]  # layers, or what makes a call
    targets: Targets  # on the devices that the row runs on
    most_s: float | None = None  # seconds that the first candidate should take on a GPU, at most

    @property
    def problems(self) -> dict[str, Problem]:
        """The candidates that are layers."""
        return {n: made for n, made in self.candidates.items() if isinstance(made, Problem)}

    def peers(self, device: str) -> list[str]:
        """Other libraries, in the order of the targets."""
        return [name for name in self.targets[device] if name not in self.candidates]


def layer_row(name: str, problem: Problem, targets: Targets, most_s: float | None = None) -> Row:
    return Row(name, {"ilajax": problem}, targets, most_s)


def pruned_row(name: str, problem: Problem, target: float) -> Row:
    """A row about a layer with a tenth of its weights, beside the same layer with all of them."""
    pruned = but(problem, kernel_density=0.1)
    return Row(name, {"rho_f=0.1": pruned, "rho_f=1": problem}, {"cpu": {"rho_f=1": target}})


def step_row(
    name: str, make: Callable[[bool], Candidate], target: float, **others: Callable[[], Candidate]
) -> Row:
    """A row about a training step, beside its dense twin's, and beside `others` without a target."""
    candidates = {"ilajax": lambda: make(False), "dense twin": lambda: make(True), **others}
    wanted: dict[str, float | None] = {"dense twin": target} | dict.fromkeys(others)
    return Row(name, candidates, {"cpu": wanted, "gpu": dict.fromkeys(wanted)})


def parts_rows(data_dir: Path) -> list[Row]:
    """Rows about real parts, see `workloads.parts`."""
    return [
        layer_row(f"r{r} 1->8 b8 parts", Problem(r, 1, batch=8, sites=data_dir), on_cpu(None, None))
        for r in (32, 64)
    ]


def on_cpu(xla: float | None, torch: float | None) -> Targets:
    return {"cpu": {"XLA dense": xla, "PyTorch dense": torch}}


def on_gpu(target: float | None = None) -> Targets:
    """The target holds against the quicker of the two precisions; ilajax's sums are float32."""
    return {"gpu": {"XLA dense": target, "XLA dense, TF32": target}}


def but(problem: Problem, **changes: Any) -> Problem:
    return dataclasses.replace(problem, **changes)


def training_step(model: nnx.Module, recipe: Any, to_input: Any = as_it_is) -> Callable[..., Any]:
    """A function of a batch that takes a step, with dropout, as in `experiments.training`."""
    optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)
    model.train()
    step = nnx.cached_partial(train_step, model, optimizer)
    parameters = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)]
    epoch_end = jnp.asarray(False)

    def call(images: Any, labels: Any) -> Any:
        # The new weights are waited for too.
        return step(images, labels, epoch_end, to_input=to_input), [v[...] for v in parameters]

    return call


def adagrad_step(
    model: nnx.Module, images: Any, labels: np.ndarray, to_input: Any = as_it_is
) -> Candidate:
    step = training_step(model, mnist.make_transformation(0.01), to_input)
    return functools.partial(step, images, labels)


def solids_step(dense: bool, *, resolution: int = 64, batch: int = 8) -> Candidate:
    """OctNet3 on generated meshes; bounds are twice the surfaces' density, about 2 / r before any pooling."""
    x, labels = workloads.solids(resolution, batch=batch)
    blocks = len(TABLE_2[resolution].sparse)
    bounds = [min(1.0, 4 * 2**block / resolution) for block in range(blocks)]
    classes = len(workloads.SOLIDS)
    model = OctNet3(
        resolution, num_classes=classes, density_bounds=bounds, rngs=nnx.Rngs(0), dense=dense
    )
    return adagrad_step(model, ilajax.to_dense(x) if dense else x, labels)


def mnist_step(dense: bool, *, batch: int = 32) -> Candidate:
    """OctNet3-24^2 on digits, as in `experiments.mnist`."""
    digits = load_mnist()[0].threshold(mnist.PIXEL_THRESHOLD)
    to_input = mnist.dense_input if dense else mnist.SparseInput(int(digits.counts().max()))
    model = mnist.make_net(None if dense else 0.095, seed=0)
    return adagrad_step(model, digits.images[:batch], digits.labels[:batch], to_input)


def mnist_head_step(*, batch: int = 32) -> Candidate:
    """The part of a step of OctNet3-24^2 that no convolution can make faster: its dense layers."""
    net = mnist.make_net(None, seed=0)
    head = nnx.Sequential(net.hidden, nnx.relu, net.dropout, net.logits)
    x = jnp.ones((batch, net.hidden.in_features))
    return adagrad_step(head, x, np.zeros(batch, np.int32))


# The paper's random grids, and thin surfaces: every channel on a part of one shell.
RANDOM = Problem(256, 1)
TENTH = but(RANDOM, kernel_density=0.1)
SHELL_64 = Problem(64, 8, batch=4, sites="shell", bound=0.06)
DISJOINT_128 = Problem(128, 8, sites="disjoint")
SHARED_128 = Problem(128, 8, sites="shell", subset=None)
SUBMANIFOLD_128 = but(SHARED_128, support="input")
WIDE = Problem(32, 64, 64, density=0.33)
# On a GPU a batch is large, and the input has as many slots as the output.
GPU_64 = Problem(64, 8, batch=32, sites="shell", subset=0.75, density=1 / 32, bound=1 / 32)
GPU_128 = but(GPU_64, resolution=128, density=1 / 64, bound=1 / 64)
GPU_512 = but(GPU_64, resolution=512, density=1 / 512, bound=1 / 512)
GPU_1024 = but(GPU_64, resolution=1024, batch=8, density=1 / 1024, bound=1 / 1024)
GPU_SHARED = but(GPU_128, subset=None)
GPU_SUBMANIFOLD = but(GPU_SHARED, support="input")

ALONE: Targets = {"gpu": {}}
BESIDE_SPCONV: Targets = {"gpu": {"spconv": None}}

ROWS = [
    layer_row("r256 1->8 rho_f=0.1, no selection", but(TENTH, cut=False), on_gpu(14), 100e-6),
    layer_row("r256 1->8 random, rho_f=0.1", TENTH, on_cpu(200, 20) | on_gpu()),
    layer_row("r256 1->8 random, rho_f=1", RANDOM, on_cpu(80, 8) | on_gpu(7), 150e-6),
    layer_row("r64 8->8 b4 shell 60%, forward", SHELL_64, on_cpu(80, 5)),
    layer_row("r64 8->8 b4 shell 60%, f + b", but(SHELL_64, backward=True), on_cpu(80, 3)),
    layer_row("r128 8->8 disjoint random", DISJOINT_128, {"cpu": {"PyTorch dense": 2}}),
    layer_row("r128 8->8 shell", SHARED_128, {"cpu": {"spconv": 3}}),
    layer_row('r128 8->8 shell, support="input"', SUBMANIFOLD_128, {"cpu": {"spconv": 1.5}}),
    layer_row("r64 1->8 b8 solids", Problem(64, 1, batch=8, sites="solids"), on_cpu(None, None)),
    layer_row("r128 shell 8->8 b32", GPU_128, on_gpu(6)),
    layer_row("r128 shell 8->8 b32, f + b", but(GPU_128, backward=True), on_gpu()),
    layer_row("r512 shell 8->8 b32", GPU_512, ALONE),
    layer_row("r1024 shell 8->8 b8", GPU_1024, ALONE),
    layer_row("r64 shell 8->8 b32", GPU_64, on_gpu()),
    layer_row("r64 shell 8->8 b32, f + b", but(GPU_64, backward=True), on_gpu()),
    layer_row("r128 shell 8->8 b32, bfloat16", but(GPU_128, dtype="bfloat16"), ALONE),
    layer_row("r128 shared shell 8->8 b32", GPU_SHARED, BESIDE_SPCONV),
    layer_row("r128 shared shell 8->8 b32, submanifold", GPU_SUBMANIFOLD, BESIDE_SPCONV),
    step_row("step OctNet3-64 b8 solids", solids_step, 30),
    step_row("step OctNet3-24 b32 MNIST", mnist_step, 3, head=mnist_head_step),
    pruned_row("pruning r32 64->64 rho=0.33", WIDE, 2),
    pruned_row("pruning r32 64->64 rho=0.33, f + b", but(WIDE, backward=True), 2),
    pruned_row("pruning r256 1->8 random", RANDOM, 1),
    pruned_row("pruning r64 8->8 b4 shell 60%", SHELL_64, 1),
    pruned_row("pruning r64 8->8 b4 shell 60%, f + b", but(SHELL_64, backward=True), 1),
    pruned_row("pruning r16 8->8 random", Problem(16, 8), 1),
]
