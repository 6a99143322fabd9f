"""The rows of `experiments.bench`: what is computed, against whom, and how many times as fast it shall be."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ilajax
from experiments import mnist, peers, workloads
from experiments.data.mnist import load_mnist
from experiments.peers import Layer
from experiments.timing import Candidate
from experiments.training import train_step
from ilajax.models import OctNet3
from ilajax.models.octnet3 import TABLE_2


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is timed in a row.

    Attributes:
      candidates: name -> call; "ilajax" first, or what stands for it.
      facts: what else belongs to the row's record.
      layers: candidate -> the layer that it computes, so that its work can be counted.
    """

    candidates: Mapping[str, Candidate]
    facts: Mapping[str, Any]
    layers: Mapping[str, Layer] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      name: what is computed; unique.
      bars: opponent -> how many times as fast the first candidate shall be, at least; None: no bar.
      build: makes the contest.
    """

    name: str
    bars: Mapping[str, float | None]
    build: Callable[[], Contest]


def layer_row(name: str, bars: Mapping[str, float | None], make: Callable[[], Layer]) -> Row:
    """A row about one convolution, against the peers that `bars` names."""

    def build() -> Contest:
        layer = make()
        candidates, differences = peers.contest(layer, list(bars))
        facts = layer_facts(layer) | {"largest_difference": differences}
        return Contest(candidates, facts, {"ilajax": layer})

    return Row(name, bars, build)


def layer_facts(layer: Layer) -> dict[str, Any]:
    """What the work of a layer depends on, and its memory."""
    compiled, _ = layer.program
    memory = compiled.memory_analysis()
    return {
        "input_entries": int(layer.x.counts.sum()),
        "input_density": float(layer.x.density.mean()),
        "weights": int(layer.kernel.count),
        "capacity": layer.capacity,
        "output_entries": int(layer.output.features.counts.sum()),
        "responses_max": int(layer.output.responses.max()),
        "output_bytes": memory.output_size_in_bytes,
        "workspace_bytes": memory.temp_size_in_bytes,
    }


def random_layer(
    resolution: int, channels: int, *, kernel_density: float = 1.0, disjoint: bool = False
) -> Layer:
    """`channels` -> 8 on random sites of density 1 / resolution, which is the output's bound too."""
    x = workloads.random_sites(resolution, channels, disjoint=disjoint)
    kernel = workloads.kernel(channels, 8, density=kernel_density)
    return Layer(x, kernel, jnp.zeros(8), ilajax.capacity(1 / resolution, x.spatial_shape))


def shell_layer(
    resolution: int,
    batch: int = 1,
    *,
    bound: float,
    backward: bool = False,
    kernel_density: float = 1.0,
) -> Layer:
    """8 -> 8, every channel on a random 60 % of one shell."""
    x = workloads.shell(resolution, 8, batch=batch)
    kernel = workloads.kernel(8, 8, density=kernel_density)
    return Layer(x, kernel, jnp.zeros(8), ilajax.capacity(bound, x.spatial_shape), backward)


def shared_layer(resolution: int, *, support: str) -> Layer:
    """8 -> 8 on one shell that all channels share; a dilating output has twice as many slots."""
    x = workloads.shell(resolution, 8, subset=None)
    capacity = 2 * x.capacity if support == "dilate" else None
    return Layer(x, workloads.kernel(8, 8), jnp.zeros(8), capacity, support=support)


def surface_layer(x: ilajax.SparseTensor) -> Layer:
    """1 -> 8 on voxels of surfaces, with twice as many slots."""
    return Layer(x, workloads.kernel(1, 8), jnp.zeros(8), 2 * x.capacity)


def pruned_row(name: str, bar: float, make: Callable[[float], Layer]) -> Row:
    """A row about a layer with a tenth of its weights, against the same layer with all of them."""

    def build() -> Contest:
        layers = {"rho_f=0.1": make(0.1), "rho_f=1": make(1.0)}
        candidates = {name: peers.PEERS["ilajax"](layer).call for name, layer in layers.items()}
        facts = {name: layer_facts(layer) for name, layer in layers.items()}
        return Contest(candidates, facts, layers)

    return Row(name, {"rho_f=1": bar}, build)


def wide_layer(*, kernel_density: float, backward: bool = False) -> Layer:
    """64 -> 64 on a third of the sites of 32^3: arithmetic dominates."""
    x = workloads.random_sites(32, 64, density=0.33)
    kernel = workloads.kernel(64, 64, density=kernel_density)
    capacity = ilajax.capacity(0.33, x.spatial_shape)
    return Layer(x, kernel, jnp.zeros(64), capacity, backward)


def step_row(
    name: str, bar: float, make: Callable[[bool], Candidate], **others: Callable[[], Candidate]
) -> Row:
    """A row about one training step, against the dense twin's, and against `others` without a bar."""

    def build() -> Contest:
        candidates = {"ilajax": make(False), "dense twin": make(True)}
        return Contest(candidates | {name: other() for name, other in others.items()}, {})

    return Row(name, {"dense twin": bar} | dict.fromkeys(others), build)


