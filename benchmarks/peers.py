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
from benchmarks.timing import Candidate, cores, quickest

TOLERANCE = 1e-4  # of the largest entry, for float32 sums in another order

LAYOUTS = {
    "channels last": ("NDHWC", "DHWIO", "NDHWC"),
    "channels first": ("NCDHW", "OIDHW", "NCDHW"),
}


class Program(NamedTuple):
    """A peer that JAX compiles.

    Attributes:
      function: computes a layer, of `operands`.
      operands: the first of them is the input.
      to_input: turns another input into such an operand.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    to_input: Callable[[ilajax.SparseTensor], Any] = lambda x: x


class Peer(NamedTuple):
    """Another way to compute a layer.

    Attributes:
      call: computes it.
      read: turns what `call` returns into ([B, *S, Cout] features, the kernel's gradient in Flax's layout
        or None).
      program: what `call` runs, if it is JAX's.
    """

    call: Candidate
    read: Callable[[Any], tuple[Any, Any]]
    program: Program | None = None


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
    def compiled(self) -> jax.stages.Compiled:
        """ilajax's program."""
        return jax.jit(self.function).lower(*self.operands).compile()

    def call(self) -> Any:
        """Runs ilajax's program."""
        return self.compiled(*self.operands)

    def read(self, result: Any) -> tuple[ilajax.SparseTensor, jax.Array | None]:
        """Features and the kernel's gradient, in Flax's layout, of what `call` returns."""
        if not self.backward:
            return result.features, None
        values, (_, weights, _) = result
        gradient = dataclasses.replace(self.kernel, values=weights).to_dense()
        return self.output.features.with_values(values), gradient


def comparison(layer: Layer, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, float]]:
    """ilajax, and those of `names` that are installed, ready to be timed.

    Returns:
      The calls by name, "ilajax" first, and by how much each of the others differs from it.

    Raises:
      RuntimeError: if one computes something else.
    """
    calls: dict[str, Candidate] = {"ilajax": layer.call}
    differences = {}
    for name in filter(installed, names):
        peer = PEERS[name](layer)
        differences[name] = checked_difference(layer, peer, peer.call(), name)
        calls[name] = peer.call
    return calls, differences


def installed(name: str) -> bool:
    needs = {"PyTorch dense": ("torch",), "spconv": ("torch", "spconv")}
    return all(importlib.util.find_spec(package) for package in needs.get(name, ()))


def checked_difference(layer: Layer, peer: Peer, result: Any, name: str) -> float:
    """`largest_difference`, which must not be large."""
    difference = largest_difference(layer, peer, result)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{name} differs from ilajax by {difference:.2g} of the largest entry.")
    return difference


def largest_difference(layer: Layer, peer: Peer, result: Any) -> float:
    """How far what a peer's `call` returned is from ilajax: at stored sites, and in the kernel's gradient.

    In units of the largest entry. At other sites a peer has what the selection cut off.
    """
    features, gradient = layer.read(layer.call())
    grid, other_gradient = peer.read(result)
    differences = [_difference_of_features(features, jnp.asarray(grid))]
    if gradient is not None and other_gradient is not None:
        live = gradient != 0  # pruned weights get no gradient
        differences.append(_difference(gradient, jnp.where(live, other_gradient, 0)))
    return float(max(differences))


@jax.jit
def _difference_of_features(features: ilajax.SparseTensor, grid: jax.Array) -> jax.Array:
    flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
    stored = features.unshare().keys < features.sites
    sites = jnp.where(stored, features.unshare().keys, 0)
    seen = jnp.moveaxis(jnp.take_along_axis(flat, jnp.moveaxis(sites, 1, 2), axis=1), 2, 1)
    return _difference(jnp.where(stored, features.values, 0), jnp.where(stored, seen, 0))


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.abs(a - b).max(initial=0) / jnp.maximum(jnp.abs(a).max(initial=0), 1e-30)


def _xla_dense(layer: Layer, precision: jax.lax.Precision = jax.lax.Precision.HIGHEST) -> Peer:
    """`lax.conv_general_dilated` and a ReLU, in the quicker of two layouts."""
    found = {name: dense(layer, name, precision) for name in LAYOUTS}
    return found[quickest({name: peer.call for name, peer in found.items()})]


def dense(
    layer: Layer, layout: str, precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
) -> Peer:
    """XLA's dense convolution and a ReLU.

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

    def grid(x: ilajax.SparseTensor) -> jax.Array:
        features = ilajax.to_dense(x)
        return jnp.moveaxis(features, -1, 1) if first else features

    def read(result):
        y, w = (result[0], result[1][1]) if layer.backward else (result, None)
        if first:
            y, w = jnp.moveaxis(y, 1, -1), None if w is None else jnp.transpose(w, (2, 3, 4, 1, 0))
        return y, w

    w = layer.kernel.to_dense()
    operands = (grid(layer.x), jnp.transpose(w, (4, 3, 0, 1, 2)) if first else w, layer.bias)
    if layer.backward:
        operands = (*operands, grid(layer.cotangent))
    function = step if layer.backward else forward
    call = functools.partial(jax.jit(function), *operands)
    return Peer(call, read, Program(function, operands, grid))


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


# Where XLA may round to TF32.
PRECISIONS = {
    "XLA dense": jax.lax.Precision.HIGHEST,
    "XLA dense, TF32": jax.lax.Precision.DEFAULT,
}
PEERS: dict[str, Callable[[Layer], Peer]] = {
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
