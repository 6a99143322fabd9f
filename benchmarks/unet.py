"""A training step of a U-Net on voxels of surfaces, by ilajax and by PyTorch's gathers.

    python -m benchmarks.unet                    # a few minutes
    python -m benchmarks.unet --report           # benchmarks/results/unet.{json,md}

The network is `ilajax.models.UNet`, MinkUNet14 with the channels of its "A" variant. PyTorch gets the same
network with its maps given: a gather, a matrix product and an index_add for each tap, as libraries without a
kernel of their own do it. Both are first seen to compute the same loss; then steps of Adam are timed in turn.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ilajax
from benchmarks import RESULTS, pytorch, report, timing, workloads
from benchmarks.report import Record
from experiments import frame
from ilajax.models import UNet
from ilajax.models.residual import ResidualBlock

RATE = 1e-3
CLASSES = 20
Maps = list[tuple[np.ndarray, np.ndarray]]


def inputs(resolution: int, batch: int) -> ilajax.SparseTensor:
    """Voxels of a sphere in each sample, with three features."""
    return workloads.shell(resolution, 3, subset=None, batch=batch)


def network(resolution: int, depth: int, features: Sequence[int]) -> UNet:
    """Bounds are wide enough to cut nothing: a surface meets some 4 / resolution of the sites."""
    bounds = [min(1.0, 8.0 * 2**level / resolution) for level in range(1, 5)]
    return UNet(
        depth,
        3,
        CLASSES,
        density_bounds=bounds,
        features=features,
        stem_features=features[0],
        rngs=nnx.Rngs(0),
    )


def labels_of(x: ilajax.SparseTensor) -> jax.Array:
    """A class for each slot, [B, K]."""
    return jnp.asarray(np.random.default_rng(0).integers(0, CLASSES, (x.batch_size, x.capacity)))


def loss_of(model: UNet, x: ilajax.SparseTensor, labels: jax.Array) -> jax.Array:
    logits = jnp.moveaxis(model(x).values, 1, 2)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    stored = x.keys[:, 0] < x.sites
    return jnp.sum(jnp.where(stored, losses, 0)) / jnp.sum(stored)


def ours(model: UNet, x: ilajax.SparseTensor, labels: jax.Array) -> timing.Candidate:
    """A step of Adam."""
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model: UNet, optimizer: nnx.Optimizer, x: Any, labels: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(loss_of)(model, x, labels)
        optimizer.update(model, gradients)
        return loss

    run = nnx.cached_partial(step, model, optimizer)
    parameters = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)]
    return lambda: (run(x, labels), [v[...] for v in parameters])  # the weights are waited for too


# --- The same network by PyTorch ---------------------------------------------------------------------------


def places(x: ilajax.SparseTensor) -> np.ndarray:
    """Sample and position of each stored site, [N, 1 + d], in the order of the keys."""
    keys = np.asarray(x.keys[:, 0])
    sample, slot = np.nonzero(keys < x.sites)
    return np.stack([sample, *np.unravel_index(keys[sample, slot], x.spatial_shape)], axis=1)


def maps(reads: np.ndarray, writes: np.ndarray, window: int, strides: int = 1, up: int = 1) -> Maps:
    """For each tap the rows that it reads, and the rows of the result that it adds them to."""
    rank, grid = reads.shape[1] - 1, np.max([reads.max(0), writes.max(0)], axis=0) + 1
    own = np.ravel_multi_index(tuple(reads.T), grid)
    low = (window - 1) // 2 if strides == up == 1 else up - 1
    found = []
    for tap in itertools.product(range(window), repeat=rank):
        wanted = writes[:, 1:] * strides + np.array(tap) - low
        there = (wanted >= 0).all(1) & (wanted % up == 0).all(1) & (wanted // up < grid[1:]).all(1)
        rows = np.flatnonzero(there)
        key = np.ravel_multi_index((writes[rows, 0], *(wanted[rows] // up).T), grid)
        at = np.searchsorted(own, key).clip(max=len(own) - 1)
        stored = own[at] == key
        found.append((at[stored], rows[stored]))
    return found


def theirs(model: UNet, x: ilajax.SparseTensor, labels: jax.Array) -> Callable[[], float]:
    """A step of Adam by PyTorch, of a network that starts as `model` is; returns the loss."""
    torch = pytorch.library()
    supports = [places(x)]
    y = model.stem(x)
    for go, made in zip(model.down, model.encoder, strict=True):
        y = go(y)
        supports.append(places(y))
        for each in made:
            y = each(y)
    parameters: list[Any] = []

    def parameter(array: Any) -> Any:
        parameters.append(torch.from_numpy(np.array(array)).requires_grad_())
        return parameters[-1]

    def tensors(pairs: Maps) -> list[tuple[Any, Any]]:
        return [tuple(map(torch.from_numpy, pair)) for pair in pairs]

    same = {1: [None] * len(supports)} | {
        width: [tensors(maps(s, s, width)) for s in supports] for width in (3, 5)
    }

    def conv(layer: Any, pairs: Any, slots: int) -> Callable[[Any], Any]:
        dense = np.array(layer.sparse_kernel.to_dense())
        w = parameter(dense.reshape(-1, *dense.shape[-2:]))
        bias = None if layer.bias is None else parameter(layer.bias[...])

        def run(rows: Any) -> Any:
            if pairs is None:
                z = rows @ w[0]
            else:
                z = rows.new_zeros(slots, w.shape[2])
                for (read, added), tap in zip(pairs, w, strict=True):
                    z.index_add_(0, added, rows.index_select(0, read) @ tap)
            return z if bias is None else z + bias

        return run

    def norm(layer: Any) -> Callable[[Any], Any]:
        scale, bias = parameter(layer.scale[...]), parameter(layer.bias[...])
        state = torch.zeros_like(scale), torch.ones_like(bias)
        return lambda rows: torch.nn.functional.batch_norm(
            rows, *(s.detach() for s in state), scale, bias, training=True, eps=layer.epsilon
        )

    def block(made: ResidualBlock, level: int) -> Callable[[Any], Any]:
        slots = len(supports[level])
        first, second = (conv(c, same[3][level], slots) for c in (made.conv1, made.conv2))
        norms = norm(made.norm1), norm(made.norm2)
        shortcut = None
        if made.shortcut is not None:
            shortcut = conv(made.shortcut, None, slots), norm(made.shortcut_norm)

        def run(rows: Any) -> Any:
            z = norms[1](second(torch.relu(norms[0](first(rows)))))
            return torch.relu(z + (rows if shortcut is None else shortcut[1](shortcut[0](rows))))

        return run

    def step(layers: Any, pairs: Any, level: int) -> Callable[[Any], Any]:
        run, normalise = conv(layers[0], pairs, len(supports[level])), norm(layers[1])
        return lambda rows: torch.relu(normalise(run(rows)))

    stem = step(model.stem.layers, same[5][0], 0)
    down, encoder, up, decoder = [], [], [], []
    for level, (layers, blocks) in enumerate(zip(model.down, model.encoder, strict=True), 1):
        pairs = tensors(maps(supports[level - 1], supports[level], 2, strides=2))
        down.append(step(layers.layers, pairs, level))
        encoder.append([block(made, level) for made in blocks])
    for level, (layers, blocks) in zip(
        range(len(model.up) - 1, -1, -1), zip(model.up, model.decoder, strict=True), strict=True
    ):
        pairs = tensors(maps(supports[level + 1], supports[level], 2, up=2))
        up.append(step(layers, pairs, level))
        decoder.append([block(made, level) for made in blocks])
    head = conv(model.head, None, len(supports[0]))

    keys = np.asarray(x.keys[:, 0])
    sample, slot = np.nonzero(keys < x.sites)
    rows = torch.from_numpy(np.asarray(x.values)[sample, :, slot].copy())
    wanted = torch.from_numpy(np.asarray(labels)[sample, slot].astype(np.int64))

    def forward() -> Any:
        z, skips = stem(rows), []
        for go, blocks in zip(down, encoder, strict=True):
            skips.append(z)
            z = go(z)
            for each in blocks:
                z = each(z)
        for go, blocks in zip(up, decoder, strict=True):
            z = torch.cat([go(z), skips.pop()], dim=1)
            for each in blocks:
                z = each(z)
        return torch.nn.functional.cross_entropy(head(z), wanted)

    rule = torch.optim.Adam(parameters, lr=RATE)

    def call() -> float:
        torch.set_num_threads(timing.cores())
        rule.zero_grad()
        loss = forward()
        loss.backward()
        rule.step()
        return loss.item()

    return call


def measure(options: Any) -> Record:
    """Checks that both compute the same loss, then times their steps in turn."""
    x = inputs(options.resolution, options.batch)
    model, labels = network(options.resolution, options.depth, options.features), labels_of(x)
    other = theirs(model, x, labels)
    step = ours(model, x, labels)
    losses = [(float(step()[0]), other()) for _ in range(3)]
    for found, expected in losses:
        if not abs(found - expected) <= 1e-2 * abs(expected):
            raise RuntimeError(f"PyTorch's losses are others than ilajax's: {losses}.")
    candidates = {"ilajax": step, "PyTorch": other}
    timings = timing.side_by_side(candidates, budget=options.budget, least=3)
    seconds = {who: timings.median(who) for who in candidates}
    return {
        "voxels": int(x.counts[:, 0].sum()),
        "losses": losses,
        "seconds": seconds,
        "ratio": seconds["PyTorch"] / seconds["ilajax"],
    }


def main(arguments: list[str] | None = None) -> Record:
    """Measures one network; returns its record."""
    parser = frame.parser("benchmarks.unet", __doc__)
    add = parser.add_argument
    add("--budget", type=frame.positive, default=30.0, metavar="S", help="seconds for each")
    add("--resolution", type=int, default=114, metavar="R", help="sites along an edge of the grid")
    add("--batch", type=int, default=2, metavar="B")
    add("--depth", type=int, default=14, metavar="D", help="14, 18 or 34")
    widths = (32, 64, 128, 256, 128, 128, 96, 96)
    add("--features", type=int, nargs=8, default=widths, metavar="C", help="channels of the levels")
    frame.add_report(parser, "unet.{json,md}", RESULTS)
    options = parser.parse_args(arguments)
    record = measure(options)
    ours_s, theirs_s = (timing.show(record["seconds"][who]) for who in ("ilajax", "PyTorch"))
    what = (
        f"UNet{options.depth}, batch {options.batch}, {record['voxels']:,} voxels in "
        f"{options.resolution}^3: a step takes {ours_s}, by PyTorch's gathers {theirs_s}, "
        f"{record['ratio']:.2f} times as long."
    )
    print(what)
    if options.report:
        provenance = timing.provenance("benchmarks.unet", arguments)
        title = "A training step of a U-Net on shared supports"
        report.write(options.report / "unet", title, provenance | {"record": record}, [what])
    return record


if __name__ == "__main__":
    main()
