"""The rows of the benchmark: what is timed on which device, beside what, and how quick it should be."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from benchmarks import pytorch, workloads
from benchmarks.layers import DenseLayer, Layer, Pooling, Timed
from benchmarks.timing import Candidate
from experiments import mnist
from experiments.data.mnist import load_mnist
from experiments.training import as_it_is, train_step
from ilajax.models import OctNet3
from ilajax.models.octnet3 import TABLE_2

# Device -> peer -> how many times as long it should take as the first candidate, at least; None: no target.
Targets = Mapping[str, Mapping[str, float | None]]

MOST_LAUNCHES = 4  # of one layer, forward
TORCH, GATHER = "PyTorch dense", "PyTorch gather"
RATE = 0.01  # of Adagrad
HIDDEN = (16384, 1024)  # the first dense layer of OctNet3-64^3


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution of 3^3 taps on a cubic grid."""

    resolution: int
    in_channels: int
    out_channels: int = 8
    batch: int = 1
    # "random", other sites in each channel; "disjoint", random sites that no two channels share; "shell", a
    # sphere's surface; "near shell", what layers make of one; "solids", generated meshes; or a folder with
    # parts.
    sites: str | Path = "random"
    subset: float | None = 0.6  # of a shell, that each channel stores; None: all of it, shared
    density: float | None = None  # of slots; None: 1 / resolution if random, else what is stored
    bound: float | None = None  # of the output; None: as many slots if random, else twice as many
    kernel_density: float = 1.0
    cut: bool = True  # False: at most as many candidates as slots, so that nothing is selected
    backward: bool = False
    first: bool = False  # of a network: no gradient of the input
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
        if self.sites == "near shell":
            options |= {"density": self.density, "subset": self.subset}
            return workloads.near_shell(size, self.in_channels, **options)
        options |= {"dtype": self.dtype}
        if self._random:
            options |= {"density": self.density, "disjoint": self.sites == "disjoint"}
            return workloads.random_sites(size, self.in_channels, **options)
        if self.density is not None:
            slots = ilajax.capacity(self.density, (size,) * 3)
            options |= {"capacity": slots, "radius": workloads.fitting_radius(size, slots)}
        return workloads.shell(size, self.in_channels, subset=self.subset, **options)

    def layer(self) -> Timed:
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
        return Layer(x, kernel, bias, capacity, self.backward, self.support, self.first)

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


class Pool(Problem):
    """Max pooling by a window of 2, of the same inputs; what is about outputs does not count."""

    def layer(self) -> Pooling:
        return Pooling(self.features(0), self.backward)


class OverlappingPool(Pool):
    """The same by a window of 3 in steps of 2."""

    def layer(self) -> Pooling:
        return Pooling(self.features(0), self.backward, overlapping=True)


class Dense(Problem):
    """A dense layer of a network; without a grid (resolution 0) a matrix product."""

    def layer(self) -> DenseLayer:
        rng = np.random.default_rng(0)
        channels = (self.in_channels, self.out_channels)
        grid, window = ((self.resolution,) * 3, (3, 3, 3)) if self.resolution else ((), ())
        x = rng.random((self.batch, *grid, self.in_channels), np.float32)
        w = rng.normal(size=(*window, *channels)).astype(np.float32)
        bias = jnp.zeros(self.out_channels)
        return DenseLayer(jnp.asarray(x), jnp.asarray(w), bias, self.backward)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: candidates, of which the others are compared with the first, and peers."""

    name: str  # unique
    candidates: Mapping[str, Problem | Callable[[], Candidate]]  # layers, or what makes a call
    targets: Targets  # on the devices that the row runs on
    # Device -> seconds that the first candidate should take, at most.
    most_s: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def problems(self) -> dict[str, Problem]:
        """The candidates that are layers."""
        return {n: made for n, made in self.candidates.items() if isinstance(made, Problem)}

    def peers(self, device: str) -> list[str]:
        """Other libraries, in the order of the targets."""
        return [name for name in self.targets[device] if name not in self.candidates]


def layer_row(name: str, problem: Problem, targets: Targets, **most_s: float) -> Row:
    return Row(name, {"ilajax": problem}, targets, most_s)


def both(
    name: str,
    problem: Problem,
    targets: Mapping[str, float | None],
    most_s: tuple[float | None, float | None] = (None, None),
) -> list[Row]:
    """A row of the forward pass and one of both passes, on the CPU."""
    found = []
    for what, seconds in zip(("forward", "f + b"), most_s, strict=True):
        layer = but(problem, backward=what == "f + b")
        most = {} if seconds is None else {"cpu": seconds}
        found.append(Row(f"{name}, {what}", {"ilajax": layer}, {"cpu": targets}, most))
    return found


def pruned_row(name: str, problem: Problem, target: float) -> Row:
    """A row about a layer with a tenth of its weights, beside the same layer with all of them."""
    pruned = but(problem, kernel_density=0.1)
    return Row(name, {"rho_f=0.1": pruned, "rho_f=1": problem}, {"cpu": {"rho_f=1": target}})


def step_row(
    name: str,
    candidates: Mapping[str, Callable[[], Candidate]],
    targets: Mapping[str, float | None],
) -> Row:
    """A row about a training step; on a GPU beside all but PyTorch, without a target."""
    _, *others = candidates
    gpu = {who: None for who in others if who != TORCH}
    return Row(name, candidates, {"cpu": targets, "gpu": gpu})


def solids_row(resolution: int, batch: int, targets: Mapping[str, float | None]) -> Row:
    """A row about a step of OctNet3 on generated meshes, with the paper's bounds."""
    partial = functools.partial
    options = {"resolution": resolution, "batch": batch}
    candidates = {
        "ilajax": partial(solids_step, False, **options),
        "dense twin": partial(solids_step, True, **options),
        TORCH: partial(solids_torch_step, **options),
        "head": lambda: head_step(solids_net(False, **options)[0], batch),
    }
    return step_row(f"step OctNet3-{resolution} b{batch} solids", candidates, targets)


