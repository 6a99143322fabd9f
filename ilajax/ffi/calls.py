"""Calls of kernels, mapped and sharded as JAX maps and shards its own operations.

An op names a target, whose kernel each platform has, and hands over the same function in plain jax.numpy, its
reference. `dispatch` then sees to it that

- each platform gets its kernel, with a plan and a workspace, and a platform without one gets the reference;
- `vmap` folds the mapped axis into the batch, so that the workspace does not multiply;
- under `shard_map` results vary over the devices that the operands vary over, so that gradients are
  summed and a false `out_specs` raises;
- a sharded batch is not gathered, neither under plain `jit` nor where types say how it is sharded;
- profiles and errors know it by its name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ilajax.ffi import meshes, plans, routes
from ilajax.ffi.meshes import Outputs
from ilajax.geometry import Window


def result(shape: Sequence[Any], dtype: Any) -> jax.ShapeDtypeStruct:
    """What an op returns for one sample, or as a sum over samples."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def dispatch(
    target: str,
    reference: Callable[..., Outputs],
    operands: Sequence[jax.Array],
    batched: Sequence[bool],
    each: Sequence[jax.ShapeDtypeStruct],
    sums: Sequence[jax.ShapeDtypeStruct] = (),
    *,
    window: Window | None = None,
    mapped: "SiteMap | None" = None,
    **attributes: Any,
) -> Outputs:
    """Calls a target where it has a kernel for the platform, else the reference.

    Args:
      target: the FFI target's name, the same on every platform.
      reference: a function of the operands.
      operands: arrays.
      batched: which operands lead with the batch axis.
      each: the results, for one sample.
      sums: further results, which are sums over the batch. All results lead with one more axis: the batch, or
        of sums the groups, independent calls that stand in the batch one behind the other, of which the
        reference has one.
      window: the window, if the target goes by one.
      mapped: what the target may want a site map of. A kernel gets it as its last operand.
      attributes: what else the target takes.

    Returns:
      The results.
    """
    operation = target.removeprefix("ilajax_").removesuffix("_fwd").removesuffix("_bwd")
    here = routes.platforms()
    batched = tuple(batched)
    kernel = _Kernel(target, batched, tuple(each), tuple(sums), window, attributes, mapped)
    reference = _mapped_by_type(reference)
    branches = {
        platform: _fold(functools.partial(kernel.call, platform), batched, len(sums), 1)
        # An empty batch is no work to plan or to launch, and the reference's sums over it are 0.
        for platform in (here if _batch_size(operands, batched) != 0 else ())
        if routes.kernel_runs(
            operation, platform, functools.partial(kernel.limit, platform, operands)
        )
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
        results = meshes.split_by_type(chosen, meshes.vary_together(*operands), batched, len(sums))
    gradient = "the gradient of " if target.endswith("_bwd") else ""
    _raise_nans(f"{gradient}ilajax.{operation}", results)
    return results


class SiteMap(NamedTuple):
    """Which stored sites a window reads at the sites of another support (xla_kernels/site_map/spec.h).

    Layers that share both supports share the map: XLA makes equal calls once.
    """

    window: Window
    keys: int  # the operand that has the keys that the window reads,
    out_keys: int  # and those of the sites where it stands

    def find(self, platform: str, operands: Sequence[jax.Array], words: int) -> jax.Array:
        """The map int32[B, words, slots], an empty one without words."""
        if words == 0:
            return jnp.zeros((0, 0, 0), jnp.int32)
        keys = (operands[self.keys], operands[self.out_keys])
        each = (result((words, keys[1].shape[2]), jnp.int32),)
        kernel = _Kernel("ilajax_site_map_fwd", (True, True), each, (), self.window, {})
        with jax.named_scope("ilajax.site_map"):
            return kernel.call(platform, 1, *keys)[0]


class _Kernel(NamedTuple):
    """A target, and what `dispatch` was told of it."""

    target: str
    batched: tuple[bool, ...]
    each: tuple[jax.ShapeDtypeStruct, ...]
    sums: tuple[jax.ShapeDtypeStruct, ...]
    window: Window | None
    attributes: dict[str, Any]
    mapped: SiteMap | None = None

    def call(self, platform: str, groups: Any, *operands: jax.Array) -> Outputs:
        """Calls the kernel; the results vary over the manual mesh axes that the operands vary over."""
        outputs, plan = self._plan(platform, groups, operands)
        attributes = dict(self.attributes)
        if self.window is not None:
            attributes["window"] = plans.window_attribute(self.window)
        if plan is not None:
            attributes["plan"] = plan.numbers
            outputs.append(jax.ShapeDtypeStruct((plan.workspace,), jnp.uint8))
            if self.mapped is not None:
                operands += (self.mapped.find(platform, operands, plan.map_words),)
        results = jax.ffi.ffi_call(self.target, outputs)(*operands, **attributes)
        axes = meshes.varying_axes(operands)
        return tuple(meshes.vary(r, axes) for r in results[: len(self.each) + len(self.sums)])

    def limit(self, platform: str, operands: Sequence[jax.Array]) -> str:
        """Why the kernel cannot do it, such as a window too large for a GPU's memory; "" if it can."""
        _, plan = self._plan(platform, 1, operands)
        if plan is None or not plan.limit:
            return ""
        gradient = " of its gradient" if self.target.endswith("_bwd") else ""
        return f"The CUDA kernel{gradient} cannot do it: {plan.limit}."

    def _plan(
        self, platform: str, groups: Any, operands: Sequence[jax.Array]
    ) -> tuple[list[jax.ShapeDtypeStruct], plans.Plan | None]:
        batch = _batch_size(operands, self.batched)
        outputs = [result((batch, *r.shape), r.dtype) for r in self.each]
        outputs += [result((groups, *r.shape), r.dtype) for r in self.sums]
        # That of the values: weights, which are float32, come behind them.
        floating = (o.dtype for o in operands if jnp.issubdtype(o.dtype, jnp.floating))
        dtype = next(floating, jnp.float32)
        no_map = () if self.mapped is None else (result((0, 0, 0), jnp.int32),)
        arrays = (*operands, *no_map, *outputs)
        plan = plans.plan(platform, self.target, arrays, dtype, batch, groups, self.window)
        return outputs, plan


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
        axis_size, batch = next(o.shape[:2] for o, m in zip(operands, mapped, strict=True) if m)

        def into_batch(operand, leads, m):
            if not leads:
                return operand
            if not m:
                operand = jnp.broadcast_to(operand, (axis_size, *operand.shape))
            lead, batch, *rest = operand.shape
            return operand.reshape(lead * batch, *rest)

        run = _fold(native, batched, sums, groups * axis_size)
        results = run(*map(into_batch, operands, batched, mapped))
        leads = [batch] * (len(results) - sums) + [groups] * sums
        return tuple(
            r.reshape(axis_size, lead, *r.shape[1:]) for r, lead in zip(results, leads, strict=True)
        )

    @function.def_vmap
    def rule(axis_size, mapped, *operands):
        can_fold = all(leads or not m for leads, m in zip(batched, mapped, strict=True))
        run = functools.partial(folded if can_fold else one_by_one, mapped)
        results = meshes.split_by_type(run, operands, mapped)
        return results, tuple(True for _ in results)

    return function
