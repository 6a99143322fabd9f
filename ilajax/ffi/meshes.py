"""Arrays on meshes of devices: what varies over them, and how a batch stays where its samples are.

JAX has three kinds of mesh axes, and a custom call by itself gets all of them wrong:

- Manual ones, inside `shard_map`: results vary over the devices that operands vary over, `vary_together`.
- Explicit ones, in the types of arrays (what `jax.make_mesh` makes): `split_by_type`.
- Auto ones, under plain `jit`, which XLA's partitioner alone knows: `split_by_compiler`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Outputs = tuple[jax.Array, ...]


def vary_together(*operands: jax.Array) -> Outputs:
    """Casts all operands to vary over the manual mesh axes that any of them varies over."""
    axes = varying_axes(operands)
    return tuple(vary(operand, axes) for operand in operands)


def varying_axes(operands: Sequence[jax.Array]) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(o).manual_axis_type.varying for o in operands))


def vary(operand: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - varying_axes([operand])))
    return jax.lax.pcast(operand, missing, to="varying") if missing else operand


def place(operands: Sequence[jax.Array], batched: Sequence[bool]) -> Outputs:
    """Operands whose types say no more than how the batch is split, and say it alike.

    An op does this outside of its `custom_vjp`, whose gradients must have the types of its operands: JAX then
    brings each gradient back to the type of what the user gave, say of weights that are sharded themselves.
    """
    operands = vary_together(*operands)
    mesh, batch = _mesh(operands), _explicit_batch(operands, batched)
    specs = (batch if leads else PartitionSpec() for leads in batched)
    return tuple(_reshard(o, mesh, spec) for o, spec in zip(operands, specs, strict=True))


def split_by_type(
    function: Callable[..., Outputs],
    operands: Sequence[jax.Array],
    batched: Sequence[bool],
    sums: int = 0,
) -> Outputs:
    """Calls `function` on each device's own samples where the types of the operands split the batch.

    Args:
      function: of the operands.
      operands: arrays.
      batched: which operands lead with the batch axis.
      sums: how many results, the last ones, are sums over the batch; the others lead with its axis.
    """
    operands = place(operands, batched)
    batch = _explicit_batch(operands, batched)
    if batch == PartitionSpec():
        return function(*operands)
    names = _names(batch[0])

    def on_each_device(*operands: jax.Array) -> tuple[Outputs, Outputs]:
        results = function(*vary_together(*operands))
        count = len(results) - sums
        return results[:count], tuple(jax.lax.psum(r, names) for r in results[count:])

    led, summed = jax.shard_map(
        on_each_device,
        mesh=_mesh(operands),
        in_specs=tuple(batch if leads else PartitionSpec() for leads in batched),
        out_specs=(batch, PartitionSpec()),
        axis_names=set(names),
    )(*operands)
    return *led, *summed


def may_be_split_by_compiler() -> bool:
    # Only then: a partitioned call is more than XLA's persistent compilation cache takes.
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def split_by_compiler(
    function: Callable[..., Outputs],
    operands: Sequence[jax.Array],
    batched: Sequence[bool],
    sums: int,
    groups: int,
) -> Outputs:
    """Calls `function` so that XLA splits it along a sharded batch, where it would gather the operands.

    Args:
      function: of (groups, *operands); the batch holds `groups` independent calls, one behind the other.
      operands: arrays.
      batched: which operands lead with the batch axis.
      sums: how many results, the last ones, lead with groups instead of the batch: sums over each. One group
        is added up over the shards, and of several each shard has its own.
    """
    shapes = jax.eval_shape(functools.partial(function, groups), *operands)
    batch = next(itertools.compress(operands, batched)).shape[0]
    led = [True] * (len(shapes) - sums) + [False] * sums

    @custom_partitioning
    def partitioned(*operands):
        return function(groups, *operands)

    def partition(mesh, operand_shapes, result_shapes):
        # Of the first that is split: a constant, such as keys that all samples have, is on every device.
        led_by_batch = itertools.compress(operand_shapes, batched)
        axis = next((a for a in map(_leading_axis, led_by_batch) if a is not None), None)
        shards = math.prod(mesh.shape[name] for name in _names(axis))
        if groups > 1 and groups % shards:
            axis, shards = None, 1
        split, whole = (NamedSharding(mesh, PartitionSpec(a)) for a in (axis, None))

        def lower(*operands):
            results = function(max(groups // shards, 1), *operands)
            if groups > 1 or shards == 1:
                return results
            count = len(results) - sums
            return *results[:count], *(jax.lax.psum(r, axis) for r in results[count:])

        operand_shardings = tuple(split if leads else whole for leads in batched)
        result_shardings = tuple(split if leads or groups > 1 else whole for leads in led)
        return mesh, lower, result_shardings, operand_shardings

    rule = _sharding_rule(operands, batched, shapes, led, groups)
    # The rule's reader takes sizes of just those factors that are never a whole axis.
    sizes = {"b": batch // groups} if 1 < groups < batch else {}
    if 1 < groups < batch and all(led):
        sizes["g"] = groups
    partitioned.def_partition(partition, sharding_rule=rule, **sizes)
    return partitioned(*operands)


def _explicit_batch(operands: Sequence[jax.Array], batched: Sequence[bool]) -> PartitionSpec:
    """How the types of the operands split the batch, P(axes); P() where they do not."""
    for operand in itertools.compress(operands, batched):
        spec = jax.typeof(operand).sharding.spec
        if spec and spec[0] is not None:
            return PartitionSpec(spec[0])
    return PartitionSpec()


def _reshard(operand: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    sharding = jax.typeof(operand).sharding
    if sharding.mesh.empty:  # what lies on one device, or a constant
        is_placed = spec == PartitionSpec()
    else:
        is_placed = sharding.is_equivalent_to(NamedSharding(sharding.mesh, spec), operand.ndim)
    return operand if is_placed else jax.sharding.reshard(operand, NamedSharding(mesh, spec))


def _mesh(operands: Sequence[Any]) -> Any:
    """The mesh that types of operands name, with its devices where they are known; None if none does."""
    for operand in operands:
        mesh = jax.typeof(operand).sharding.mesh
        if not mesh.empty:
            return mesh if isinstance(operand, jax.core.Tracer) else operand.sharding.mesh
    return None


def _sharding_rule(
    operands: Sequence[Any], batched: Sequence[bool], results: Any, led: Sequence[bool], groups: int
) -> str:
    """Says that the batch axes go together, and every other axis stands for itself."""
    own = (f"a{i}" for i in itertools.count())
    sizes = {operand.shape[0] for operand in itertools.compress(operands, batched)}
    batch = "b" if groups == 1 else "g" if groups in sizes else "(g b)"

    def side(arrays, leads):
        pairs = zip(arrays, leads, strict=True)
        return ", ".join(" ".join([lead, *itertools.islice(own, a.ndim - 1)]) for a, lead in pairs)

    left = side(operands, [batch if leads else next(own) for leads in batched])
    group = "g" if groups > 1 else None
    right = side(results, [batch if leads else group or next(own) for leads in led])
    return f"{left} -> {right}"


def _leading_axis(shape: Any) -> Any:
    # Where no argument of the program names a mesh, what jax.set_mesh says does not come here: as if whole.
    spec = getattr(shape.sharding, "spec", None)
    return spec[0] if spec else None


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)
