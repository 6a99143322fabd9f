"""One door to the data sets of shapes: a name and a folder in, sources of training and test batches out."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import ilajax
from experiments import frame
from experiments.data.loader import Source
from experiments.data.modelnet40 import listed, load_modelnet40
from experiments.data.point_sets import load_point_sets, make_point_sets
from experiments.data.solids import POINTS_PER_VOXEL
from experiments.data.voxels import VoxelSource, check_grid
from ilajax.models.octnet3 import TABLE_2

# What lies in the folder of each set; None: it is made on the spot.
FOLDERS: dict[str, str | None] = {
    "shapes": None,
    "kicad": "a folder with train.npz and test.npz of point sets",
    "modelnet40": "a folder with CLASS/train/*.off and CLASS/test/*.off",
}
NAMES = tuple(FOLDERS)
# A surface that fills the grid meets so many r^2 voxels: a made shape in the mean (at most 5), and a box.
SURFACE, BOX = 3, 6
LEAST_POINTS = 2048


class Dataset(NamedTuple):
    """Labelled shapes, as voxels that hold 1; only those to train on are turned and moved."""

    training: Source
    test: Source
    class_names: tuple[str, ...]


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds --data, what `add_directory` adds, and --capacity; `load_dataset` checks them together."""
    add = parser.add_argument
    data = "solids made on the spot, electronic parts, or furniture and more"
    add("--data", choices=NAMES, default="shapes", help=data)
    add_directory(parser)
    capacity = "voxels of a sample that are kept; by default all of kicad's, else 6 r^2"
    add("--capacity", type=frame.positive_int, metavar="K", help=capacity)


# Grids that OctNet3 has an architecture for.
GRIDS = [r for r, architecture in TABLE_2.items() if len(architecture.input_shape) == 3]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds --train-size and --test-size."""
    size = {"type": frame.positive_int, "metavar": "N"}
    parser.add_argument("--train-size", default=800, help="made solids to train", **size)
    parser.add_argument("--test-size", default=320, help="made solids to test", **size)


def add_resolution(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds --resolution, one of `GRIDS`."""
    help = "of each axis"
    parser.add_argument("--resolution", type=int, choices=GRIDS, default=default, help=help)


def chosen_dataset(options: argparse.Namespace, resolution: int) -> Dataset:
    """`load_dataset` of what `add_data` and `add_sizes` have added; it has a batch, or ValueError."""
    data = load_dataset(
        options.data,
        resolution=resolution,
        capacity=options.capacity,
        train_size=options.train_size,
        test_size=options.test_size,
        **where(options),
    )
    if len(data.training) < options.batch_size:
        raise ValueError(
            f"--batch-size {options.batch_size} is more than the {len(data.training)} samples to train on."
        )
    return data


def add_directory(parser: argparse.ArgumentParser) -> None:
    """Adds --data-dir, --cache-dir and --skip-broken, which `where` takes to `load_dataset`."""
    add = parser.add_argument
    needs = "; ".join(f"{name}: {folder}" for name, folder in FOLDERS.items() if folder)
    add("--data-dir", type=Path, metavar="DIR", help=f"of the data, {needs}")
    cache = "where modelnet40's meshes are kept as arrays; by default in --data-dir"
    add("--cache-dir", type=Path, metavar="DIR", help=cache)
    skip = "leave out those files of modelnet40 that cannot be read"
    add("--skip-broken", action="store_true", help=skip)


