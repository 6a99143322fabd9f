"""Whether it helps to bring back what pruning and selection have silenced: regrowth, and boosting.

    python -m experiments.revival                          # made solids; minutes
    python -m experiments.revival --data kicad --data-dir FOLDER --seeds 3 --report
    python -m experiments.revival --methods pruned momentum    # some of them

--report writes experiments/results/revival.{json,md,png} too.

**Regrowth.** OctNet3 is pruned by the recipe. In the first half of the training, each epoch brings back a
tenth as many weights of a filter as are left, at 0, and spares them for five epochs: drawn at random
(Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity"), or those
with the largest mean gradient (Dettmers and Zettlemoyer, "Sparse networks from scratch").

**Boosting.** A ResNet whose blocks dilate keeps the strongest sites. A channel whose responses are small has
no say in which: in training, selection sees them the larger, the smaller the channel's share of the kept
squares has been (after Ahmad and Scheinkman, "How can we be so dense?"). Where each channel selects for
itself, as in OctNet3, a factor for a channel changes no order: there is nothing to boost.
"""

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import ilajax
from benchmarks import timing
from experiments import frame, grid
from experiments.classification import TEST_BATCH
from experiments.data.parts import FEATURES, Parts, whole
from experiments.data.sets import (
    Dataset,
    add_data,
    add_resolution,
    add_sizes,
    chosen_dataset,
)
from experiments.demo_picture import INK, style_panel, title_panel
from experiments.frame import Cells, summary_table
from experiments.grid import Trained
from experiments.training import Row, Run, as_it_is, smoothed
from ilajax import geometry
from ilajax.models.residual import ResidualBlock

# Method -> what it is compared with: the same net without it.
METHODS = {
    "pruned": "pruned",
    "random": "pruned",
    "momentum": "pruned",
    "by site": "by site",
    "boosted": "by site",
}
REGROWN, SPARED = 0.1, 5  # share of the weights left, and epochs
STRENGTH = 1.0  # of boosting: log of the factor that squares of a silent channel get
KEEPING = 0.99  # of a channel's share from step to step
RATES = {"pruned": 1e-3, "by site": 3e-3}
SCALE = 0.003
# Of the dilating net's levels. On kicad at 16^3, 28, 30, 57, 97 and 100 % of the sites are reached at first.
SITE_BOUNDS = (0.1, 0.17, 0.4, 0.8, 1.0)