def parts_rows(data_dir: Path) -> list[Row]:
    """Rows about real parts, see `workloads.parts`."""
    return [
        layer_row(f"r{r} 1->8 b8 parts", Problem(r, 1, batch=8, sites=data_dir), on_cpu(None, None))
        for r in (32, 64)
    ]


def on_cpu(xla: float | None, torch: float | None) -> Targets:
    return {"cpu": {"XLA dense": xla, TORCH: torch}}


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
    step = training_step(model, mnist.make_transformation(RATE), to_input)
    return functools.partial(step, images, labels)


def solids_net(dense: bool, resolution: int, batch: int) -> tuple[OctNet3, Any, np.ndarray]:
    """OctNet3 with the paper's bounds, generated meshes, and which solids they are."""
    x, labels = workloads.solids(resolution, batch=batch)
    classes = len(workloads.SOLIDS)
    model = OctNet3(resolution, num_classes=classes, rngs=nnx.Rngs(0), dense=dense)
    return model, ilajax.to_dense(x) if dense else x, labels


def solids_step(dense: bool, *, resolution: int, batch: int) -> Candidate:
    return adagrad_step(*solids_net(dense, resolution, batch))


def solids_torch_step(*, resolution: int, batch: int) -> Candidate:
    twin, x, labels = solids_net(True, resolution, batch)
    return pytorch.training_step(twin, np.asarray(x), labels, "Adagrad", RATE)


def mnist_step(dense: bool, *, batch: int = 32) -> Candidate:
    """OctNet3-24^2 on digits, as in `experiments.mnist`."""
    digits = load_mnist()[0].threshold(mnist.PIXEL_THRESHOLD)
    to_input = mnist.dense_input if dense else mnist.SparseInput(int(digits.counts().max()))
    model = mnist.make_net(None if dense else 0.095, seed=0)
    return adagrad_step(model, digits.images[:batch], digits.labels[:batch], to_input)


def head_step(net: OctNet3, batch: int) -> Candidate:
    """The part of a step that no convolution can make faster: the dense layers behind them."""
    head = nnx.Sequential(net.hidden, nnx.relu, net.dropout, net.logits)
    x = jnp.ones((batch, net.hidden.in_features))
    return adagrad_step(head, x, np.zeros(batch, np.int32))


def adagrad_update(library: str, shape: tuple[int, int] = HIDDEN) -> Candidate:
    """Adagrad's update of one array of weights, in place."""
    rng = np.random.default_rng(0)
    weights, gradient = rng.normal(size=(2, *shape)).astype(np.float32)
    if library == TORCH:
        return pytorch.adagrad(weights, gradient, RATE)
    recipe = mnist.make_transformation(RATE)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(weights: Any, state: Any, gradient: Any) -> Any:
        updates, state = recipe.update(gradient, state)
        return optax.apply_updates(weights, updates), state

    now = jnp.asarray(weights), recipe.init(jnp.asarray(weights))
    gradient = jnp.asarray(gradient)

    def call() -> Any:
        nonlocal now
        now = update(*now, gradient)
        return now[0]

    return call


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

# What the layers of OctNet3 are given, channels on a part of a shell's surroundings, with the paper's bounds.
BLOCKS = TABLE_2[64].density_bounds
BLOCK = Problem(64, 8, 8, batch=8, sites="near shell", density=0.05, bound=BLOCKS[0])
BLOCK_2 = Problem(32, 16, 16, batch=8, sites="near shell", density=BLOCKS[1], bound=BLOCKS[1])
BLOCK_3 = Problem(16, 24, 24, batch=8, sites="near shell", density=BLOCKS[2], bound=BLOCKS[2])
POOL = Pool(64, 8, batch=8, sites="near shell", density=BLOCKS[0])
POOL_3 = OverlappingPool(64, 8, batch=8, sites="near shell", density=BLOCKS[0])
POOL_2 = Pool(32, 16, batch=8, sites="near shell", density=BLOCKS[1])
FIRST = Problem(64, 1, batch=8, sites="shell", subset=None, bound=BLOCKS[0], first=True)
BLOCK_4 = Dense(8, 32, 32, batch=8)
# 97,000 voxels of one sphere.
SPHERE = Problem(256, 16, 16, sites="shell", subset=None, density=0.00643, support="input")
SPHERE_32 = but(SPHERE, in_channels=32, out_channels=32)
SPHERE_64 = but(SPHERE, in_channels=64, out_channels=64)
SURFACE = Problem(64, 16, 16, batch=8, sites="shell", subset=None, support="input")

