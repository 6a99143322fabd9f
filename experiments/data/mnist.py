"""MNIST: 28 x 28 grey-level digits of ten classes, from IDX files."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from experiments.data.idx import read_idx

SHIPPED = Path(__file__).parent / "digits"
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Digits:
    """Labelled images."""

    images: np.ndarray  # uint8[N, 28, 28], grey levels
    labels: np.ndarray  # uint8[N], the classes 0 to 9

    def __len__(self) -> int:
        return len(self.labels)

    def threshold(self, level: int) -> "Digits":
        """The same digits with every pixel below `level` set to zero."""
        images = np.where(self.images < level, np.uint8(0), self.images)
        return dataclasses.replace(self, images=images)

    def counts(self) -> np.ndarray:
        """Non-zero pixels of each image, int[N]."""
        return np.count_nonzero(self.images, axis=(1, 2))

    def fingerprint(self) -> str:
        """A short hash of pixels and labels, to tell data sets apart."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()[:16]


def load_mnist(directory: str | Path | None = None) -> tuple[Digits, Digits]:
    """Loads the training and the test digits from a folder with the four IDX files of MNIST.

    They are plain or end in `.gz`. None: the 8,000 and 2,000 digits that are shipped with the repository.
    """
    directory = SHIPPED if directory is None else Path(directory)
    return _load(directory, "train"), _load(directory, "t10k")


def _load(directory: Path, part: str) -> Digits:
    images_path = _find(directory, f"{part}-images", "idx3-ubyte")
    labels_path = _find(directory, f"{part}-labels", "idx1-ubyte")
    images = read_idx(images_path, rank=3)
    labels = read_idx(labels_path, rank=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images, but {labels_path} holds {len(labels)} labels. "
            f"Both must come from the same part of MNIST."
        )
    if not len(images) or images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path} holds images {images.shape}, expected (N, 28, 28).")
    if labels.max() >= CLASSES:
        raise ValueError(f"{labels_path} holds the label {labels.max()}, expected 0 to 9.")
    return Digits(images, labels)


def _find(directory: Path, stem: str, kind: str) -> Path:
    # Some unpackers write a dot where the original name has a dash.
    names = [f"{stem}{dash}{kind}{suffix}" for suffix in ("", ".gz") for dash in ("-", ".")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(
        f"no {stem} file in {directory.absolute()}: looked for {', '.join(names)}. "
        f"Give the folder that holds the four IDX files of MNIST."
    )
