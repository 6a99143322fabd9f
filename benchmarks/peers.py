"""A layer by ilajax, by XLA's and PyTorch's dense layers, by PyTorch's gathers, and by spconv."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from benchmarks import pytorch
from benchmarks.layers import (
    LAYOUTS,
    Features,
    Layer,
    Peer,
    Program,
    Timed,
    dense_layer,
    forward_and_backward,
)
from benchmarks.timing import Candidate, side_by_side

TOLERANCE = 1e-4  # of the largest entry, for float32 sums in another order

# Where XLA may round to TF32.
PRECISIONS = {"XLA dense": jax.lax.Precision.HIGHEST, "XLA dense, TF32": jax.lax.Precision.DEFAULT}


def comparison(layer: Timed, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, float]]:
    """ilajax, and those of `names` that are installed, ready to be timed, and how far each is from ilajax."""
    calls, differences = {"ilajax": layer.call}, {}
    for name in filter(installed, names):
        peer = quickest(PEERS[name](layer))
        differences[name] = checked_difference(layer, peer, peer.call(), name)
        calls[name] = peer.call
    return calls, differences


def installed(name: str) -> bool:
    needs = {"PyTorch": ["torch"], "spconv": ["torch", "spconv"]}.get(name.partition(" ")[0], [])
    return all(importlib.util.find_spec(package) for package in needs)


def checked_difference(layer: Timed, peer: Peer, result: Any, name: str) -> float:
    """How far a peer's result is from ilajax, in units of the largest entry; an error if that is far.

    Stored sites count, and the gradient. At other sites a peer has what the selection cut off.
    """
    features, gradient = layer.read(layer.call())
    others, other_gradient = peer.read(result)
    differences = [_difference_of_features(features, others)]
    if gradient is not None and other_gradient is not None:
        live = gradient != 0  # pruned weights and sites that are not stored get no gradient
        differences.append(_difference(gradient, jnp.where(live, other_gradient, 0)))
    difference = float(jnp.stack(differences).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{name} differs from ilajax by {difference:.2g} of the largest entry.")
    return difference


def _difference_of_features(features: Features, others: Features) -> jax.Array:
    if not isinstance(features, ilajax.SparseTensor):
        return _difference(features, jnp.asarray(others))
    if isinstance(others, ilajax.SparseTensor):
        return _difference(features.values, others.values)
    return _difference_at_sites(features, jnp.asarray(others))


@jax.jit
def _difference_at_sites(features: ilajax.SparseTensor, grid: jax.Array) -> jax.Array:
    flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
    keys = features.unshare().keys
    stored = keys < features.sites
    sites = jnp.moveaxis(jnp.where(stored, keys, 0), 1, 2)
    seen = jnp.moveaxis(jnp.take_along_axis(flat, sites, axis=1), 2, 1)
    return _difference(jnp.where(stored, features.values, 0), jnp.where(stored, seen, 0))


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.abs(a - b).max(initial=0) / jnp.maximum(jnp.abs(a).max(initial=0), 1e-30)


def quickest(found: Sequence[Peer]) -> Peer:
    """By one call each after one that warms up."""
    if len(found) == 1:
        return found[0]
    calls = {n: peer.call for n, peer in enumerate(found)}
    timings = side_by_side(calls, budget=0, rounds=1, least=1)
    return found[min(calls, key=timings.median)]


def dense(layer: Timed, layout: str, precision: jax.lax.Precision) -> Peer:
    """XLA's dense convolution and a ReLU."""
    first = layout == "channels first"

    def grid(features: Features) -> jax.Array:
        if isinstance(features, ilajax.SparseTensor):
            features = ilajax.to_dense(features)
        return jnp.moveaxis(features, -1, 1) if first else features

    def read(result: Any) -> tuple[Any, Any]:
        y, w = (result[0], result[1][-2]) if layer.backward else (result, None)
        if first:
            y, w = jnp.moveaxis(y, 1, -1), None if w is None else jnp.transpose(w, (2, 3, 4, 1, 0))
        return y, w

    x, w, bias, *g = layer.dense()
    w = jnp.transpose(w, (4, 3, 0, 1, 2)) if first else w
    operands = (grid(x), w, bias, *map(grid, g))
    forward = dense_layer(jax.lax.conv_general_dilated, layout, precision=precision)
    function = forward_and_backward(forward, layer.backward, layer.first)
    call = functools.partial(jax.jit(function), *operands)
    return Peer(call, read, Program(function, operands, grid))


def _xla_dense(layer: Timed) -> list[Peer]:
    """Float32, as ilajax's sums, in two layouts."""
    return [dense(layer, layout, PRECISIONS["XLA dense"]) for layout in LAYOUTS]


def _spconv(layer: Layer) -> list[Peer]:
    """SparseConv3d and a ReLU, or SubMConv3d, on the GPU or one core; each call builds its maps anew."""
    torch = pytorch.library()
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

    return [Peer(call, read)]


# Name -> the ways in which it computes a layer, of which the quickest counts.
PEERS: dict[str, Callable[[Any], list[Peer]]] = {
    "XLA dense": _xla_dense,
    "PyTorch dense": pytorch.dense,
    "PyTorch gather": pytorch.gather,
    "spconv": _spconv,
}
