"""Programs that jax.export wrote: read back and run in a process that has done nothing else."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ilajax
import oracles
import samples
from ilajax.ffi import plans, registry

# Beyond what a plan for an open batch reckons with, and below.
BATCHES = (1, plans.OPEN_BATCH + 2)
KERNEL = samples.kernel(0, (3, 3), 2, 3)
BIAS = jnp.array([1.0, 0.0, -1.0])

# Name -> a function of (own supports, shared support, kernel) that gives a SparseTensor or an array.
OPERATIONS = {
    "dense": lambda x, s, k: ilajax.from_dense(ilajax.to_dense(x), 9),
    "k_select": lambda x, s, k: ilajax.k_select(x, 5),
    "relu": lambda x, s, k: ilajax.relu(x),
    "conv": lambda x, s, k: ilajax.conv(x, k, BIAS, capacity=7).features,
    "conv-magnitude": lambda x, s, k: ilajax.conv(s, k, capacity=30, select="magnitude").features,
    "submanifold": lambda x, s, k: ilajax.conv(s, k, BIAS, support="input").features,
    "conv_at": lambda x, s, k: (
        ilajax.conv_transpose(ilajax.max_pool(s, 2), k, BIAS, strides=2, support=s).features
    ),
    "conv_by_site": lambda x, s, k: (
        ilajax.conv(s, k, BIAS, capacity=7, strides=2, select_by="site").features
    ),
    "max_pool": lambda x, s, k: ilajax.max_pool(x, 2),
    "upsample": lambda x, s, k: ilajax.upsample(ilajax.max_pool(x, 3, strides=2), 2, support=s),
    "avg_pool": lambda x, s, k: ilajax.avg_pool(s, (1, 2), capacity=3),
    "global": lambda x, s, k: ilajax.global_max_pool(x) + ilajax.global_avg_pool(s),
    "add": lambda x, s, k: s + 2 * s.map(jnp.square) - x,
    "concatenate": lambda x, s, k: ilajax.concatenate([s, x]),
    "points": lambda x, s, k: read_at(s.coordinates()[:, 0], jnp.moveaxis(s.values, 1, 2)),
}


def read_at(places, features):
    """A map made of points, the ones outside of the grid dropped, and read beside them."""
    x = ilajax.from_points(places, features, spatial_shape=(5, 6), capacity=10)
    return ilajax.sample(x, places + 0.8, method="linear")


READER = """
import pathlib, sys
import numpy as np
import jax, jax.export
import ilajax  # registers the kernels and the data types, and is all that there is
folder = pathlib.Path(sys.argv[1])
for path in folder.glob("*.program"):
    program = jax.export.deserialize(path.read_bytes())
    for inputs in folder.glob(path.stem + ".*.inputs.npz"):
        leaves = [array for _, array in sorted(np.load(inputs).items())]
        arguments, options = jax.tree.unflatten(program.in_tree, leaves)
        results = jax.tree.leaves(program.call(*arguments, **options))
        np.savez(str(inputs).replace("inputs", "results"), **{f"{i:02}": r for i, r in enumerate(results)})
print(len(list(folder.glob("*.results.npz"))))
"""


def arguments(batch):
    x = samples.tensor(0, batch, capacity=9)
    return x, samples.tensor(1, batch, capacity=12, shared=True), KERNEL


def with_gradients(operation):
    """The operation's results, and the gradients of the weighted sum of its values."""

    def run(x, s, kernel):
        def loss(u, v, w):
            weights = ilajax.SparseKernel(kernel.keys, w, kernel.shape)
            result = operation(x.with_values(u), s.with_values(v), weights)
            values = result.values if isinstance(result, ilajax.SparseTensor) else result
            weight = jnp.arange(values.shape[-1], dtype=jnp.float32) % 5 - 2
            return (values * weight).sum(), result

        primals = (x.values, s.values, kernel.values)
        gradients, result = jax.grad(loss, (0, 1, 2), has_aux=True)(*primals)
        return result, gradients

    return run


def specs(tree, batch, open_batch):
    """Shapes in which `batch` is left open, if it is."""
    size = jax.export.symbolic_shape("batch")[0] if open_batch else batch

    def spec(path, leaf):
        led = path[0].idx < 2  # the kernel has no batch
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]) if led else leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(spec, tree)