def training_step(model: nnx.Module, images: Any, labels: np.ndarray, to_input: Any) -> Candidate:
    """One step of Adagrad, with dropout, as in `experiments.training`."""
    optimizer = nnx.Optimizer(model, mnist.make_transformation(0.01), wrt=nnx.Param)
    model.train()
    step = nnx.cached_partial(train_step, model, optimizer)
    parameters = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)]
    epoch_end = jnp.asarray(False)

    def call() -> Any:
        # The new weights are waited for too.
        return step(images, labels, epoch_end, to_input=to_input), [v[...] for v in parameters]

    return call


def solids_step(dense: bool, *, resolution: int = 64, batch: int = 8) -> Candidate:
    """OctNet3 on generated meshes; bounds are twice the surfaces' density, about 2 / r before any pooling."""
    x, labels = workloads.solids(resolution, batch=batch)
    blocks = len(TABLE_2[resolution].sparse)
    bounds = [min(1.0, 4 * 2**block / resolution) for block in range(blocks)]
    classes = len(workloads.SOLIDS)
    model = OctNet3(
        resolution, num_classes=classes, density_bounds=bounds, rngs=nnx.Rngs(0), dense=dense
    )
    return training_step(model, ilajax.to_dense(x) if dense else x, labels, _as_it_is)


def mnist_step(dense: bool, *, batch: int = 32) -> Candidate:
    """OctNet3-24^2 on digits, as in `experiments.mnist`."""
    digits = load_mnist()[0].threshold(mnist.PIXEL_THRESHOLD)
    to_input = mnist.dense_input if dense else mnist.SparseInput(int(digits.counts().max()))
    model = mnist.make_net(None if dense else 0.095, seed=0)
    return training_step(model, digits.images[:batch], digits.labels[:batch], to_input)


class Head(nnx.Module):
    """The dense layers of OctNet3-24^2, which the sparse net and its twin share."""

    def __init__(self, *, rngs: nnx.Rngs):
        net = mnist.make_net(None, seed=0)
        self.hidden, self.dropout, self.logits = net.hidden, net.dropout, net.logits

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits(self.dropout(nnx.relu(self.hidden(x))))


def mnist_head_step(*, batch: int = 32) -> Candidate:
    """The part of a step of OctNet3-24^2 that no convolution can make faster."""
    head = Head(rngs=nnx.Rngs(0))
    x = jnp.ones((batch, head.hidden.in_features))
    return training_step(head, x, np.zeros(batch, np.int32), _as_it_is)


def _as_it_is(x: Any) -> Any:
    return x


ROWS = [
    layer_row(
        "r256 1->8 random, rho_f=0.1",
        {"XLA dense": 200, "PyTorch dense": 20},
        lambda: random_layer(256, 1, kernel_density=0.1),
    ),
    layer_row(
        "r256 1->8 random, rho_f=1",
        {"XLA dense": 80, "PyTorch dense": 8},
        lambda: random_layer(256, 1),
    ),
    layer_row(
        "r64 8->8 b4 shell 60%, forward",
        {"XLA dense": 80, "PyTorch dense": 5},
        lambda: shell_layer(64, 4, bound=0.06),
    ),
    layer_row(
        "r64 8->8 b4 shell 60%, f + b",
        {"XLA dense": 80, "PyTorch dense": 3},
        lambda: shell_layer(64, 4, bound=0.06, backward=True),
    ),
    layer_row(
        "r128 8->8 disjoint random",
        {"PyTorch dense": 2},
        lambda: random_layer(128, 8, disjoint=True),
    ),
    layer_row("r128 8->8 shell", {"spconv": 3}, lambda: shared_layer(128, support="dilate")),
    layer_row(
        'r128 8->8 shell, support="input"',
        {"spconv": 1.5},
        lambda: shared_layer(128, support="input"),
    ),
    layer_row(
        "r64 1->8 b8 solids",
        {"XLA dense": None, "PyTorch dense": None},
        lambda: surface_layer(workloads.solids(64, batch=8)[0]),
    ),
    step_row("step OctNet3-64 b8 solids", 30, solids_step),
    step_row("step OctNet3-24 b32 MNIST", 3, mnist_step, head=mnist_head_step),
    pruned_row("pruning r32 64->64 rho=0.33", 2, lambda rho_f: wide_layer(kernel_density=rho_f)),
    pruned_row(
        "pruning r32 64->64 rho=0.33, f + b",
        2,
        lambda rho_f: wide_layer(kernel_density=rho_f, backward=True),
    ),
    pruned_row(
        "pruning r256 1->8 random", 1, lambda rho_f: random_layer(256, 1, kernel_density=rho_f)
    ),
    pruned_row(
        "pruning r64 8->8 b4 shell 60%",
        1,
        lambda rho_f: shell_layer(64, 4, bound=0.06, kernel_density=rho_f),
    ),
    pruned_row(
        "pruning r64 8->8 b4 shell 60%, f + b",
        1,
        lambda rho_f: shell_layer(64, 4, bound=0.06, kernel_density=rho_f, backward=True),
    ),
    pruned_row(
        "pruning r16 8->8 random", 1, lambda rho_f: random_layer(16, 8, kernel_density=rho_f)
    ),
]


def parts_rows(data_dir: Path) -> list[Row]:
    """Rows about real parts, see `workloads.parts`."""
    return [
        layer_row(
            f"r{resolution} 1->8 b8 parts",
            {"XLA dense": None, "PyTorch dense": None},
            lambda resolution=resolution: surface_layer(
                workloads.parts(resolution, data_dir, batch=8)[0]
            ),
        )
        for resolution in (32, 64)
    ]
