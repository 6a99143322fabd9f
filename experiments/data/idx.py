"""The IDX format of the MNIST files, plain or gzipped.

A file is a magic number (two zero bytes, a type code, the number of axes), the length of each axis as
a big-endian int32, and the entries in row-major order.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, *, rank: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes; a name that ends in `.gz` is decompressed.

    Args:
      path: the file.
      rank: the number of axes that the file must have (3 for images, 1 for labels).

    Returns:
      The entries, uint8 of `rank` axes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and what is wrong with it: the magic number, a length that does not fit
        the header, or a broken gzip stream.
    """
    path = Path(path)
    content = _content(path)
    magic = bytes((0, 0, UNSIGNED_BYTE, rank))
    if content[:4] != magic:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes with {rank} axes: its magic number is "
            f"0x{content[:4].hex() or '(no bytes)'}, expected 0x{magic.hex()}. "
            f"Images have 3 axes, labels 1: were the files swapped?"
        )
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(
            f"{path} is truncated: {len(content)} bytes are too few for its header of {header}. "
            f"Fetch it again."
        )
    shape = struct.unpack(f">{rank}i", content[4:header])
    if min(shape) < 0:
        raise ValueError(f"{path} has a negative length in its header: {shape}.")
    expected = header + math.prod(shape)
    if len(content) < expected:
        raise ValueError(
            f"{path} is truncated: its header announces {shape}, that is {expected} bytes, but it has "
            f"{len(content)}. Fetch it again."
        )
    if len(content) > expected:
        raise ValueError(
            f"{path} has {len(content) - expected} trailing bytes after the {shape} entries that its "
            f"header announces."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Writes uint8 entries as an IDX file; a name that ends in `.gz` is compressed.

    The bytes depend on the entries alone: no time stamp stands in the gzip header.

    Raises:
      TypeError: if the array is not uint8.
    """
    if array.dtype != np.uint8:
        raise TypeError(f"array must be uint8, got {array.dtype}.")
    header = bytes((0, 0, UNSIGNED_BYTE, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape)
    content = header + array.tobytes()
    path = Path(path)
    path.write_bytes(gzip.compress(content, 9, mtime=0) if path.suffix == ".gz" else content)


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError:
        raise ValueError(
            f"{path} is truncated: its gzip stream ends early. Fetch it again."
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a sound gzip file: {error}.") from None
