"""Calls of kernels, mapped and sharded as JAX maps and shards its own operations.

An op hands over two forms of the same function, `native(platform, groups, *operands)`, which calls a
target by `call`, and `reference(*operands)`, plain jax.numpy. `dispatch` then sees to it that

- each platform gets its kernel, and a platform without one gets the reference;
- `vmap` folds the mapped axis into the batch, so that the workspace does not multiply;
- under `shard_map` results vary over the devices that the operands vary over, so that gradients are
  summed and a false `out_specs` raises;
- a sharded batch is not gathered, neither under plain `jit` nor where types say how it is sharded;
- profiles and errors know it by its name.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ilajax.ffi import meshes, routes
from ilajax.ffi.meshes import Outputs
from ilajax.geometry import Window


def call(
    target: str, outputs: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, **attributes: Any
) -> Outputs:
    """Calls an FFI target; the results vary over the manual mesh axes that the operands vary over."""
    results = jax.ffi.ffi_call(target, outputs)(*operands, **attributes)
    axes = meshes.varying_axes(operands)
    return tuple(meshes.vary(result, axes) for result in results)


def window_attributes(window: Window) -> dict[str, np.ndarray]:
    """A window as attributes of a custom call."""
    return {
        field.name: np.array(getattr(window, field.name), np.int64)
        for field in dataclasses.fields(window)
    }


def dispatch(
    target: str,
    native: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    operands: Sequence[jax.Array],
    batched: Sequence[bool],
    sums: int = 0,
    limit: Callable[[str], str] = lambda platform: "",
) -> Outputs:
    """Calls `native` where the target has a kernel for the platform, else `reference`.

    Args:
      target: the FFI target's name, the same on every platform.
      native: a function of (platform, groups, *operands), where the batch holds `groups` independent calls,
        one behind the other.
      reference: a function of the operands, with one group.
      operands: arrays.
      batched: which operands lead with the batch axis.
      sums: how many results, the last ones, lead with groups instead of the batch: sums over each.
      limit: a function of the platform: why its kernel cannot do this, such as a window that is too large for
        the device; "" if it can.

    Returns:
      The results.
    """
    operation = target.removeprefix("ilajax_").removesuffix("_fwd").removesuffix("_bwd")
    here = routes.platforms()
    batched = tuple(batched)
    reference = _mapped_by_type(reference)
    branches = {
        platform: _fold(functools.partial(native, platform), batched, sums, 1)
        # An empty batch is no work to plan or to launch, and the reference's sums over it are 0.
        for platform in (here if _batch_size(operands, batched) != 0 else ())
        if routes.kernel_runs(operation, platform, functools.partial(limit, platform))
    }
    if not branches:
        chosen = reference
    elif len(branches) < len(here):
        chosen = functools.partial(jax.lax.platform_dependent, default=reference, **branches)
    elif len(here) == 1:
        chosen = branches[here[0]]
    else:
        chosen = functools.partial(jax.lax.platform_dependent, **branches)
    with jax.named_scope(f"ilajax.{operation}"):
        results = meshes.split_by_type(chosen, meshes.vary_together(*operands), batched, sums)
    gradient = "the gradient of " if target.endswith("_bwd") else ""
    _raise_nans(f"{gradient}ilajax.{operation}", results)
    return results


def _batch_size(operands: Sequence[jax.Array], batched: Sequence[bool]) -> int:
    return next(o.shape[0] for o, leads in zip(operands, batched, strict=True) if leads)


def _raise_nans(operation: str, results: Outputs) -> None:
    """What `jax.debug_nans` does for JAX's own operations; what custom_vmap wraps, it does not see.

    Under `jit` JAX looks at results of the whole program, and calls Python again to find out where NaN arose.
    """
    for kind, is_kind in (("nan", np.isnan), ("inf", np.isinf)):
        for result in results if getattr(jax.config, f"jax_debug_{kind}s") else ():
            if isinstance(result, jax.core.Tracer) or not result.is_fully_addressable:
                continue
            if jnp.issubdtype(result.dtype, jnp.floating) and is_kind(np.asarray(result)).any():
                raise FloatingPointError(f"invalid value ({kind}) encountered in {operation}")


def _mapped_by_type(reference: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """A form of `reference` whose vmap rule leaves an axis where it is that types say is sharded."""

    @custom_vmap
    def function(*operands):
        return reference(*operands)

    @function.def_vmap
    def rule(axis_size, mapped, *operands):
        run = jax.vmap(reference, tuple(0 if m else None for m in mapped))
        results = meshes.split_by_type(run, operands, mapped)
        return results, tuple(True for _ in results)

    return function


def _fold(
    native: Callable[..., Outputs], batched: tuple[bool, ...], sums: int, groups: int
) -> Callable[..., Outputs]:
    """A form of `native` whose vmap rule folds the mapped axis into the batch."""

    @custom_vmap
    def function(*operands):
        if meshes.may_be_split_by_compiler():
            return meshes.split_by_compiler(native, operands, batched, sums, groups)
        return native(groups, *operands)

    def one_by_one(mapped, *operands):
        # Filters of their own: one call after the other, which share one workspace.
        def one(chosen):
            own = iter(chosen)
            return function(*(next(own) if m else o for o, m in zip(operands, mapped, strict=True)))

        return jax.lax.map(one, tuple(o for o, m in zip(operands, mapped, strict=True) if m))

    def folded(mapped, *operands):
        axis_size = next(o.shape[0] for o, m in zip(operands, mapped, strict=True) if m)

        def into_batch(operand, leads, m):
            if not leads:
                return operand
            if not m:
                operand = jnp.broadcast_to(operand, (axis_size, *operand.shape))
            return operand.reshape(-1, *operand.shape[2:])

        run = _fold(native, batched, sums, groups * axis_size)
        results = run(*map(into_batch, operands, batched, mapped))
        return tuple(r.reshape(axis_size, -1, *r.shape[1:]) for r in results)

    @function.def_vmap
    def rule(axis_size, mapped, *operands):
        can_fold = all(leads or not m for leads, m in zip(batched, mapped, strict=True))
        run = functools.partial(folded if can_fold else one_by_one, mapped)
        results = meshes.split_by_type(run, operands, mapped)
        return results, tuple(True for _ in results)

    return function
