"""What PyTorch does instead, on all cores of a CPU: dense layers (oneDNN), a network's steps, gathers."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.layers import Layer, Peer, Pooling, Timed
from benchmarks.timing import Candidate, cores

TOLERANCE = 1e-4  # of the largest logit


@functools.cache
def library() -> Any:
    """PyTorch, imported so that spconv, which has an OpenMP of its own, runs on one thread.

    spconv's CPU path returns wrong rows on several. PyTorch is told its number of threads at each call.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    return torch


def dense(layer: Timed) -> list[Peer]:
    """The layer of a dense network, in two memory formats where there is a grid."""
    torch = library()
    x, *others = layer.dense()
    g = others.pop() if layer.backward else None
    if isinstance(layer, Pooling):
        windows: Any = {"kernel_size": 2, "ceil_mode": True}
        if layer.overlapping:
            windows = {"kernel_size": 3, "stride": 2, "padding": 1}
        forward = functools.partial(torch.nn.functional.max_pool3d, **windows)
    elif x.ndim == 2:

        def forward(x, w, bias):
            return torch.relu(torch.nn.functional.linear(x, w, bias))
    else:
        submanifold = isinstance(layer, Layer) and layer.support == "input"

        def forward(x, w, bias):
            same = [size // 2 for size in w.shape[2:]]
            y = torch.nn.functional.conv3d(x, w, bias, padding=same)
            return y if submanifold else torch.relu(y)

    arrays = [_features(x)] + ([_filters(others[0]), np.array(others[1])] if others else [])

    def read(result):
        y, gradients = result if layer.backward else (result, None)
        y = np.moveaxis(y.detach().numpy(), 1, -1)
        if gradients is None:
            return y, None
        if isinstance(layer, Pooling):
            return y, np.moveaxis(gradients[0].numpy(), 1, -1)
        return y, np.moveaxis(gradients[-2].numpy(), (0, 1), (-1, -2))

    def peer(memory_format):
        def tensor(array):
            made = torch.from_numpy(array)
            return made.contiguous(memory_format=memory_format) if made.ndim == 5 else made

        given = [tensor(array) for array in arrays]
        cotangent = None if g is None else tensor(_features(g))
        return Peer(_call(forward, given, cotangent, layer.first), read)

    formats = (torch.contiguous_format, torch.channels_last_3d)
    return [peer(memory_format) for memory_format in (formats if x.ndim == 5 else formats[:1])]


def gather(layer: Layer) -> list[Peer]:
    """A submanifold convolution with its maps given: gather, matrix product and scatter for each tap."""
    torch = library()
    x, channels = layer.x, layer.kernel.out_channels
    sample, slot = np.nonzero(np.asarray(x.keys[:, 0]) < x.sites)
    maps = [tuple(map(torch.from_numpy, pair)) for pair in layer.pairs()]
    weights = np.array(layer.kernel.to_dense()).reshape(len(maps), -1, channels)
    rows = np.asarray(x.values)[sample, :, slot]
    given = [torch.from_numpy(a.copy()) for a in (rows, weights, np.asarray(layer.bias))]

    def forward(x, w, bias):
        y = x.new_zeros(len(x), channels)
        for (read, added), tap in zip(maps, w, strict=True):
            y.index_add_(0, added, x.index_select(0, read) @ tap)
        return y + bias

    def read(result):
        y, gradient = (result[0], result[1][1]) if layer.backward else (result, None)
        values = np.zeros((x.batch_size, channels, x.capacity), np.float32)
        values[sample, :, slot] = y.detach().numpy()
        window = (*layer.kernel.window_shape, x.channels, channels)
        weights = None if gradient is None else gradient.numpy().reshape(window)
        return x.with_values(jax.numpy.asarray(values)), weights

    g = torch.ones(len(rows), channels) if layer.backward else None
    return [Peer(_call(forward, given, g), read)]


def by_gathers(
    rows: np.ndarray,
    weights: np.ndarray,
    maps: list[tuple[np.ndarray, np.ndarray]],
    slots: int,
    backward: bool,
) -> Candidate:
    """Products over pairs of sites: gather, matrix product and scatter for each tap, without a bias.

    Args:
      rows: values of the stored sites, [K, Cin].
      weights: [taps, Cin, Cout].
      maps: for each tap the rows that it reads, and the rows of the result that it adds them to.
      slots: rows of the result.
      backward: whether the gradients of rows and weights are computed too, for cotangents of 1.
    """
    torch = library()
    pairs = [tuple(map(torch.from_numpy, pair)) for pair in maps]
    given = [torch.from_numpy(a.copy()) for a in (rows, weights)]

    def forward(x, w):
        y = x.new_zeros(slots, w.shape[2])
        for (read, added), tap in zip(pairs, w, strict=True):
            y.index_add_(0, added, x.index_select(0, read) @ tap)
        return y

    return _call(forward, given, torch.ones(slots, weights.shape[2]) if backward else None)


def _call(
    forward: Callable[..., Any], operands: list[Any], g: Any, first: bool = False
) -> Candidate:
    """Runs `forward`; with a cotangent gives the operands' gradients too, if `first` all but the input's."""
    torch = library()
    wanted = [operand.requires_grad_(g is not None) for operand in operands[first:]]

    def call():
        torch.set_num_threads(cores())
        with torch.inference_mode(g is None):
            y = forward(*operands)
            return y if g is None else (y, torch.autograd.grad(y, wanted, g))

    return call


def training_step(
    twin: nnx.Module, grid: np.ndarray, labels: np.ndarray, optimizer: str, rate: float
) -> Candidate:
    """A step of a network like the dense OctNet3, on float32[B, *S, 1]; channels last, with dropout.

    The network is first seen to compute what `twin` does.
    """
    torch = library()
    layout = {"memory_format": torch.channels_last_3d}
    x = torch.from_numpy(_features(grid)).contiguous(**layout)
    net = network(twin).to(**layout)
    twin.eval()
    expected = np.asarray(twin(jax.numpy.asarray(grid[:1])))
    twin.train()
    with torch.inference_mode():
        found = net.eval()(x[:1]).numpy()
    if not np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max():
        raise RuntimeError(f"PyTorch's network says {found}, and its twin {expected}.")
    rule = getattr(torch.optim, optimizer)(net.train().parameters(), lr=rate)
    wanted = torch.from_numpy(labels.astype(np.int64))

    def call() -> float:
        torch.set_num_threads(cores())
        rule.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), wanted)
        loss.backward()
        rule.step()
        return loss.item()

    return call


