"""One convolution, computed by ilajax, by XLA's and PyTorch's dense convolutions, and by spconv.

Each gives a `Peer`: a call to be timed, and what it computes in a common form, so that who is timed is
first seen to compute the same.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from experiments.timing import Candidate, cores, quickest

TOLERANCE = 1e-4  # of the largest entry, for float32 sums in another order

LAYOUTS = {
    "channels last": ("NDHWC", "DHWIO", "NDHWC"),
    "channels first": ("NCDHW", "OIDHW", "NCDHW"),
}


class Peer(NamedTuple):
    """One way to compute a layer.

    Attributes:
      call: computes it.
      read: turns what `call` returns into ([B, *S, Cout] features, the kernel's gradient in Flax's layout
        or None).
    """

    call: Candidate
    read: Callable[[Any], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A 3-D convolution with bias, stride 1, padding "SAME" and, but for support="input", a ReLU.

    Attributes:
      x: the input.
      kernel: the filters.
      bias: float32[Cout].
      capacity: slots of the output; None with support="input".
      backward: whether the gradients of input, filters and bias are computed too.
      support: "dilate" or "input".
    """

    x: ilajax.SparseTensor
    kernel: ilajax.SparseKernel
    bias: jax.Array
    capacity: int | None
    backward: bool = False
    support: str = "dilate"

    def forward(
        self, x: ilajax.SparseTensor, kernel: ilajax.SparseKernel, bias: jax.Array
    ) -> ilajax.ops.conv.ConvResult:
        return ilajax.conv(x, kernel, bias, capacity=self.capacity, support=self.support)

    @functools.cached_property
    def output(self) -> ilajax.ops.conv.ConvResult:
        """What ilajax computes."""
        return jax.jit(self.forward)(self.x, self.kernel, self.bias)

    @functools.cached_property
    def cotangent(self) -> ilajax.SparseTensor:
        """1 at the output's stored sites. Dense networks get it scattered: then all gradients agree."""
        features = self.output.features
        return features.with_values(jnp.ones_like(features.values)).map(lambda v: v)

    @property
    def function(self) -> Callable[..., Any]:
        """What is timed, of `operands`."""

        def step(x, kernel, bias, g):
            def features(values, weights, bias):
                live = dataclasses.replace(kernel, values=weights)
                return self.forward(x.with_values(values), live, bias).features.values

            values, pull = jax.vjp(features, x.values, kernel.values, bias)
            return values, pull(g)

        return step if self.backward else self.forward

    @functools.cached_property
    def operands(self) -> tuple[Any, ...]:
        """Input, filters and bias; if it is differentiated, the cotangent too."""
        given = (self.x, self.kernel, self.bias)
        return (*given, self.cotangent.values) if self.backward else given

    @functools.cached_property
    def program(self) -> tuple[Any, tuple[Any, ...]]:
        """ilajax's compiled program, and its operands."""
        return jax.jit(self.function).lower(*self.operands).compile(), self.operands


def contest(layer: Layer, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, float]]:
    """ilajax, and those of `names` that are installed, ready to be timed.

    Returns:
      The calls by name, "ilajax" first, and by how much each of the others differs from it.

    Raises:
      RuntimeError: if one computes something else.
    """
    calls = {"ilajax": PEERS["ilajax"](layer).call}
    differences = {}
    for name in filter(installed, names):
        peer = PEERS[name](layer)
        difference = differences[name] = largest_difference(layer, peer)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{name} differs from ilajax by {difference:.2g} of the largest entry."
            )
        calls[name] = peer.call
    return calls, differences


def installed(name: str) -> bool:
    needs = {"PyTorch dense": ("torch",), "spconv": ("torch", "spconv")}
    return all(importlib.util.find_spec(package) for package in needs.get(name, ()))


def largest_difference(layer: Layer, peer: Peer) -> float:
    """How far a peer is from ilajax, at the sites that ilajax stores and in the kernel's gradient.

    In units of the largest entry. At other sites a peer has what the selection cut off.
    """
    ours = PEERS["ilajax"](layer)
    features, gradient = ours.read(ours.call())
    others, other_gradient = peer.read(peer.call())
    stored = np.asarray(ilajax.to_dense(layer.cotangent)) != 0
    difference = _difference(features[stored], others[stored])
    if gradient is not None and other_gradient is not None:
        live = gradient != 0  # pruned weights get no gradient
        difference = max(difference, _difference(gradient[live], other_gradient[live]))
    return difference


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-30))


def _ilajax(layer: Layer) -> Peer:
    compiled, operands = layer.program

    def read(result):
        if not layer.backward:
            return np.asarray(ilajax.to_dense(result.features)), None
        values, (_, weights, _) = result
        features = layer.output.features.with_values(values)
        gradient = dataclasses.replace(layer.kernel, values=weights).to_dense()
        return np.asarray(ilajax.to_dense(features)), np.asarray(gradient)

    return Peer(lambda: compiled(*operands), read)


def _xla_dense(layer: Layer) -> Peer:
    """`lax.conv_general_dilated` and a ReLU, in the quicker of two layouts."""
    found = {name: _xla_dense_in(layer, name) for name in LAYOUTS}
    return found[quickest({name: peer.call for name, peer in found.items()})]


def dense_function(
    layer: Layer, layout: str, precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
) -> Callable[..., Any]:
    """A layer as XLA's dense convolution and a ReLU, of `dense_operands`.

    Args:
      layer: the layer.
      layout: one of `LAYOUTS`.
      precision: by default float32 on a GPU too, as ilajax's sums.
    """
    first = layout == "channels first"

    def forward(x, w, bias):
        y = jax.lax.conv_general_dilated(
            *(x, w, (1, 1, 1), "SAME"), dimension_numbers=LAYOUTS[layout], precision=precision
        )
        return jax.nn.relu(y + bias.reshape((-1, 1, 1, 1) if first else (-1,)))

    def step(x, w, bias, g):
        y, pull = jax.vjp(forward, x, w, bias)
        return y, pull(g)

    return step if layer.backward else forward


