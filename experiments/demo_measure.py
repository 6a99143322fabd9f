"""What the demonstration measures: training steps, sparse beside dense, and the sparse layers one by one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import peers
from benchmarks.timing import Candidate, cores, side_by_side
from experiments.activations import sparse_convs
from experiments.training import train_step

Input = Callable[[jax.Array], Any]


class Step(NamedTuple):
    """A training step, ready to be timed.

    Temporary are the bytes of what it computes on the way, activations above all; results those of what it
    leaves behind, weights and the optimizer's state. None where nothing tells.
    """

    call: Candidate
    temporary: int | None
    results: int | None


class LayerTimes(NamedTuple):
    """Seconds of a sparse convolution, forward and backward, and its live weights."""

    name: str
    weights_before: int
    weights_after: int
    before: float
    after: float


def steps(
    nets: Mapping[str, tuple[nnx.Module, nnx.Optimizer]],
    keys: np.ndarray,
    labels: np.ndarray,
    to_input: Input,
) -> dict[str, Step]:
    """The steps of nets that share one compiled program: they differ in what their arrays hold alone.

    A call trains: nothing else may look at the nets afterwards.
    """
    operands = (jnp.asarray(keys), jnp.asarray(labels), jnp.asarray(False))
    first = next(iter(nets.values()))
    compiled = train_step.lower(*first, *operands, to_input=to_input).compile()
    memory = compiled.memory_analysis()
    sizes = (memory.temp_size_in_bytes, memory.output_size_in_bytes) if memory else (None, None)
    return {
        name: Step(functools.partial(compiled, *net, *operands), *sizes)
        for name, net in nets.items()
    }


def torch_step(dense: nnx.Module, grid: np.ndarray, labels: np.ndarray, rate: float) -> Step:
    """The step in PyTorch, with all cores, of a network like the dense OctNet3, on float32[B, *S, 1]."""
    import torch

    net = torch_twin(dense)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    layout = {"memory_format": torch.channels_last_3d}
    x = torch.from_numpy(np.moveaxis(grid, -1, 1).copy()).contiguous(**layout)
    net = net.to(**layout)
    wanted = torch.from_numpy(labels.astype(np.int64))

    def call() -> float:
        torch.set_num_threads(cores())
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), wanted)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Step(call, None, None)


def torch_twin(dense: nnx.Module) -> Any:
    """The equal network in PyTorch, with the same weights; takes [B, 1, *S]."""
    import torch

    class Flatten(torch.nn.Module):
        """In Flax's order, channels last, so that the weights behind it fit."""

        def forward(self, x: Any) -> Any:
            return x.movedim(1, -1).flatten(1)

    def copied(layer: Any, module: Any, axes: tuple[int, ...]) -> Any:
        kernel = np.transpose(np.asarray(layer.kernel[...]), axes)
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(kernel.copy()))
            module.bias.copy_(torch.from_numpy(np.array(layer.bias[...])))
        return module

    layers: list[Any] = []
    for index, block in enumerate(dense.blocks):
        if index:
            layers.append(torch.nn.MaxPool3d(2))
        for conv in (block.conv1, block.conv2, block.conv3):
            features = conv.kernel[...].shape[-2:]
            module = torch.nn.Conv3d(*features, 3, padding=1)
            layers += [copied(conv, module, (4, 3, 0, 1, 2)), torch.nn.ReLU()]
    layers += [Flatten(), torch.nn.Dropout(dense.dropout.rate)]
    for linear in (dense.hidden, dense.logits):
        module = torch.nn.Linear(*linear.kernel[...].shape)
        layers += [copied(linear, module, (1, 0)), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def layer_times(
    initial: nnx.Module, trained: nnx.Module, maps: Mapping[str, Any], *, budget: float
) -> list[LayerTimes]:
    """Each sparse convolution with the filters before and after training, on the same real inputs.

    Every layer's input stands in `maps`, the `activations.feature_maps` of the trained net. The budget is
    of seconds for each layer and filter.
    """
    pairs = zip(sparse_convs(initial), sparse_convs(trained), strict=True)
    found = []
    for number, (before, after) in enumerate(pairs, 1):
        x = maps["input"] if number == 1 else maps[f"conv{number - 1}"]
        if number > 1 and number % 3 == 1:  # a block begins
            x = maps[f"pool{number // 3}"]
        capacity = maps[f"conv{number}"].capacity
        layers = [
            peers.Layer(x, conv.sparse_kernel, conv.bias[...], capacity, backward=True)
            for conv in (before, after)
        ]
        cotangent = jnp.ones_like(maps[f"conv{number}"].values)
        step = jax.jit(layers[0].function)
        calls = {
            name: functools.partial(step, layer.x, layer.kernel, layer.bias, cotangent)
            for name, layer in zip(("before", "after"), layers, strict=True)
        }
        timings = side_by_side(calls, budget=budget)
        counts = (int(layer.kernel.count) for layer in layers)
        found.append(
            LayerTimes(f"conv{number}", *counts, timings.median("before"), timings.median("after"))
        )
    return found


def sparse_weights(model: nnx.Module) -> int:
    """Live weights in the filters of the sparse layers."""
    return sum(int(conv.sparse_kernel.count) for conv in sparse_convs(model))
