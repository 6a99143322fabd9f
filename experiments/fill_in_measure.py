"""What the figures of `experiments.fill_in` show: densities of shapes, behind convolutions, and in nets."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ilajax
from benchmarks import workloads
from experiments import frame, mnist
from experiments.activations import feature_maps, paired_channels
from experiments.data import sets
from experiments.data.loader import Arrays, Source
from experiments.data.mnist import Digits, load_mnist
from experiments.data.solids import CLASSES
from experiments.picture import activations_picture
from experiments.training import Run, train

UNIFORM: dict[str, Callable[[int], float]] = {
    "uniform, 1/r": lambda resolution: 1 / resolution,
    "uniform, 0.1%": lambda _: 1e-3,
}
# Classes that the first picture shows, and how fine.
EXAMPLES = {
    "shapes": ("torus", "helix"),
    "kicad": ("LED_THT", "Package_TO_SOT_THT"),
    "modelnet40": ("airplane", "chair"),
}
EXAMPLE_RESOLUTIONS = (16, 32, 64)
PIECE = 8  # samples at a time: with a slot for each of 64^3 sites, one takes 2 MB
PIXELS = 28  # along a digit's edge
DIGITS_SHOWN = 3
BATCH = 32

Row = dict[str, Any]


class Shapes:
    """What is measured of a data set: some of its test shapes, as they are, the same in each grid."""

    def __init__(self, options: argparse.Namespace):
        # Made shapes have as many points as the finest grid needs.
        finest = max(*options.resolutions, options.layer_resolution, *EXAMPLE_RESOLUTIONS)
        made = {"train_size": 1, "test_size": max(options.samples, len(CLASSES))}
        data = sets.load_dataset(options.data, **sets.where(options), resolution=finest, **made)
        self._test: Any = data.test
        self._shown = EXAMPLES[options.data]
        total, count = len(self._test), min(options.samples, len(self._test))
        rng = np.random.default_rng(options.seed)
        chosen = np.sort(rng.choice(total, count, replace=False))
        # Indices of the shapes that are measured, some at a time.
        self.pieces = np.split(chosen, range(PIECE, count, PIECE))
        # Points of each shape; None where shapes are meshes.
        points = getattr(self._test.sets, "points", None)
        self.points = None if points is None else points.shape[1]

    def fingerprint(self) -> str:
        """What tells this set from another."""
        return str(self._test.sets.fingerprint())

    def at(self, resolution: int, capacity: int) -> Source:
        """All test shapes, in a grid."""
        return dataclasses.replace(self._test, resolution=resolution, capacity=capacity)

    def examples(self) -> dict[str, list[np.ndarray]]:
        """Class -> its first shape as voxels, at several resolutions."""
        known = list(self._test.sets.class_names)
        shown = {}
        for name in [name for name in self._shown if name in known] or known[:2]:
            first = np.flatnonzero(self._test.sets.label == known.index(name))[:1]
            batches = [self.at(r, r**3).batch(first, epoch=0) for r in EXAMPLE_RESOLUTIONS]
            shown[str(name)] = [
                np.asarray(ilajax.to_dense(batch.inputs))[0, ..., 0] > 0 for batch in batches
            ]
        return shown


def occupancy(shapes: Shapes, resolution: int) -> list[Row]:
    """How many voxels shapes occupy, as the row of one resolution."""
    source = shapes.at(resolution, capacity=1)
    voxels = []
    for piece in shapes.pieces:
        batch = source.batch(piece, epoch=0)
        # One slot, as voxels that do not fit are counted all the same.
        voxels.append(batch.inputs.counts[:, 0] + batch.overflow)
    occupied = np.concatenate(voxels)
    row = {"rank": 3, "samples": len(occupied), **_spread(occupied / resolution**3)}
    if shapes.points is not None:
        row |= {"points": shapes.points, "points_per_voxel": float(shapes.points / occupied.mean())}
    return [row]


def uniform_layers(name: str, options: argparse.Namespace) -> list[Row]:
    """Rows of random sites, beside what is expected of them."""
    resolution = options.layer_resolution
    x = workloads.random_sites(
        resolution,
        batch=workloads.FEW,
        density=UNIFORM[name](resolution),
        capacity=resolution**3,
        seed=options.seed,
    ).map(jnp.ones_like)
    stored = float(x.counts.mean()) / x.sites  # a whole number of sites
    return _layers([x], options.layers, expected_density(stored, x.spatial_shape, options.layers))


def shape_layers(shapes: Shapes, options: argparse.Namespace) -> list[Row]:
    """Rows of the data set's shapes."""
    resolution = options.layer_resolution
    source = shapes.at(resolution, capacity=resolution**3)
    return _layers([source.batch(piece, 0).inputs for piece in shapes.pieces], options.layers)


def digit_layers(options: argparse.Namespace) -> list[Row]:
    """Rows of digits, in two dimensions."""
    drawn = _digits()[1].images[: options.samples] > 0
    x = ilajax.from_dense(jnp.asarray(drawn, jnp.float32)[..., None], PIXELS**2)
    return _layers([x], options.layers)


