"""One convolution, computed by ilajax, by XLA's and PyTorch's dense convolutions, and by spconv.

Each is a `Peer`: a call to be timed, and what it computes in a common form, so that who is timed is first
seen to compute the same.
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
from benchmarks.timing import Candidate, cores, side_by_side

TOLERANCE = 1e-4  # of the largest entry, for float32 sums in another order

LAYOUTS = {
    "channels last": ("NDHWC", "DHWIO", "NDHWC"),
    "channels first": ("NCDHW", "OIDHW", "NCDHW"),
}
# Where XLA may round to TF32.
PRECISIONS = {"XLA dense": jax.lax.Precision.HIGHEST, "XLA dense, TF32": jax.lax.Precision.DEFAULT}


class Program(NamedTuple):
    """What JAX compiles: a function of operands, of which `to_input` makes the first from another input."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    to_input: Callable[[ilajax.SparseTensor], Any] = lambda x: x


class Peer(NamedTuple):
    """Another way to compute a layer: `call`, which runs `program` if it is JAX's.

    `read` turns what `call` returns into ([B, *S, Cout] features, the kernel's gradient in Flax's layout or
    None).
    """

    call: Candidate
    read: Callable[[Any], tuple[Any, Any]]
    program: Program | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A 3-D convolution with bias, stride 1, padding "SAME" and, but for support="input", a ReLU.

    With `backward` the gradients of input, filters and bias are computed too. The output has `capacity`
    slots; with support="input" that is None.
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
        return jax.jit(self.forward)(self.x, self.kernel, self.bias)

    @functools.cached_property
    def cotangent(self) -> ilajax.SparseTensor:
        """1 at the output's stored sites. Dense networks get it scattered: then all gradients agree."""
        return self.output.features.map(jnp.ones_like)

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
        return jax.jit(self.function).lower(*self.operands).compile()

    def call(self) -> Any:
        return self.compiled(*self.operands)

    def read(self, result: Any) -> tuple[ilajax.SparseTensor, jax.Array | None]:
        """Features and the kernel's gradient, in Flax's layout, of what `call` returns."""
        if not self.backward:
            return result.features, None
        values, (_, weights, _) = result
        gradient = dataclasses.replace(self.kernel, values=weights).to_dense()
        return self.output.features.with_values(values), gradient


def comparison(layer: Layer, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, float]]:
    """ilajax, and those of `names` that are installed, ready to be timed, and how far each is from ilajax."""
    calls, differences = {"ilajax": layer.call}, {}
    for name in filter(installed, names):
        peer = PEERS[name](layer)
        differences[name] = checked_difference(layer, peer, peer.call(), name)
        calls[name] = peer.call
    return calls, differences


def installed(name: str) -> bool:
    needs = {"PyTorch dense": ("torch",), "spconv": ("torch", "spconv")}
    return all(importlib.util.find_spec(package) for package in needs.get(name, ()))


