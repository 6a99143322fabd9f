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
    """Reads an IDX file of unsigned bytes with `rank` axes; a name that ends in `.gz` is decompressed.

    A ValueError names the file and what is wrong with it: the magic number, a length that does not fit the
    header, or a broken gzip stream.
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
    shape = struct.unpack(f">{rank}I", content[4:header].ljust(4 * rank, b"\0"))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path} has {len(content)} bytes, but its header announces {shape}, that is {expected}. "
            f"Fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes uint8 entries as an IDX file; a name that ends in `.gz` is compressed.

    The bytes depend on the entries alone: no time stamp stands in the gzip header.
    """
    header = bytes((0, 0, UNSIGNED_BYTE, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content, 9, mtime=0) if path.suffix == ".gz" else content)


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated, or not a sound gzip file: {error}. Fetch it again."
        ) from None
