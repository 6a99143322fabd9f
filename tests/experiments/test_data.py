"""IDX files: what is written is read back, and every kind of broken file is named with its fault."""

import gzip
import struct

import numpy as np
import pytest

from experiments.data import make_digits
from experiments.data.idx import read_idx, write_idx
from experiments.data.mnist import SHIPPED, load_mnist


@pytest.fixture
def folder(tmp_path):
    """Twelve random digits to train and five to test, gzipped."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0, 28, 28)])
def test_what_is_written_is_read_back(tmp_path, shape, suffix):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / f"digits{suffix}"
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path, rank=len(shape)), array)


def test_the_bytes_of_the_format(tmp_path):
    """Written out by hand, so that reader and writer cannot be wrong together."""
    (tmp_path / "labels").write_bytes(b"\0\0\x08\x01" + struct.pack(">i", 3) + b"\x05\x00\x04")
    np.testing.assert_array_equal(read_idx(tmp_path / "labels", rank=1), [5, 0, 4])


GOOD = b"\0\0\x08\x01" + struct.pack(">i", 3) + b"\x05\x00\x04"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\0\0\x08\x03" + GOOD[4:], "magic number is 0x00000803, expected 0x00000801"),
        (b"\0\0\x0d\x01" + GOOD[4:], "magic number is 0x00000d01"),
        (b"", "no bytes"),
        (GOOD[:6], "has 6 bytes, but its header announces"),
        (GOOD[:-1], r"has 10 bytes, but its header announces \(3,\), that is 11"),
        (GOOD + b"\0\0", "has 13 bytes, .* that is 11"),
        (b"\0\0\x08\x01" + struct.pack(">i", -3), r"announces \(4294967293,\)"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_broken_file_is_named_with_its_fault(tmp_path, content, fault, suffix):
    path = tmp_path / f"labels-idx1-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=fault) as caught:
        read_idx(path, rank=1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda stream: stream[:-5], "truncated, or not a sound gzip file"),
        (lambda stream: stream[:12], "truncated, or not a sound gzip file"),
        (lambda stream: b"PK" + stream[2:], "truncated, or not a sound gzip file"),
        (
            lambda stream: stream[:-8] + b"\0\0\0\0" + stream[-4:],
            "truncated, or not a sound gzip file",
        ),
        (
            lambda stream: stream[:10] + b"\xff\xff" + stream[12:],
            "truncated, or not a sound gzip file",
        ),
    ],
)
def test_a_broken_gzip_stream_is_named_with_its_fault(tmp_path, damage, fault):
    path = tmp_path / "labels.gz"
    path.write_bytes(damage(gzip.compress(GOOD, mtime=0)))
    with pytest.raises(ValueError, match=fault) as caught:
        read_idx(path, rank=1)
    assert str(path) in str(caught.value)


def test_load_takes_plain_and_gzipped_files(folder):
    gzipped = load_mnist(folder)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = load_mnist(folder)
    for a, b in zip(gzipped, plain, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_missing_files_are_listed(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"t10k-labels-idx1-ubyte, .*t10k-labels-idx1-ubyte.gz"
    ):
        load_mnist(folder)
    with pytest.raises(FileNotFoundError, match="train-images"):
        load_mnist(folder / "nowhere")


def test_images_and_labels_must_be_as_many(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))
    with pytest.raises(ValueError, match=r"holds 12 images, but .*train-labels.* holds 11 labels"):
        load_mnist(folder)


def test_images_must_be_digits(folder):
    write_idx(folder / "train-images-idx3-ubyte.gz", np.zeros((12, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"images \(12, 32, 32\), expected \(N, 28, 28\)"):
        load_mnist(folder)


def test_labels_must_be_digits(folder):
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(5, 10, np.uint8))
    with pytest.raises(ValueError, match=r"t10k-labels.* holds the label 10"):
        load_mnist(folder)


def test_threshold_keeps_pixels_of_the_level_itself(folder):
    digits, _ = load_mnist(folder)
    sparse = digits.threshold(50)
    assert sparse.images[sparse.images > 0].min() == 50
    kept = digits.images >= 50
    np.testing.assert_array_equal(sparse.images[kept], digits.images[kept])
    np.testing.assert_array_equal(sparse.counts(), kept.sum((1, 2)))


def test_fingerprints_tell_data_apart(folder):
    train, test = load_mnist(folder)
    assert train.fingerprint() == load_mnist(folder)[0].fingerprint()
    assert len({train.fingerprint(), test.fingerprint(), train.threshold(50).fingerprint()}) == 3


def test_the_shipped_digits():
    train, test = load_mnist()
    assert train.images.shape == (8000, 28, 28)
    assert test.images.shape == (2000, 28, 28)
    for digits in (train, test):
        share = np.bincount(digits.labels, minlength=10) / len(digits)
        assert share.min() > 0.08
    both = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not both
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 2_000_000


def test_make_digits_wants_all_of_the_test_images(folder):
    with pytest.raises(SystemExit, match="5 test digits, expected MNIST's 10,000"):
        make_digits.main(str(folder), folder / "out")


def test_make_digits_permutes_and_splits(tmp_path):
    """The test images of MNIST put together again give the same shipped bytes."""
    train, test = load_mnist()
    order = np.random.Generator(np.random.PCG64(make_digits.SEED)).permutation(10_000)
    for name in ("images", "labels"):
        parts = np.concatenate([getattr(train, name), getattr(test, name)])
        original = np.empty_like(parts)
        original[order] = parts
        rank = "idx3" if name == "images" else "idx1"
        write_idx(tmp_path / f"t10k-{name}-{rank}-ubyte", original)
        write_idx(tmp_path / f"train-{name}-{rank}-ubyte", original[:1])
    out = tmp_path / "out"
    make_digits.main(str(tmp_path), out)
    for file in SHIPPED.iterdir():
        # Compressors differ between versions of zlib, what they hold does not.
        assert gzip.decompress((out / file.name).read_bytes()) == gzip.decompress(file.read_bytes())
