"""Makes the shipped digits: the 10,000 test images of MNIST, permuted and split 8,000 to 2,000.

    python -m experiments.data.make_digits FOLDER_OF_THE_ORIGINAL_FILES

The same input gives the same bytes.
"""

import sys
from pathlib import Path

import numpy as np

from experiments.data.idx import write_idx
from experiments.data.mnist import SHIPPED, load_mnist

SEED = 0
TRAIN = 8000


def main(directory: str, destination: Path = SHIPPED) -> None:
    _, digits = load_mnist(directory)
    if len(digits) != 10_000:
        sys.exit(f"{directory} holds {len(digits)} test digits, expected MNIST's 10,000.")
    # The first half of the file comes from easier writers than the second: mix before the split.
    order = np.random.Generator(np.random.PCG64(SEED)).permutation(len(digits))
    destination.mkdir(exist_ok=True)
    for part, chosen in (("train", order[:TRAIN]), ("t10k", order[TRAIN:])):
        write_idx(destination / f"{part}-images-idx3-ubyte.gz", digits.images[chosen])
        write_idx(destination / f"{part}-labels-idx1-ubyte.gz", digits.labels[chosen])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