class Setting(NamedTuple):
    """A net to be trained, and its seed."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """What its rows and table are called."""
        return f"{self.method.replace(' ', '-')}-{self.seed}"


class BoostedConv(nnx.Module):
    """A convolution that selects by site, with boosting of the channels that had little part in it."""

    def __init__(self, conv: ilajax.nn.Conv, strength: float):
        self.conv, self.strength = conv, strength
        channels = conv.kernel_shape[-1]
        self.share = nnx.BatchStat(jnp.full(channels, 1 / channels))
        self.use_running_average = False  # `model.eval()` sets it, and selection is as it was
        self.strides = conv.strides

    def __call__(self, x: ilajax.SparseTensor) -> ilajax.SparseTensor:
        strength = 0.0 if self.use_running_average else self.strength
        share = self.share[...]
        factor = jnp.exp(strength / 2 * (1 - len(share) * share))
        kernel = self.conv.sparse_kernel
        # Keys ascend with the output channel; padding has no weight.
        channel = jnp.minimum(kernel.keys // (kernel.size // len(share)), len(share) - 1)
        shape = tuple(
            -(-size // step) for size, step in zip(x.spatial_shape, self.strides, strict=True)
        )
        y = ilajax.conv(
            x,
            ilajax.SparseKernel(kernel.keys, kernel.values * factor[channel], kernel.shape),
            capacity=geometry.capacity(self.conv.density_bound, shape),
            strides=self.strides,
            select="magnitude",
            select_by="site",
        ).features
        y = y.with_values(y.values / factor[:, None])
        if not self.use_running_average:
            squares = jnp.sum(y.values**2, axis=(0, 2))
            now = squares / jnp.maximum(squares.sum(), jnp.finfo(squares.dtype).tiny)
            self.share[...] = KEEPING * share + (1 - KEEPING) * jax.lax.stop_gradient(now)
        return y


def main(arguments: list[str] | None = None) -> list[Trained]:
    """Runs the experiment; returns what became of each net."""
    parser = _parser()
    options = parser.parse_args(arguments)
    record = timing.provenance("experiments.revival", arguments)
    methods = [method for method in METHODS if method in options.methods]
    try:
        # All methods of the first seed first, so that a run that is stopped has covered them.
        settings = [Setting(method, seed) for seed in grid.seeds(options) for method in methods]
        data = chosen_dataset(options, options.resolution)
        grid.prepare(options, settings, {})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = ("data", "resolution", "epochs", "batch_size", "threshold", "seed", "seeds")
    record["options"] = {name: getattr(options, name) for name in names}
    record["samples"] = {"train": len(data.training), "test": len(data.test)}
    test = whole(Parts(data.test))
    with frame.Reporter() as reporter:
        reporter.print(timing.headline(record))
        trained = grid.train_all(
            settings,
            functools.partial(_run, options=options, data=data),
            lambda setting: (Parts(data.training, setting.seed), (test.inputs, test.labels)),
            options,
            reporter,
            table=options.out / "revival.csv",
            row=_line,
            test_batch=TEST_BATCH,
        )
        record["methods"] = [_result(method, trained) for method in methods]
        cells = _cells(record)
        reporter.print(summary_table(cells))
        written = [options.out / f"revival.{suffix}" for suffix in ("json", "md", "png")]
        frame.write_json(written[0], record)
        _write(written[1], record, cells)
        _draw(written[2], record)
        frame.publish(reporter, written, options.report, "revival")
    return trained


def make_net(method: str, resolution: int, classes: int, *, seed: int) -> nnx.Module:
    """OctNet3 with the paper's bounds, or a dilating ResNet of depth 10, boosted or not."""
    rngs = nnx.Rngs(seed)
    if METHODS[method] == "pruned":
        return ilajax.models.OctNet3(
            resolution, num_classes=classes, in_features=FEATURES, rngs=rngs
        )
    model = ilajax.models.ResNet(
        10,
        FEATURES,
        classes,
        density_bounds=SITE_BOUNDS,
        features=(16, 32, 64, 128),
        dilate=True,
        dropout=0.2,
        rngs=rngs,
    )
    boost(model, STRENGTH if method == "boosted" else 0.0)
    return model


def boost(model: nnx.Module, strength: float) -> None:
    """Puts a `BoostedConv` around each convolution that selects in the blocks; strength 0 only measures."""
    for block in [m for _, m in nnx.iter_graph(model) if isinstance(m, ResidualBlock)]:
        block.conv1 = BoostedConv(block.conv1, strength)


class Regrowth:
    """An `after_epoch` that brings weights of each filter back at 0, and spares those of the last epochs.

    For filters that are not compacted, so that all slots are stored, under `sparse_training` around Adam,
    whose moments follow the gradients of pruned weights too. The choice falls on the largest mean gradients,
    or is drawn if a seed is given. In the second half of `epochs` nothing comes back.
    """

    def __init__(self, epochs: int, seed: int | None):
        self.last = epochs // 2
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.since: dict[Any, np.ndarray] = {}  # layer -> epoch of each weight's return

    def __call__(self, model: nnx.Module, optimizer: nnx.Optimizer, epoch: int) -> None:
        pruned, warned, mean = (
            dict(nnx.to_flat_state(optax.tree.get(optimizer.opt_state, name)))
            for name in ("pruned", "warned", "mu")
        )
        for path, _ in sorted(ilajax.nn.iter_convs(model)):
            at = (*path, "kernel")
            gone = np.array(pruned[at][...])
            since = self.since.setdefault(path, np.full(gone.shape, -SPARED))
            if epoch <= self.last:
                drawn = self.rng is not None
                worth = self.rng.random(gone.shape) if drawn else np.abs(mean[at][...])
                count = min(int(REGROWN * np.sum(~gone)), int(gone.sum()))
                back = np.argsort(np.where(gone, -worth, np.inf), kind="stable")[:count]
                gone[back], since[back] = False, epoch
                pruned[at].set_value(jnp.asarray(gone))
            warned[at].set_value(warned[at][...] & jnp.asarray(since <= epoch - SPARED))