MNIST = {
    "ilajax": lambda: mnist_step(False),
    "dense twin": lambda: mnist_step(True),
    "head": lambda: head_step(mnist.make_net(None, seed=0), 32),
}

ALONE: Targets = {"gpu": {}}
BESIDE_SPCONV: Targets = {"gpu": {"spconv": None}}

# Layers and steps of OctNet3, and wide layers on one support, on a CPU.
AGAINST_TORCH = [
    *both("r64 1->8 b8 shell", FIRST, {TORCH: 1, "XLA dense": None}),
    *both("r64 8->8 b8 shell 5%", BLOCK, {TORCH: 1}),
    *both("r64 max_pool 8 b8 shell 6%", POOL, {TORCH: 1}, (3e-3, 8e-3)),
    *both("r64 max_pool 3/2 8 b8 shell 6%", POOL_3, {TORCH: 1}),
    *both("r32 8->16 b8 shell 14%", but(BLOCK_2, in_channels=8), {TORCH: 1, "XLA dense": None}),
    *both("r32 16->16 b8 shell 14%", BLOCK_2, {TORCH: 2, "XLA dense": None}),
    *both("r32 max_pool 16 b8 shell 14%", POOL_2, {TORCH: 1}),
    *both("r16 16->24 b8 shell 33%", but(BLOCK_3, in_channels=16), {TORCH: 1, "XLA dense": None}),
    *both("r16 24->24 b8 shell 33%", BLOCK_3, {TORCH: 1, "XLA dense": None}),
    *both("r8 24->32 b8 dense", but(BLOCK_4, in_channels=24), {TORCH: None, "XLA dense": None}),
    *both("r8 32->32 b8 dense", BLOCK_4, {TORCH: None, "XLA dense": None}),
    *both("hidden 16384->1024 b8 dense", Dense(0, *HIDDEN, batch=8), {TORCH: None}),
    Row(
        "Adagrad of 16384->1024",
        {"ilajax": lambda: adagrad_update("optax"), TORCH: lambda: adagrad_update(TORCH)},
        {"cpu": {TORCH: None}},
    ),
    solids_row(64, 8, {TORCH: 4, "head": None}),
    solids_row(32, 8, {TORCH: 1.8, "head": None, "dense twin": None}),
    solids_row(16, 32, {TORCH: 2.5, "head": None, "dense twin": None}),
    *both("r64 16->16 b8 shell, submanifold", SURFACE, {TORCH: 5}),
    *both("r256 16->16 sphere, submanifold", SPHERE, {GATHER: 3}),
    *both("r256 32->32 sphere, submanifold", SPHERE_32, {GATHER: 3}),
    *both("r256 64->64 sphere, submanifold", SPHERE_64, {GATHER: None}, (92e-3, 280e-3)),
]

ROWS = [
    *AGAINST_TORCH,
    layer_row("r256 1->8 rho_f=0.1, no selection", but(TENTH, cut=False), on_gpu(14), gpu=100e-6),
    layer_row("r256 1->8 random, rho_f=0.1", TENTH, on_cpu(200, 20) | on_gpu()),
    layer_row("r256 1->8 random, rho_f=1", RANDOM, on_cpu(80, 8) | on_gpu(7), gpu=150e-6),
    layer_row("r64 8->8 b4 shell 60%, forward", SHELL_64, on_cpu(80, 5)),
    layer_row("r64 8->8 b4 shell 60%, f + b", but(SHELL_64, backward=True), on_cpu(80, 3)),
    layer_row("r128 8->8 disjoint random", DISJOINT_128, {"cpu": {TORCH: 2}}),
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
    layer_row(
        "r128 shared shell 8->8 b32, submanifold, f + b", but(GPU_SUBMANIFOLD, backward=True), ALONE
    ),
    step_row("step OctNet3-24 b32 MNIST", MNIST, {"dense twin": 3, "head": None}),
    pruned_row("pruning r32 64->64 rho=0.33", WIDE, 2),
    pruned_row("pruning r32 64->64 rho=0.33, f + b", but(WIDE, backward=True), 2),
    pruned_row("pruning r256 1->8 random", RANDOM, 1),
    pruned_row("pruning r64 8->8 b4 shell 60%", SHELL_64, 1),
    pruned_row("pruning r64 8->8 b4 shell 60%, f + b", but(SHELL_64, backward=True), 1),
    pruned_row("pruning r16 8->8 random", Problem(16, 8), 1),
]