def checked_difference(layer: Layer, peer: Peer, result: Any, name: str) -> float:
    """How far a peer's result is from ilajax, in units of the largest entry; an error if that is far.

    Stored sites count, and the kernel's gradient. At other sites a peer has what the selection cut off.
    """
    features, gradient = layer.read(layer.call())
    grid, other_gradient = peer.read(result)
    differences = [_difference_of_features(features, jnp.asarray(grid))]
    if gradient is not None and other_gradient is not None:
        live = gradient != 0  # pruned weights get no gradient
        differences.append(_difference(gradient, jnp.where(live, other_gradient, 0)))
    difference = float(jnp.stack(differences).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{name} differs from ilajax by {difference:.2g} of the largest entry.")
    return difference


@jax.jit
def _difference_of_features(features: ilajax.SparseTensor, grid: jax.Array) -> jax.Array:
    flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
    keys = features.unshare().keys
    stored = keys < features.sites
    sites = jnp.moveaxis(jnp.where(stored, keys, 0), 1, 2)
    seen = jnp.moveaxis(jnp.take_along_axis(flat, sites, axis=1), 2, 1)
    return _difference(jnp.where(stored, features.values, 0), jnp.where(stored, seen, 0))


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.abs(a - b).max(initial=0) / jnp.maximum(jnp.abs(a).max(initial=0), 1e-30)


def _grid(x: ilajax.SparseTensor, layout: str) -> jax.Array:
    features = ilajax.to_dense(x)
    return jnp.moveaxis(features, -1, 1) if layout == "channels first" else features


def _operands(layer: Layer, layout: str) -> tuple[jax.Array, ...]:
    """Dense input, filters, bias, and if the layer is differentiated the cotangent."""
    w = layer.kernel.to_dense()
    if layout == "channels first":
        w = jnp.transpose(w, (4, 3, 0, 1, 2))
    operands = (_grid(layer.x, layout), w, layer.bias)
    return (*operands, _grid(layer.cotangent, layout)) if layer.backward else operands


def _read(layer: Layer, layout: str, result: Any) -> tuple[Any, Any]:
    """As `Peer.read`, of features, or of (features, (a gradient of each operand))."""
    y, w = (result[0], result[1][1]) if layer.backward else (result, None)
    if layout == "channels first":
        y, w = jnp.moveaxis(y, 1, -1), None if w is None else jnp.transpose(w, (2, 3, 4, 1, 0))
    return y, w


def _quickest(found: Sequence[Peer]) -> Peer:
    """By one call each after one that warms up."""
    calls = {n: peer.call for n, peer in enumerate(found)}
    timings = side_by_side(calls, budget=0, rounds=1, least=1)
    return found[min(calls, key=timings.median)]


def dense(layer: Layer, layout: str, precision: jax.lax.Precision) -> Peer:
    """XLA's dense convolution and a ReLU."""
    per_channel = (-1, 1, 1, 1) if layout == "channels first" else (-1,)

    def forward(x, w, bias):
        y = jax.lax.conv_general_dilated(
            *(x, w, (1, 1, 1), "SAME"), dimension_numbers=LAYOUTS[layout], precision=precision
        )
        return jax.nn.relu(y + bias.reshape(per_channel))

    def step(x, w, bias, g):
        y, pull = jax.vjp(forward, x, w, bias)
        return y, pull(g)

    function = step if layer.backward else forward
    operands = _operands(layer, layout)
    program = Program(function, operands, functools.partial(_grid, layout=layout))
    call = functools.partial(jax.jit(function), *operands)
    return Peer(call, functools.partial(_read, layer, layout), program)


def _xla_dense(layer: Layer) -> Peer:
    """Float32, as ilajax's sums, in the quicker of two layouts."""
    return _quickest([dense(layer, layout, PRECISIONS["XLA dense"]) for layout in LAYOUTS])


def _torch_dense(layer: Layer) -> Peer:
    """PyTorch's conv3d (oneDNN) and a ReLU on all cores, in the quicker of two memory formats."""
    torch = _torch()
    layout = "channels first"
    same = [size // 2 for size in layer.kernel.window_shape]

    def peer(memory_format: Any) -> Peer:
        def tensor(array):
            made = torch.from_numpy(np.array(array))
            return made.contiguous(memory_format=memory_format) if made.ndim == 5 else made

        x, w, bias, *g = map(tensor, _operands(layer, layout))
        given = [operand.requires_grad_(layer.backward) for operand in (x, w, bias)]

        def call():
            torch.set_num_threads(cores())
            with torch.inference_mode(not layer.backward):
                y = torch.relu(torch.nn.functional.conv3d(x, w, bias, padding=same))
                return (y, torch.autograd.grad(y, given, g)) if layer.backward else y

        def read(result):
            arrays = jax.tree.map(lambda tensor: tensor.detach().numpy(), result)
            return _read(layer, layout, arrays)

        return Peer(call, read)

    return _quickest([peer(torch.contiguous_format), peer(torch.channels_last_3d)])


def _spconv(layer: Layer) -> Peer:
    """SparseConv3d and a ReLU, or SubMConv3d, on the GPU or one core; each call builds its maps anew."""
    torch = _torch()
    import spconv.pytorch as spconv

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    x, shape = layer.x, list(layer.x.spatial_shape)
    keys = np.asarray(x.keys[:, 0])
    batch, slot = np.nonzero(keys < x.sites)
    position = np.unravel_index(keys[batch, slot], shape)
    indices = torch.from_numpy(np.stack([batch, *position], axis=1).astype(np.int32)).to(device)
    features = torch.from_numpy(np.asarray(x.values)[batch, :, slot].copy()).to(device)
    channels = layer.kernel.in_channels, layer.kernel.out_channels
    window = list(layer.kernel.window_shape)
    submanifold = layer.support == "input"
    module = (spconv.SubMConv3d if submanifold else spconv.SparseConv3d)(
        *channels, window, padding=[size // 2 for size in window], bias=True
    )
    weight = np.moveaxis(np.array(layer.kernel.to_dense()), -1, 0)  # (Cout, *window, Cin)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        module.bias.copy_(torch.from_numpy(np.array(layer.bias)))
    module.to(device)

    def call():
        torch.set_num_threads(1)
        with torch.no_grad():
            y = module(spconv.SparseConvTensor(features, indices, shape, x.batch_size))
            if not submanifold:
                y = y.replace_feature(torch.relu(y.features))
            if device == "cuda":
                torch.cuda.synchronize()
            return y

    def read(result):
        y = np.zeros((x.batch_size, *shape, channels[1]), np.float32)
        y[tuple(result.indices.cpu().numpy().T)] = result.features.cpu().numpy()
        return y, None

    return Peer(call, read)


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