def weights_left(model: nnx.Module) -> float:
    """Share of the filters' weights that are not 0."""
    filters = [conv.kernel[...] for _, conv in ilajax.nn.iter_convs(model)]
    return sum(int(jnp.count_nonzero(f)) for f in filters) / sum(f.size for f in filters)


def silent_channels(model: nnx.Module) -> float | None:
    """Share of the channels that make less than a tenth of their part of the kept squares."""
    shares = [m.share[...] for _, m in nnx.iter_graph(model) if isinstance(m, BoostedConv)]
    silent = [np.asarray(share) < 0.1 / len(share) for share in shares]
    return float(np.concatenate(silent).mean()) if silent else None


@functools.cache
def _transformation(
    net: str, resolution: int, classes: int, steps: int, threshold: float
) -> optax.GradientTransformation:
    """The same arguments give the same object: other seeds reuse the compiled step."""
    schedule = optax.cosine_onecycle_schedule(steps, RATES[net], pct_start=0.2)
    if net == "by site":
        # The chain lets AdamW take the extra arguments of the training loop, and ignore them.
        return optax.chain(optax.adamw(schedule, weight_decay=0.05))
    structure = nnx.eval_shape(functools.partial(make_net, net, resolution, classes, seed=0))
    adam = optax.adam(schedule)
    return ilajax.optim.sparse_training(structure, adam, scale=SCALE, threshold=threshold)