def dense_operands(layer: Layer, layout: str) -> tuple[jax.Array, ...]:
    """A layer's operands as dense arrays."""
    w = layer.kernel.to_dense()
    if layout == "channels first":
        w = jnp.transpose(w, (4, 3, 0, 1, 2))
    operands = (dense_grid(layer.x, layout), w, layer.bias)
    return (*operands, dense_grid(layer.cotangent, layout)) if layer.backward else operands


def dense_grid(x: ilajax.SparseTensor, layout: str) -> jax.Array:
    """Features as a dense array."""
    grid = ilajax.to_dense(x)
    return jnp.moveaxis(grid, -1, 1) if layout == "channels first" else grid


def _xla_dense_in(layer: Layer, layout: str) -> Peer:
    first = layout == "channels first"
    operands = dense_operands(layer, layout)
    compiled = jax.jit(dense_function(layer, layout)).lower(*operands).compile()

    def read(result):
        y, w = (result[0], result[1][1]) if layer.backward else (result, None)
        if first:
            y, w = jnp.moveaxis(y, 1, -1), None if w is None else jnp.transpose(w, (2, 3, 4, 1, 0))
        return np.asarray(y), None if w is None else np.asarray(w)

    return Peer(lambda: compiled(*operands), read)


def _torch_dense(layer: Layer) -> Peer:
    """PyTorch's conv3d (oneDNN) and a ReLU on all cores, in the quicker of two memory formats."""
    torch = _torch()
    found = {
        str(f): _torch_dense_in(layer, f) for f in (torch.contiguous_format, torch.channels_last_3d)
    }
    return found[quickest({name: peer.call for name, peer in found.items()})]


def _torch_dense_in(layer: Layer, memory_format: Any) -> Peer:
    torch = _torch()

    def tensor(array):
        return torch.from_numpy(np.array(array)).contiguous(memory_format=memory_format)

    x = tensor(jnp.moveaxis(ilajax.to_dense(layer.x), -1, 1))
    w = tensor(jnp.transpose(layer.kernel.to_dense(), (4, 3, 0, 1, 2)))
    bias = torch.from_numpy(np.array(layer.bias))
    same = [size // 2 for size in layer.kernel.window_shape]

    def forward():
        return torch.relu(torch.nn.functional.conv3d(x, w, bias, padding=same))

    if layer.backward:
        g = tensor(jnp.moveaxis(ilajax.to_dense(layer.cotangent), -1, 1))
        operands = [operand.requires_grad_() for operand in (x, w, bias)]

    def call():
        torch.set_num_threads(cores())
        if layer.backward:
            y = forward()
            return y, torch.autograd.grad(y, operands, g)
        with torch.inference_mode():
            return forward()

    def read(result):
        y, w = (result[0], result[1][1]) if layer.backward else (result, None)
        y = y.detach().movedim(1, -1).numpy()
        return y, None if w is None else w.permute(2, 3, 4, 1, 0).numpy()

    return Peer(call, read)


def _spconv(layer: Layer) -> Peer:
    """SparseConv3d and a ReLU, or SubMConv3d, on the GPU or one core; each call builds its maps anew."""
    torch = _torch()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    import spconv.pytorch as spconv

    if not layer.x.shared or layer.backward:
        raise ValueError("spconv is timed on a shared support, forward only.")
    keys = np.asarray(layer.x.keys[:, 0])
    batch, slot = np.nonzero(keys < layer.x.sites)
    position = np.unravel_index(keys[batch, slot], layer.x.spatial_shape)
    indices = torch.from_numpy(np.stack([batch, *position], axis=1).astype(np.int32)).to(device)
    features = torch.from_numpy(np.asarray(layer.x.values)[batch, :, slot].copy()).to(device)
    cin, cout = layer.kernel.in_channels, layer.kernel.out_channels
    window = list(layer.kernel.window_shape)
    submanifold = layer.support == "input"
    padding = [size // 2 for size in window]
    module = (spconv.SubMConv3d if submanifold else spconv.SparseConv3d)(
        cin, cout, window, padding=padding, bias=True
    )
    with torch.no_grad():
        # Its layout is (Cout, *window, Cin).
        module.weight.copy_(
            torch.from_numpy(np.array(jnp.moveaxis(layer.kernel.to_dense(), -1, 0)))
        )
        module.bias.copy_(torch.from_numpy(np.array(layer.bias)))
    module.to(device)

    def call():
        torch.set_num_threads(1)
        with torch.no_grad():
            x = spconv.SparseConvTensor(
                features, indices, list(layer.x.spatial_shape), layer.x.batch_size
            )
            y = module(x)
            if not submanifold:
                y = y.replace_feature(torch.relu(y.features))
            if device == "cuda":
                torch.cuda.synchronize()
            return y

    def read(result):
        y = np.zeros((layer.x.batch_size, *layer.x.spatial_shape, cout), np.float32)
        y[tuple(result.indices.cpu().numpy().T)] = result.features.cpu().numpy()
        return y, None

    return Peer(call, read)


PEERS: dict[str, Callable[[Layer], Peer]] = {
    "ilajax": _ilajax,
    "XLA dense": _xla_dense,
    "PyTorch dense": _torch_dense,
    "spconv": _spconv,
}


@functools.cache
def _torch() -> Any:
    """PyTorch, imported so that spconv, which has an OpenMP of its own, runs on one thread.

    spconv's CPU path returns wrong rows on several. PyTorch is told its number of threads at each call.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    return torch