def network(twin: nnx.Module) -> Any:
    """A dense OctNet3 of three axes in PyTorch, with the same weights; takes [B, 1, *S]."""
    torch = library()

    class Flatten(torch.nn.Module):
        """In Flax's order, channels last, so that the weights behind it fit."""

        def forward(self, x: Any) -> Any:
            return x.movedim(1, -1).flatten(1)

    def copied(layer: Any, module: Any) -> Any:
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(_filters(layer.kernel[...])))
            module.bias.copy_(torch.from_numpy(np.array(layer.bias[...])))
        return module

    layers: list[Any] = []
    for index, block in enumerate(twin.blocks):
        if index:
            layers.append(torch.nn.MaxPool3d(2))
        for conv in (block.conv1, block.conv2, block.conv3):
            module = torch.nn.Conv3d(*conv.kernel[...].shape[-2:], 3, padding=1)
            layers += [copied(conv, module), torch.nn.ReLU()]
    layers += [Flatten(), torch.nn.Dropout(twin.dropout.rate)]
    for linear in (twin.hidden, twin.logits):
        module = torch.nn.Linear(*linear.kernel[...].shape)
        layers += [copied(linear, module), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def adagrad(weights: np.ndarray, gradient: np.ndarray, rate: float) -> Candidate:
    """An update of the weights, again and again by the same gradient; returns them."""
    torch = library()
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    parameter.grad = torch.from_numpy(gradient.copy())
    rule = torch.optim.Adagrad([parameter], lr=rate)

    def call() -> Any:
        torch.set_num_threads(cores())
        rule.step()
        return parameter.detach()

    return call


def _features(array: Any) -> np.ndarray:
    """Channels last to channels first."""
    return np.moveaxis(np.asarray(array), -1, 1).copy()


def _filters(array: Any) -> np.ndarray:
    """(*window, Cin, Cout) to (Cout, Cin, *window)."""
    return np.moveaxis(np.asarray(array), (-1, -2), (0, 1)).copy()