def where(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_directory` added, as arguments of `load_dataset` and `check_directory`."""
    return {
        "directory": options.data_dir,
        "cache_dir": options.cache_dir,
        "skip_broken": options.skip_broken,
    }


def check_directory(
    name: str,
    directory: str | Path | None,
    cache_dir: str | Path | None = None,
    skip_broken: bool = False,
) -> None:
    """Raises ValueError unless there are a folder and other options where they are needed, and only there."""
    folder = FOLDERS.get(name)
    if folder and directory is None:
        raise ValueError(f"--data {name} needs --data-dir DIR, {folder}.")
    if folder is None and directory is not None:
        needed = " or ".join(other for other, folder in FOLDERS.items() if folder)
        raise ValueError(
            f"--data {name} is made on the spot, but --data-dir is {directory}. Leave it out, or give "
            f"--data {needed}."
        )
    if name != "modelnet40" and (cache_dir is not None or skip_broken):
        raise ValueError(
            f"--cache-dir and --skip-broken are for --data modelnet40, but --data is {name}. Leave them out."
        )


def load_dataset(
    name: str,
    directory: str | Path | None = None,
    *,
    resolution: int,
    capacity: int | None = None,
    seed: int | None = None,
    jitter: float = 0.0,
    train_size: int = 800,
    test_size: int = 320,
    cache_dir: str | Path | None = None,
    skip_broken: bool = False,
) -> Dataset:
    """Loads or makes a set; a sample is scaled until the longest edge of its box fills the grid.

    The first use of ModelNet40 reads all its files, and says how far it is; see `load_modelnet40`. Files that
    are left out are named on the terminal.

    Made shapes are clouds of 24 r^2 points, about 8 for each voxel of their surfaces and 2,048 at least. They
    are made for each batch, by who makes the batch, and kept nowhere: that takes 15 ms a shape at 64^3, on
    top of 8 ms for its voxels.

    By default kicad's capacity is the number of a cloud's points, or of sites where they are fewer, which
    cuts nothing. For made shapes and meshes it is 6 r^2, the voxels of a box's surface that fills the grid.
    What does not fit is counted in `Batch.overflow`.

    Args:
      name, directory: in `NAMES`, and where the set lies, for those that are not made on the spot.
      resolution: of each of the three axes of the grid, r.
      capacity: slots of a sample.
      seed: of the augmentation of the training samples, which turns and moves them; None: there is none.
      jitter: voxels that a training sample is moved by at most; test samples have the same margin.
      train_size, test_size: samples that are made; a loaded set has its own numbers.
      cache_dir, skip_broken: see `load_modelnet40`.

    Example:
      >>> data = load_dataset("shapes", resolution=16, seed=0, train_size=16, test_size=8)
      >>> data.training.batch(np.array([3, 5]), epoch=1).inputs.shape
      (2, 16, 16, 16, 1)
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}.")
    check_directory(name, directory, cache_dir, skip_broken)
    check_grid(resolution, 1 if capacity is None else capacity, jitter)
    folder = Path(directory or ".")
    slots = ilajax.capacity(min(1.0, BOX / resolution), (resolution,) * 3)
    if name == "modelnet40":
        training, test = load_modelnet40(
            folder, cache_dir=cache_dir, skip_broken=skip_broken, progress=_tell
        )
        if broken := [*training.left_out.tolist(), *test.left_out.tolist()]:
            print(f"left out {len(broken):,} files:\n{listed(broken, 3)}", flush=True)
    elif name == "kicad":
        training, test = (load_point_sets(folder / f"{part}.npz") for part in ("train", "test"))
        slots = min(training.points.shape[1], resolution**3)
    else:
        points = max(LEAST_POINTS, POINTS_PER_VOXEL * SURFACE * resolution**2)
        training = make_point_sets(train_size, points, seed=0, stored=False)
        test = make_point_sets(test_size, points, seed=1, stored=False)
    if list(training.class_names) != list(test.class_names):
        raise ValueError(
            f"{directory}: the training set has the classes {list(training.class_names)}, the test set "
            f"{list(test.class_names)}. Give sets of the same classes."
        )
    slots = slots if capacity is None else capacity
    return Dataset(
        VoxelSource(training, resolution, slots, seed=seed, jitter=jitter),
        VoxelSource(test, resolution, slots, jitter=jitter),
        tuple(map(str, training.class_names)),
    )


def _tell(done: int, count: int) -> None:
    if done % 1000 == 0:
        print(f"read {done:,} of {count:,} meshes, once for all", flush=True)