def write(folder, name, function, batch, open_batch):
    program = jax.export.export(function, disabled_checks=ilajax.export.disabled_checks())(
        *specs(arguments(batch), batch, open_batch)
    )
    (folder / f"{name}.program").write_bytes(program.serialize())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(operation, "open" or "fixed", batch): (leaves here, leaves in another process)}."""
    folder = tmp_path_factory.mktemp("programs")
    here = {}
    for operation, function in OPERATIONS.items():
        function = jax.jit(with_gradients(function))
        write(folder, f"{operation}_fixed", function, 1, False)
        write(folder, f"{operation}_open", function, 1, True)
        for batch in BATCHES:
            inputs = arguments(batch)
            leaves = jax.tree.leaves(function(*inputs))
            for kind in ("fixed", "open") if batch == 1 else ("open",):
                here[operation, kind, batch] = leaves
                stored = {f"{i:02}": leaf for i, leaf in enumerate(jax.tree.leaves(inputs))}
                np.savez(folder / f"{operation}_{kind}.{batch}.inputs.npz", **stored)
    done = subprocess.run(
        [sys.executable, "-c", READER, folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(here)
    pairs = {}
    for (operation, kind, batch), leaves in here.items():
        with np.load(folder / f"{operation}_{kind}.{batch}.results.npz") as there:
            pairs[operation, kind, batch] = leaves, [there[name] for name in sorted(there)]
    return pairs


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_program_runs_in_another_process(results, operation):
    """Catches an operation or a gradient that is not exported, not read back, or gives other bits."""
    here, there = results[operation, "fixed", 1]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_open_batch(results, operation, batch):
    """Catches a plan that needs the batch size, and one that is wrong for few samples or for many."""
    here, there = results[operation, "open", batch]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)


def test_types_come_back():
    """Catches a SparseTensor, SparseKernel or ConvResult that comes back as another type or grid."""
    x, _, kernel = arguments(2)
    f = jax.jit(lambda x, kernel: (ilajax.conv(x, kernel, capacity=4), kernel))
    program = jax.export.export(f, disabled_checks=ilajax.export.disabled_checks())(x, kernel)
    result, same = jax.export.deserialize(program.serialize()).call(x, kernel)
    assert isinstance(result, ilajax.ConvResult)
    oracles.assert_invariants(result.features, capacity=4)
    assert result.features.spatial_shape == x.spatial_shape
    assert isinstance(same, ilajax.SparseKernel)
    assert same.shape == kernel.shape


def test_a_network_and_its_gradient():
    """Catches a module that cannot be exported, and a program without the gradient of its values."""
    rngs = nnx.Rngs(0)
    layer = ilajax.nn.Conv(2, 3, (3, 3), density_bound=0.3, rngs=rngs)
    head = nnx.Linear(3, 2, rngs=rngs)
    x = samples.tensor(2, 4)

    @jax.jit
    def network(values, keys):
        y = ilajax.max_pool(layer(ilajax.SparseTensor(keys, values, x.spatial_shape)), 2)
        return head(ilajax.global_avg_pool(y))

    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (x.values, x.keys)]
    written = jax.export.export(network, disabled_checks=ilajax.export.disabled_checks())(*shapes)
    program = jax.export.deserialize(written.serialize(vjp_order=1))
    np.testing.assert_array_equal(program.call(x.values, x.keys), network(x.values, x.keys))
    loss = lambda f: jax.grad(lambda values: f(values, x.keys).sum())(x.values)  # noqa: E731
    np.testing.assert_allclose(loss(program.call), loss(network), rtol=1e-5, atol=1e-6)


def test_vmap_over_an_open_axis():
    """Catches groups of a batch, which is what vmap makes of it, that need their number."""
    x, s, kernel = (jax.tree.map(lambda a: jnp.stack([a] * 3), t) for t in arguments(2))
    kernel = KERNEL
    run = jax.jit(
        jax.vmap(
            with_gradients(
                lambda x, s, k: (
                    ilajax.conv(x, k, capacity=5).features.values.sum(2)
                    + ilajax.conv(s, k, support="input").features.values.sum(2)
                )
            ),
            in_axes=(0, 0, None),
        )
    )
    program = jax.export.export(run, disabled_checks=ilajax.export.disabled_checks())(
        *specs((x, s, kernel), 3, True)
    )
    got = jax.export.deserialize(program.serialize()).call(x, s, kernel)
    jax.tree.map(np.testing.assert_array_equal, got, run(x, s, kernel))


def test_disabled_checks_list_every_kernel():
    """Catches a kernel that programs are refused for."""
    listed = {check.is_custom_call() for check in ilajax.export.disabled_checks()}
    assert listed == set().union(*(e.targets for e in registry.extensions.values()))