def fill_in(x: ilajax.SparseTensor, layers: int, capacity: int) -> np.ndarray:
    """Density of the input, and behind each of some convolutions whose weights are all 1.

    The input, [B, *S, 1], holds 1. Windows have 3 sites along each axis; the strongest responses get one of
    the slots of each output, all with as many as there are sites. Returns float64[layers + 1, B].
    """
    counts = [x.counts[:, 0]]
    for _ in range(layers):
        x = _convolved(x, capacity)
        counts.append(x.counts[:, 0])
    return np.array(counts) / x.sites


@functools.partial(jax.jit, static_argnames="capacity")
def _convolved(x: ilajax.SparseTensor, capacity: int) -> ilajax.SparseTensor:
    ones = jnp.ones((*(3,) * len(x.spatial_shape), 1, 1))
    return ilajax.conv(x, ilajax.SparseKernel.from_dense(ones), capacity=capacity).features


def expected_density(density: float, spatial_shape: Sequence[int], layers: int) -> list[float]:
    """What `fill_in` is expected to give where each site is stored with this probability, by itself.

    Behind n layers there is a response where the 2 n + 1 sites along each of d axes hold an entry. That is
    1 - (1 - density)^((2 n + 1)^d) of the sites, and less at a border, which cuts the window.
    """
    found = []
    for reach in range(layers + 1):
        window = np.ones(())
        for size in spatial_shape:
            before = np.minimum(np.arange(size), reach)
            window = np.multiply.outer(window, before + 1 + before[::-1])
        found.append(float(np.mean(1 - (1 - density) ** window)))
    return found


def activations(picture: Path, options: argparse.Namespace, reporter: frame.Reporter) -> list[Row]:
    """Trains a dense net and its sparse twin, draws the picture; the density of each map in it."""
    training, test = _digits()
    slots = int(max(training.counts().max(), test.counts().max()))
    digits = test.images[:DIGITS_SHOWN]
    maps = {}
    for name, bound, to_input in (
        ("dense", None, mnist.dense_input),
        ("sparse", options.density_bound, mnist.SparseInput(slots)),
    ):
        model = mnist.make_net(bound, seed=options.seed)
        transformation = mnist.make_transformation(options.learning_rate)
        run = Run(
            name=name,
            model=model,
            optimizer=nnx.Optimizer(model, transformation, wrt=nnx.Param),
            to_input=to_input,
            directory=options.out / "nets",
            seed=options.seed,
        )
        train(
            run,
            Arrays(training.images, training.labels),
            (test.images, test.labels),
            epochs=options.epochs,
            batch_size=BATCH,
            reporter=reporter,
        )
        model.eval()
        maps[name] = feature_maps(model, to_input(digits))
    dense, sparse = paired_channels(maps["dense"], maps["sparse"], ["conv1", "conv2", "conv3"])
    activations_picture(picture, digits, dense, sparse, bound=options.density_bound)
    return [
        {
            "rank": 2,
            "network": network,
            "bound": options.density_bound if network == "sparse" else None,
            "layer": layer,
            "sample": sample,
            "density": float(np.mean(image != 0)),
        }
        for network, first, layers in (
            ("input", 0, [digits]),
            ("dense", 1, dense),
            ("sparse", 1, sparse),
        )
        for layer, images in enumerate(layers, first)
        for sample, image in enumerate(images)
    ]


def _layers(
    pieces: Sequence[ilajax.SparseTensor], layers: int, expected: Sequence[float] | None = None
) -> list[Row]:
    """Rows without a bound, and with the mean density of the data as the bound.

    Inputs have a slot for each site, as all outputs without a bound do: one program serves them.
    """
    sites = pieces[0].sites
    stored = np.concatenate([x.counts[:, 0] for x in pieces])
    slots = max(1, round(float(stored.mean())))
    rows = []
    for capacity, bound in ((sites, None), (slots, slots / sites)):
        found = np.concatenate([fill_in(x, layers, capacity) for x in pieces], axis=1)
        means = found.mean(axis=1)
        for layer, densities in enumerate(found):
            rows.append(
                {
                    "rank": len(pieces[0].spatial_shape),
                    "samples": len(densities),
                    "bound": bound,
                    "layer": layer,
                    **_spread(densities),
                    "growth": float(means[layer] / means[layer - 1]) if layer else None,
                    "expected": expected[layer] if expected and bound is None else None,
                }
            )
    return rows


def _digits() -> tuple[Digits, Digits]:
    """The shipped digits, to train and to test."""
    training, test = load_mnist()
    return training.threshold(mnist.PIXEL_THRESHOLD), test.threshold(mnist.PIXEL_THRESHOLD)


def _spread(densities: np.ndarray) -> Row:
    low, high = np.percentile(densities, (10, 90)).tolist()
    return {"density": float(densities.mean()), "density_p10": low, "density_p90": high}
