"""What stands between the layers of a network: its feature maps, their densities and their bytes."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ilajax
from experiments.frame import Cells

Maps = dict[str, Any]


def feature_maps(model: nnx.Module, x: Any) -> Maps:
    """The input, and what every convolution (with its activation) and pooling puts out.

    The model, an OctNet3, sparse or dense, stays as it is: nothing is measured, and no dropout draws.

    Returns SparseTensors, or arrays [B, *S, C], by name: "input", "conv1", ..., "pool1", ...
    """
    return _feature_maps(*nnx.split(model), x)


@functools.partial(jax.jit, static_argnums=0)
def _feature_maps(structure: nnx.GraphDef, state: nnx.State, x: Any) -> Maps:
    model = nnx.merge(structure, state)
    _, captured = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
    outputs = {path[:-1]: value.get_value() for path, value in nnx.to_flat_state(captured)}
    maps = {"input": x}
    for number, path in enumerate(_paths(model, ilajax.nn.Conv, nnx.Conv), 1):
        (output,) = outputs[path]
        sparse = isinstance(output, ilajax.SparseTensor)
        maps[f"conv{number}"] = output if sparse else nnx.relu(output)
    for number in range(1, len(model.blocks)):
        # A block has three convolutions, and a pooling stands before the next one.
        last = maps[f"conv{3 * number}"]
        if isinstance(last, ilajax.SparseTensor):
            maps[f"pool{number}"] = model.pool(last)
        else:
            window = (2,) * (last.ndim - 2)
            maps[f"pool{number}"] = nnx.max_pool(last, window, strides=window)
    return maps


def sparse_convs(model: nnx.Module) -> list[ilajax.nn.Conv]:
    """The sparse convolutions, in the order of the layers."""
    return [conv for _, conv in sorted(ilajax.nn.iter_convs(model))]


def sparse_densities(model: nnx.Module) -> dict[str, float]:
    """Response density of each sparse convolution as it measured it last, before the selection."""
    densities = (float(conv.density[...].mean()) for conv in sparse_convs(model))
    return {f"conv{n}": density for n, density in enumerate(densities, 1)}


def dense_densities(x: jax.Array, model: nnx.Module) -> dict[str, float]:
    """Share of the activations above 0 behind each convolution of a dense network."""
    maps = feature_maps(model, x)
    return {
        name: float(jnp.mean(output > 0))
        for name, output in maps.items()
        if name.startswith("conv")
    }


def layer_cuts(model: nnx.Module, x: Any) -> list[dict[str, Any]]:
    """The layers with a density bound: the share of the sites before their selection, and behind it."""
    convs = {path: conv for path, conv in sorted(ilajax.nn.iter_convs(model)) if conv.density_bound}
    densities = _densities(*nnx.split(model), x, tuple(convs))
    return [
        {
            "layer": ".".join(map(str, path)),
            "bound": conv.density_bound,
            "density": float(before),
            "kept": float(kept),
        }
        for (path, conv), (before, kept) in zip(convs.items(), densities, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _densities(structure: nnx.GraphDef, state: nnx.State, x: Any, paths: tuple[Any, ...]) -> Any:
    model = nnx.merge(structure, state)
    _, captured = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
    outputs = {path[:-1]: value.get_value() for path, value in nnx.to_flat_state(captured)}
    convs = dict(ilajax.nn.iter_convs(model))
    return [(convs[path].density[...].mean(), outputs[path][0].density.mean()) for path in paths]


def cut_cells(nets: Iterable[tuple[str, list[dict[str, Any]]]]) -> list[Cells]:
    """A head, then a line for each of the `layer_cuts` of each named net."""
    cells: list[Cells] = [("net", "layer", "bound", "density", "kept", "cut")]
    for net, layers in nets:
        for layer in layers:
            shares = (f"{layer[name]:.1%}" for name in ("bound", "density", "kept"))
            # A layer without responses loses none.
            cut = 1 - layer["kept"] / layer["density"] if layer["density"] else 0.0
            cells.append((net, layer["layer"], *shares, f"{max(0.0, cut):.1%}"))
    return cells


def activation_bytes(model: nnx.Module, x: Any) -> int:
    """Bytes of all feature maps, from the shapes of their keys and values, or of dense arrays.

    Of what the model takes, `x`, shapes and dtypes suffice.
    """
    structure, state = nnx.split(model)
    maps = jax.eval_shape(functools.partial(_feature_maps, structure), state, x)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(maps))


def paired_channels(
    dense: Maps, sparse: Maps, names: list[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each named map the channel that is strong in both networks, as images [B, *S]."""
    pairs = []
    for name in names:
        a, b = np.asarray(dense[name]), np.asarray(ilajax.to_dense(sparse[name]))
        strength = [m.mean(axis=tuple(range(m.ndim - 1))) for m in (a, b)]
        channel = int(np.argmax(strength[0] * strength[1]))
        pairs.append((a[..., channel], b[..., channel]))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _paths(model: nnx.Module, *kinds: type) -> list[tuple[Any, ...]]:
    """Paths of the modules of some kinds, in the order of the layers."""
    return sorted(path for path, module in nnx.iter_graph(model) if isinstance(module, kinds))
