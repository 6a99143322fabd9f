"""What the demonstration measures: training steps, sparse beside dense, and the sparse layers one by one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.layers import Layer
from benchmarks.timing import Candidate, side_by_side
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
            Layer(x, conv.sparse_kernel, conv.bias[...], capacity, backward=True)
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
