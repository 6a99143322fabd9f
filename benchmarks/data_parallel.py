"""Training on several devices, and in several processes: the same program, the same losses.

    python -m benchmarks.data_parallel                       # on all devices of this machine
    python -m benchmarks.data_parallel --cpu-devices 4       # on a CPU that plays four devices

    # In two processes, which may run on two machines; each holds half of every batch:
    python -m benchmarks.data_parallel --processes 2 --process 0 --coordinator localhost:9999 &
    python -m benchmarks.data_parallel --processes 2 --process 1 --coordinator localhost:9999

    # Goes on from the last checkpoint, in one process or in another number of them:
    python -m benchmarks.data_parallel --resume --epochs 4

What tells this from a program for one device is in `main`, in the first lines of `train`, and in `loader`;
docs/scaling_out.md explains.
"""

import argparse
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ilajax
from experiments import frame
from experiments.checkpoints import Checkpoints, remove_checkpoints
from experiments.data.loader import batches
from experiments.data.solids import CLASSES, Solids, make_solids

RESOLUTION, BATCH_SIZE = 16, 16
BOUNDS = (0.08, 0.24)
Row = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Trains, prints a line for each epoch, and returns them."""
    parser = frame.parser("benchmarks.data_parallel", __doc__)
    add = parser.add_argument
    add("--epochs", type=frame.positive_int, default=2, metavar="N", help="epochs")
    add("--solids", type=frame.positive_int, default=256, metavar="N", help="solids to train on")
    add("--seed", type=frame.seed, default=0, metavar="N", help="of weights, solids and order")
    add("--cpu-devices", type=int, metavar="N", help="makes the CPU play N devices")
    add("--processes", type=frame.positive_int, default=1, metavar="N", help="processes in all")
    add("--process", type=int, default=0, metavar="I", help="which of them this one is")
    add("--coordinator", default="localhost:9999", metavar="HOST:PORT", help="of process 0")
    frame.add_out(parser, "runs/data_parallel")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if any")
    options = parser.parse_args(arguments)
    # Before anything else touches JAX: finds this process's devices, and the other processes.
    if options.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    axis_type = AxisType.Explicit  # AxisType.Auto does as well
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        return train(options, mesh)


def train(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> list[Row]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    net, optimizer = make_net(options.seed)
    # Each process has drawn the same weights; now they are on all devices.
    nnx.update((net, optimizer), jax.device_put(nnx.state((net, optimizer)), everywhere))
    solids = make_solids(options.solids, RESOLUTION, seed=options.seed)
    modules = {"net": net, "optimizer": optimizer}
    rows: list[Row] = []
    folder = options.out / "checkpoints"
    if not options.resume and jax.process_index() == 0:
        remove_checkpoints(folder)
    multihost_utils.sync_global_devices("old checkpoints are gone")
    with Checkpoints(folder) as checkpoints:
        # Variables come back to the devices that these modules are on, whatever they were saved from.
        latest = checkpoints.restore_newest(modules, print)
        if latest is not None:
            rows = checkpoints.notes(latest)["rows"]
        for epoch in range(len(rows) + 1, options.epochs + 1):
            losses = []
            order = batches(len(solids), BATCH_SIZE, seed=options.seed, epoch=epoch)
            for step, (x, labels) in enumerate(loader(solids, order, mesh), 1):
                losses.append(train_step(net, optimizer, x, labels, step == len(order)))
            rows.append({"loss": float(np.mean(losses))} | densities(net))
            ilajax.optim.compact(net, optimizer)
            checkpoints.save(epoch, modules, {"rows": rows})
            if jax.process_index() == 0:
                shown = "  ".join(f"{name} {value:.5f}" for name, value in rows[-1].items())
                print(f"epoch {epoch}/{options.epochs}  {shown}", flush=True)
    return rows


def make_net(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
    net = ilajax.models.OctNet3(
        RESOLUTION, num_classes=len(CLASSES), density_bounds=BOUNDS, rngs=nnx.Rngs(seed)
    )
    recipe = ilajax.optim.sparse_training(net, optax.adam(1e-3))
    return net, nnx.Optimizer(net, recipe, wrt=nnx.Param)


def loader(
    solids: Solids, order: np.ndarray, mesh: jax.sharding.Mesh
) -> Iterator[tuple[ilajax.SparseTensor, jax.Array]]:
    """Batches on all devices, of which each process makes the samples of its own devices only."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for batch in order:
        mine = np.split(batch, jax.process_count())[jax.process_index()]
        keys = solids.keys[mine, None]
        values = (keys < RESOLUTION**3).astype(np.float32)
        x = ilajax.SparseTensor(keys, values, (RESOLUTION,) * 3)

        def on_devices(local: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, local)

        yield jax.tree.map(on_devices, (x, solids.labels[mine]))


@nnx.jit
def train_step(
    net: nnx.Module,
    optimizer: nnx.Optimizer,
    x: ilajax.SparseTensor,
    labels: jax.Array,
    epoch_end: bool,
) -> jax.Array:
    """The same as on one device: a mean over the batch is one over the devices."""

    def loss_of(net: nnx.Module) -> jax.Array:
        wanted = jax.nn.one_hot(labels, len(CLASSES))
        return optax.softmax_cross_entropy(net(x), wanted).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(net)
    excess = ilajax.optim.excess_density(net)
    optimizer.update(net, gradients, excess_density=excess, epoch_end=epoch_end)
    return loss


def densities(net: nnx.Module) -> Row:
    """The mean response density of each sparse layer, over all devices."""
    layers = ilajax.nn.iter_convs(net)
    return {".".join(map(str, path)): float(conv.density[...].mean()) for path, conv in layers}


if __name__ == "__main__":
    frame.run(main)
