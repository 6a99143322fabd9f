"""Loads the weights of a network that was trained with spconv."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ilajax.nn.conv import Conv, ConvTranspose
from ilajax.nn.load_state import raise_if
from ilajax.sparse_kernel import SparseKernel

# How a version of spconv stores a filter, as axes (*window, Cin, Cout) of rank n are found in it.
LAYOUTS = ("KRSC", "RSKC", "RSCK")
# The names in a PyTorch module -> those in the NNX module.
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def load_spconv(
    model: Any,
    state_dict: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    layout: str = "KRSC",
) -> None:
    """Loads a state dict of spconv and PyTorch modules into a model of the same layers, in place.

    A module is found by its name: "encoder.0.weight" belongs to `model.encoder.layers[0]` if `encoder` is an
    `nnx.Sequential`, to `model.encoder[0]` if it is a list. What is converted:

    | PyTorch | ilajax, Flax | arrays |
    |---|---|---|
    | `SubMConv`, `SparseConv` | `Conv` | weight (Cout, *window, Cin) -> kernel, as it is; bias |
    | `SparseInverseConv`, `SparseConvTranspose` | `ConvTranspose` | the same, flipped along the window |
    | `BatchNorm1d` | `BatchNorm` | weight -> scale, bias, running_mean -> mean, running_var -> var |
    | `LayerNorm`, `GroupNorm` | the same | weight -> scale, bias |
    | `Linear` | `nnx.Linear` | weight (out, in) -> kernel (in, out), bias |

    In spconv every site gets the bias; here a response of exactly 0 stays 0. Behind a normalisation there is
    no difference, since layers have no bias there.

    Args:
      model: an NNX module, built with filters that are full (`kernel_density=1`).
      state_dict: `module.state_dict()`: names and tensors, or arrays.
      rename: parts of names that differ, such as {"conv_input": "stem"}, the first that matches a beginning.
      layout: how filters are stored: "KRSC", (Cout, *window, Cin), by spconv 2.1 and later; older files may
        have "RSKC", (*window, Cout, Cin), or "RSCK", (*window, Cin, Cout).

    Raises:
      ValueError: naming what the model does not have, what the state dict does not have, and what differs in
        shape. Nothing is changed then.

    Example:
      >>> layer = ilajax.nn.Conv(2, 4, (3, 3, 3), support="input", use_bias=False, rngs=nnx.Rngs(0))
      >>> ilajax.nn.load_spconv(
      ...     nnx.Sequential(layer), {"0.weight": np.ones((4, 3, 3, 3, 2), np.float32)}
      ... )
      >>> float(layer.kernel[...].sum())
      216.0
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}.")
    loaded: dict[int, tuple[nnx.Variable, Any, str]] = {}
    unknown, unfit = [], []
    for name, tensor in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        module_name, _, parameter = _renamed(name, rename or {}).rpartition(".")
        module = _find(model, module_name)
        array = np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else tensor)
        try:
            converted = _converted(module, parameter, array, layout)
        except _NoSuchPlaceError:
            unknown.append(name)
            continue
        for variable, value in converted:
            if variable.shape != value.shape:
                unfit.append(f"{name} (of shape {array.shape}, for {type(module).__name__})")
            loaded[id(variable)] = (variable, value, name)
    raise_if("belong to no layer of the model: rename them, or add the layer", unknown)
    raise_if("do not fit their layers", unfit)
    wanted = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    missing = [path for path, variable in wanted if not _is_among(model, path, loaded)]
    raise_if("are missing, which the model has", (".".join(map(str, path)) for path in missing))
    for variable, value, _ in loaded.values():
        variable.set_value(jnp.asarray(value, variable.dtype))


class _NoSuchPlaceError(Exception):
    """A parameter that a module does not have."""


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for old, new in rename.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _find(model: Any, name: str) -> Any:
    """The module of a dotted name; None if there is none."""
    module = model
    for part in filter(None, name.split(".")):
        if part.isdigit():
            items = module.layers if isinstance(module, nnx.Sequential) else module
            if not isinstance(items, Iterable) or int(part) >= len(list(items)):
                return None
            module = list(items)[int(part)]
        else:
            module = getattr(module, part, None)
    return module


def _converted(
    module: Any, parameter: str, array: np.ndarray, layout: str
) -> list[tuple[nnx.Variable, np.ndarray]]:
    """The variables that an array is for, and their values."""
    if isinstance(module, Conv) and parameter == "weight":
        return _filter(module, array, layout)
    if isinstance(module, nnx.Linear) and parameter == "weight":
        return [(module.kernel, array.T)]
    norms = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm)
    name = NORM.get(parameter) if isinstance(module, norms) else parameter
    variable = getattr(module, name, None) if name in ("scale", "bias", "mean", "var") else None
    if variable is None:
        raise _NoSuchPlaceError
    return [(variable, array)]


def _filter(conv: Conv, array: np.ndarray, layout: str) -> list[tuple[nnx.Variable, np.ndarray]]:
    if layout == "KRSC":
        array = np.moveaxis(array, 0, -1)
    elif layout == "RSKC":
        array = np.swapaxes(array, -1, -2)
    if isinstance(conv, ConvTranspose):
        array = np.flip(array, tuple(range(array.ndim - 2)))
    if array.shape != conv.kernel_shape:
        return [(conv.kernel, array)]  # which does not fit
    kernel = SparseKernel.from_dense(jnp.asarray(array))
    return [(conv.kernel, np.asarray(kernel.values)), (conv.kernel_keys, np.asarray(kernel.keys))]


def _is_among(model: Any, path: tuple[Any, ...], loaded: Mapping[int, Any]) -> bool:
    node = model
    for part in path:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    return id(node) in loaded
