"""Calls of kernels, mapped and sharded as JAX maps and shards its own operations.

An op hands over two forms of the same function, `native(platform, groups, *operands)`, which calls a
target by `call`, and `reference(*operands)`, plain jax.numpy. `dispatch` then sees to it that

- each platform gets its kernel, and a platform without one gets the reference;
- `vmap` folds the mapped axis into the batch, so that the workspace does not multiply;
- under `shard_map` results vary over the devices that the operands vary over, so that gradients are
  summed and a false `out_specs` raises;
- plain `jit` over a sharded batch does not gather it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ilajax.ffi import routes
from ilajax.geometry import Window

Outputs = tuple[jax.Array, ...]


def call(
    target: str, outputs: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, **attributes: Any
) -> Outputs:
    """Calls an FFI target; the results vary over the manual mesh axes that the operands vary over."""
    results = jax.ffi.ffi_call(target, outputs)(*operands, **attributes)
    axes = _varying_axes(operands)
    return tuple(_vary(result, axes) for result in results)


def window_attributes(window: Window) -> dict[str, np.ndarray]:
    """A window as attributes of a custom call."""
    return {
        field.name: np.array(getattr(window, field.name), np.int64)
        for field in dataclasses.fields(window)
    }


def vary_together(*operands: jax.Array) -> Outputs:
    """Casts all operands to vary over the manual mesh axes that any of them varies over."""
    axes = _varying_axes(operands)
    return tuple(_vary(operand, axes) for operand in operands)


def dispatch(
    target: str,
    native: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    operands: Sequence[jax.Array],
    batched: Sequence[bool],
    limit: Callable[[str], str] = lambda platform: "",
) -> Outputs:
    """Calls `native` where the target has a kernel for the platform, else `reference`.

    Args:
      target: the FFI target's name, the same on every platform.
      native: a function of (platform, groups, *operands). Results that lead with the batch axis keep it;
        others lead with `groups`: the batch then holds `groups` independent calls, one behind the other.
      reference: a function of the operands, with one group.
      operands: arrays.
      batched: which operands lead with the batch axis.
      limit: a function of the platform: why its kernel cannot do this, such as a window that is too large for
        the device; "" if it can.

    Returns:
      The results.
    """
    operands = vary_together(*operands)
    operation = target.removeprefix("ilajax_").removesuffix("_fwd").removesuffix("_bwd")
    here = routes.platforms()
    branches = {
        platform: _fold(functools.partial(native, platform), tuple(batched), 1)
        for platform in here
        if routes.kernel_runs(operation, platform, functools.partial(limit, platform))
    }
    if not branches:
        return reference(*operands)
    if len(branches) < len(here):
        return jax.lax.platform_dependent(*operands, default=reference, **branches)
    if len(here) == 1:
        return branches[here[0]](*operands)
    return jax.lax.platform_dependent(*operands, **branches)


def _fold(
    native: Callable[..., Outputs], batched: tuple[bool, ...], groups: int
) -> Callable[..., Outputs]:
    """A form of `native` whose vmap rule folds the mapped axis into the batch."""

    @custom_vmap
    def function(*operands):
        if _may_be_sharded():
            return _partition(native, batched, groups, operands)
        return native(groups, *operands)

    @function.def_vmap
    def rule(axis_size, mapped, *operands):
        unmapped_batch = tuple(leads or not m for leads, m in zip(batched, mapped, strict=True))
        if not all(unmapped_batch):
            # Filters of their own: one call after the other, which share one workspace.
            def one(chosen):
                own = iter(chosen)
                return function(
                    *(next(own) if m else o for o, m in zip(operands, mapped, strict=True))
                )

            results = jax.lax.map(one, tuple(o for o, m in zip(operands, mapped, strict=True) if m))
            return results, tuple(True for _ in results)
        folded = []
        for operand, leads, m in zip(operands, batched, mapped, strict=True):
            if leads:
                if not m:
                    operand = jnp.broadcast_to(operand, (axis_size, *operand.shape))
                operand = operand.reshape(-1, *operand.shape[2:])
            folded.append(operand)
        results = _fold(native, batched, groups * axis_size)(*folded)
        unfolded = tuple(r.reshape(axis_size, -1, *r.shape[1:]) for r in results)
        return unfolded, tuple(True for _ in unfolded)

    return function


def _may_be_sharded() -> bool:
    # Only then: a partitioned call is more than XLA's persistent compilation cache takes.
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def _partition(
    native: Callable[..., Outputs], batched: tuple[bool, ...], groups: int, operands: Outputs
) -> Outputs:
    """Calls `native` so that XLA splits it along a sharded batch, where it would gather the operands.

    Results that lead with groups are sums over the batch: one group is added up over the shards, and of
    several each shard has its own.
    """
    shapes = jax.eval_shape(functools.partial(native, groups), *operands)
    batch = next(o.shape[0] for o, leads in zip(operands, batched, strict=True) if leads)
    led = tuple(shape.shape[0] == batch for shape in shapes)

    @custom_partitioning
    def function(*operands):
        return native(groups, *operands)

    def partition(mesh, operand_shapes, result_shapes):
        axis = next(
            _leading_axis(shape)
            for shape, leads in zip(operand_shapes, batched, strict=True)
            if leads
        )
        shards = math.prod(mesh.shape[name] for name in _names(axis))
        if groups > 1 and groups % shards:
            axis, shards = None, 1
        split, whole = (NamedSharding(mesh, PartitionSpec(a)) for a in (axis, None))

        def lower(*operands):
            results = native(max(groups // shards, 1), *operands)
            if groups > 1 or shards == 1:
                return results
            return tuple(
                result if leads else jax.lax.psum(result, axis)
                for result, leads in zip(results, led, strict=True)
            )

        operand_shardings = tuple(split if leads else whole for leads in batched)
        result_shardings = tuple(split if leads or groups > 1 else whole for leads in led)
        return mesh, lower, result_shardings, operand_shardings

    rule = _sharding_rule(operands, batched, shapes, led, groups)
    # The rule's reader takes sizes of just those factors that are never a whole axis.
    sizes = {"b": batch // groups} if 1 < groups < batch else {}
    if 1 < groups < batch and all(led):
        sizes["g"] = groups
    function.def_partition(partition, sharding_rule=rule, **sizes)
    return function(*operands)


def _sharding_rule(
    operands: Sequence[Any],
    batched: Sequence[bool],
    results: Sequence[Any],
    led: Sequence[bool],
    groups: int,
) -> str:
    """Says that the batch axes go together, and every other axis stands for itself."""
    own = (f"a{i}" for i in itertools.count())
    sizes = {o.shape[0] for o, leads in zip(operands, batched, strict=True) if leads}
    batch = "b" if groups == 1 else "g" if groups in sizes else "(g b)"

    def side(arrays, leads):
        return ", ".join(
            " ".join([lead, *itertools.islice(own, a.ndim - 1)])
            for a, lead in zip(arrays, leads, strict=True)
        )

    left = side(operands, [batch if leads else next(own) for leads in batched])
    group = "g" if groups > 1 else None
    right = side(results, [batch if leads else group or next(own) for leads in led])
    return f"{left} -> {right}"


def _leading_axis(shape: Any) -> Any:
    spec = shape.sharding.spec
    return spec[0] if spec else None


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _varying_axes(operands: Sequence[jax.Array]) -> frozenset[str]:
    return frozenset().union(*(_varying(operand) for operand in operands))


def _varying(operand: jax.Array) -> frozenset[str]:
    return jax.typeof(operand).manual_axis_type.varying


def _vary(operand: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varying(operand)))
    return jax.lax.pcast(operand, missing, to="varying") if missing else operand