def _run(setting: Setting, options: argparse.Namespace, data: Dataset) -> Run:
    method, seed = setting
    classes, net = len(data.class_names), METHODS[method]
    model = make_net(method, options.resolution, classes, seed=seed)
    steps = options.epochs * (len(data.training) // options.batch_size)
    how = _transformation(net, options.resolution, classes, steps, options.threshold)
    grows = {"random": seed, "momentum": None}
    return Run(
        name=setting.name,
        model=model,
        optimizer=nnx.Optimizer(model, how, wrt=nnx.Param),
        to_input=as_it_is,
        directory=options.out,
        seed=seed,
        densities=lambda model: {"weights": weights_left(model)},
        after_epoch=Regrowth(options.epochs, grows[method]) if method in grows else None,
        score=smoothed,
    )


def _line(trained: Trained) -> Row:
    """A net's line in the table: what its last epoch says."""
    names = ("test_accuracy", "test_loss", "density_weights")
    return trained.setting._asdict() | {name: trained.rows[-1][name] for name in names}


def _result(method: str, trained: Sequence[Trained]) -> dict[str, Any]:
    """Accuracies by seed, and how they differ from those of the same net and seed without the method."""
    rows = {each.setting: each.rows for each in trained}
    models = [each.run.model for each in trained if each.setting.method == method]
    seeds = [seed for name, seed in rows if name == method]
    accuracies = [rows[method, seed][-1]["test_accuracy"] for seed in seeds]
    found = {
        "method": method,
        "seeds": seeds,
        "epochs": [rows[method, seed] for seed in seeds],
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "weights_left": statistics.mean(rows[method, s][-1]["density_weights"] for s in seeds),
        "silent_channels": [silent_channels(model) for model in models],
        "interval": None,
    }
    base = METHODS[method]
    if base != method and (base, seeds[0]) in rows:
        before = [rows[base, seed][-1]["test_accuracy"] for seed in seeds]
        pairs = zip(accuracies, before, strict=True)
        found["interval"] = grid.interval([after - at_first for after, at_first in pairs])
    return found


def _cells(record: Mapping[str, Any]) -> list[Cells]:
    cells: list[Cells] = [
        ("method", "test accuracy", "of each seed", "difference", "weights left", "silent channels")
    ]
    for each in record["methods"]:
        difference = ""
        if each["interval"]:
            low, high = (100 * end for end in each["interval"])
            difference = f"{low:+.1f} to {high:+.1f} points"
        silent = [share for share in each["silent_channels"] if share is not None]
        cells.append(
            (
                each["method"],
                f"{each['mean']:.1%}",
                ", ".join(f"{accuracy:.1%}" for accuracy in each["accuracies"]),
                difference,
                f"{each['weights_left']:.1%}",
                f"{statistics.mean(silent):.1%}" if silent else "",
            )
        )
    return cells


def _write(path: Path, record: Mapping[str, Any], cells: list[Cells]) -> None:
    options, samples = record["options"], record["samples"]
    frame.write_page(
        path,
        "# Bringing back what was silenced",
        f"`{record['command']}`: {samples['train']:,} samples of {options['data']} to train, "
        f"{samples['test']:,} to test, {options['resolution']}^3 voxels, {options['epochs']} epochs, batch "
        f"{options['batch_size']}.",
        f"{timing.headline(record)}.",
        "Accuracy after the last epoch, the mean over the seeds. Difference: the 95 % interval of the mean "
        "paired difference to the same net and seed without the method.",
        cells,
        f"**Regrowth.** OctNet3 under the recipe (scale {SCALE:g}, threshold {options['threshold']:g}, "
        f'Adam): "pruned" by it alone. "random" and "momentum" bring back, in each epoch of the first half, '
        f"{REGROWN:.0%} as many weights of a filter as are left, at 0, and spare them for {SPARED} epochs: "
        "drawn ones, or those with the largest mean gradient.",
        '**Boosting.** A dilating ResNet10 that selects by site. In training, "boosted" selects as if the '
        f"squares of a channel were exp({STRENGTH:g} (1 - share C)) times as large, where share is what the "
        "channel has made of the kept squares, and C the number of channels. Silent channels make less "
        "than a tenth of 1 / C. Where every channel selects for itself, a factor for a channel changes no "
        "order, and there is nothing to boost; what brings a silent channel back there is the density-biased "
        "regulariser, which pushes the weights of a channel below its bound up.",
        "![](revival.png)",
    )


def _draw(path: Path, record: Mapping[str, Any]) -> None:
    """Test accuracy and weights left by epoch, as means over the seeds."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    drawn = (
        ("pruned", "test_accuracy"),
        ("pruned", "density_weights"),
        ("by site", "test_accuracy"),
    )
    titles = ("OctNet3, test accuracy", "OctNet3, weights left", "ResNet, test accuracy")
    for axis, title, (net, column) in zip(panels, titles, drawn, strict=True):
        title_panel(axis, title)
        for each in record["methods"]:
            if METHODS[each["method"]] == net:
                seeds = [[row[column] for row in rows] for rows in each["epochs"]]
                epochs = range(1, record["options"]["epochs"] + 1)
                axis.plot(epochs, np.mean(seeds, axis=0), lw=1.8, label=each["method"])
        axis.set_xlabel("epoch", fontsize=9, color=INK)
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        style_panel(axis)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    frame.save_figure(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.revival", __doc__)
    add = parser.add_argument
    add("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="what to train")
    add_data(parser)
    add_sizes(parser)
    add_resolution(parser, 16)
    threshold = "filter weights of OctNet3 that stay below it for two epochs go"
    add("--threshold", type=frame.positive, default=0.1, metavar="W", help=threshold)
    varied = "of weights, order, variation, draws"
    grid.add_training(parser, epochs=20, out="runs/revival", of_seed=varied, resumes=False)
    frame.add_report(parser, "revival.{json,md,png}")
    return parser


if __name__ == "__main__":
    frame.run(main, resumes=False)
