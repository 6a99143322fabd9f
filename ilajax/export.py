"""Programs written by `jax.export`: what they need to contain this library's kernels and data types.

A network is exported like any JAX function. Its kernels are custom calls, which `jax.export` serialises only
if the caller allows each by name: `disabled_checks` lists them. A symbol leaves the batch size open. A
process that reads the program back must import ilajax, with kernels of the same version; the import registers
the kernels and the data types.

  >>> import jax.export
  >>> network = jax.jit(lambda x: ilajax.conv(x, kernel, capacity=32).features)
  >>> kernel = ilajax.SparseKernel.from_dense(jnp.ones((3, 3, 1, 4)))
  >>> (batch,) = jax.export.symbolic_shape("batch")
  >>> x = ilajax.SparseTensor(jax.ShapeDtypeStruct((batch, 1, 16), jnp.int32),
  ...                         jax.ShapeDtypeStruct((batch, 1, 16), jnp.float32), (8, 8))
  >>> program = jax.export.export(network, disabled_checks=ilajax.export.disabled_checks())(x)
  >>> data = program.serialize()  # bytes, for a file

and in another process:

  >>> program = jax.export.deserialize(data)
  >>> program.call(ilajax.from_dense(jnp.ones((5, 8, 8, 1)), capacity=16)).shape
  (5, 8, 8, 4)

`program.serialize(vjp_order=1)` writes the gradient too. It differentiates with respect to float arguments
only, so export a function of the values and the keys, not of the SparseTensor.

With an open batch, kernels are planned for a batch that keeps every thread busy. They are correct for any
batch, and just as fast for large ones; on a single sample they use fewer threads than a program of batch size
1. On a GPU, the workspace of the gradient then grows with the batch.
"""

import json

import jax.export

from ilajax.ffi import registry
from ilajax.ops.conv import ConvResult
from ilajax.sparse_kernel import SparseKernel
from ilajax.sparse_tensor import SparseTensor


def disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=)` needs to let this library's kernels through.

    Returns:
      One permission for each kernel that is installed, by its name; none where the reference runs.

    Example:
      >>> import jax.export
      >>> x = ilajax.from_dense(jnp.eye(3)[None, ..., None], capacity=3)
      >>> f = jax.jit(lambda x: ilajax.k_select(x, 2))
      >>> data = jax.export.export(f, disabled_checks=ilajax.export.disabled_checks())(x).serialize()
      >>> jax.export.deserialize(data).call(x).keys
      Array([[[0, 4]]], dtype=int32)
    """
    targets = set[str]().union(*(e.targets for e in registry.extensions.values()))
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in sorted(targets)]


for _type in (SparseTensor, SparseKernel):
    jax.export.register_pytree_node_serialization(
        _type,
        serialized_name=f"ilajax.{_type.__name__}",
        serialize_auxdata=lambda shape: json.dumps(shape).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )
jax.export.register_namedtuple_serialization(ConvResult, serialized_name="ilajax.ConvResult")
