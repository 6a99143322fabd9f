"""How a sparse tensor is displayed: as one line of text, and as a table with pictures in notebooks.

The arrays may be tracers, None, or not computed yet: what cannot be read at once is left out, and nothing
raises.
"""

import base64
import struct
import time
import zlib
from typing import Any

import jax
import numpy as np

from ilajax.geometry import sites

PATIENCE = 0.1  # seconds to wait for a running computation
CHEAP = 2**26  # bytes of an array that is read for display
SAMPLES = 4  # shown side by side in a notebook
PIXELS = 128  # of a picture's longer edge
# Colours of a picture: transparent where nothing is stored, light to dark blue by magnitude, red for NaN.
EMPTY, FAINTEST, STRONGEST, NAN = 0, 1, 254, 255


def text(keys: Any, values: Any, spatial_shape: tuple[int, ...]) -> str:
    """One line without arrays, such as
    `SparseTensor(float32[1, 16, 16, 8], capacity=64 of 256 sites, 61% filled)`.

    The fill is the share of slots in use, over all segments. If some segments are full, their number follows:
    there a selection may have cut. The fill is left out if the keys are traced, not computed within
    `PATIENCE`, spread over several processes, or larger than `CHEAP`.
    """
    if any(len(getattr(a, "shape", ())) != 3 or not hasattr(a, "dtype") for a in (keys, values)):
        # Put there by transformations: None, objects, and stacks of tensors.
        return f"SparseTensor(keys={_leaf(keys)}, values={_leaf(values)})"
    batch, channels, capacity = values.shape
    parts = [
        f"{values.dtype}{[batch, *spatial_shape, channels]}",
        f"capacity={capacity} of {sites(spatial_shape)} sites",
    ]
    if keys.shape[1] == 1 and channels != 1:
        parts.append("shared support")
    stored = _stored(keys, spatial_shape)
    if stored is not None:
        parts.append(_fill(stored, capacity))
    return f"SparseTensor({', '.join(parts)})"


def html(keys: Any, values: Any, spatial_shape: tuple[int, ...]) -> str | None:
    """A table with pictures of the first samples; None if the keys cannot be read, see `text`.

    A picture shows the largest magnitude over the channels and over all axes but the last two. There are no
    pictures if the values cannot be read.
    """
    stored = _stored(keys, spatial_shape)
    if stored is None or len(getattr(values, "shape", ())) != 3 or not hasattr(values, "dtype"):
        return None
    batch, channels, capacity = values.shape
    rows = {
        "shape": f"{[batch, *spatial_shape, channels]}",
        "dtype": f"{values.dtype}",
        "capacity": f"{capacity:,} of {sites(spatial_shape):,} sites",
        "stored": _fill(stored, capacity),
        "density": _spread(stored / sites(spatial_shape)),
        "support": "shared by all channels" if keys.shape[1] == 1 else "of each channel",
    }
    cell = "<tr><th style='text-align:left'>{}</th><td style='text-align:left'>{}</td></tr>"
    table = "".join(cell.format(name, value) for name, value in rows.items())
    seen, numbers, pictures = _read(keys), _read(values), ""
    if seen is not None and numbers is not None:
        for b in range(min(batch, SAMPLES)):
            pictures += _picture(seen[b], numbers[b], spatial_shape, f"sample {b}")
    return (
        f"<div><b>SparseTensor</b><table>{table}</table>"
        f"<div style='display:flex;gap:8px;align-items:flex-start'>{pictures}</div></div>"
    )


def _leaf(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf)


def _read(array: Any) -> np.ndarray | None:
    """The array on the host; None if that would take a wait or a large copy, or is impossible."""
    if isinstance(array, np.ndarray):
        return array if array.nbytes <= CHEAP else None
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return None
    if not array.is_fully_addressable or array.is_deleted() or array.nbytes > CHEAP:
        return None
    ready = getattr(array, "is_ready", lambda: True)
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)
    try:
        return np.asarray(array)
    except Exception:  # the computation failed, which whoever uses the array will see
        return None


def _stored(keys: Any, spatial_shape: tuple[int, ...]) -> np.ndarray | None:
    """Stored sites of each key row, [B, C or 1]."""
    read = _read(keys)
    if read is None or read.ndim != 3 or read.dtype != np.int32:
        return None
    return np.count_nonzero(read < sites(spatial_shape), axis=2)


def _fill(stored: np.ndarray, capacity: int) -> str:
    slots, full = stored.size * capacity, int((stored == capacity).sum())
    if not slots:
        return "0% filled"
    # Only empty tensors show 0 %, and only full ones 100 %.
    percent = 100 * int(stored.sum()) / slots
    rounded = round(percent) if percent in (0, 100) else min(max(round(percent), 1), 99)
    some = f", full in {full} of {stored.size} segments" if 0 < full < stored.size else ""
    return f"{rounded}% filled{some}"


def _spread(density: np.ndarray) -> str:
    if not density.size:
        return "of no sample"
    return f"{density.mean():.3g} ({density.min():.3g} to {density.max():.3g})"


def _picture(
    keys: np.ndarray, values: np.ndarray, spatial_shape: tuple[int, ...], caption: str
) -> str:
    """An <img> of one sample: the largest magnitude over the channels and all axes but the last two."""
    height, width = (1, *spatial_shape)[-2:]
    step = -(-max(height, width) // PIXELS)
    image = np.full((-(-height // step), -(-width // step)), -1.0, np.float32)
    magnitude = np.abs(values.astype(np.float32))
    if len(keys) == 1:
        magnitude = magnitude.max(axis=0, keepdims=True)
    for row, strength in zip(keys, magnitude, strict=True):
        inside = (row >= 0) & (row < sites(spatial_shape))
        key = row[inside]
        place = (key // width % height // step, key % width // step)
        np.maximum.at(image, place, strength[inside])
    scale = float(np.max(image, where=np.isfinite(image), initial=0)) or 1.0
    shade = np.clip(np.nan_to_num(image, nan=0, posinf=scale), 0, scale) / scale
    shade = FAINTEST + shade * (STRONGEST - FAINTEST)
    indices = np.where(image < 0, EMPTY, np.where(np.isnan(image), NAN, shade)).astype(np.uint8)
    zoom = PIXELS / max(indices.shape)
    size = [max(round(n * zoom), 12) for n in indices.shape]
    data = base64.b64encode(_png(indices)).decode()
    return (
        f"<img src='data:image/png;base64,{data}' alt='{caption}' title='{caption}' style='"
        f"height:{size[0]}px;width:{size[1]}px;image-rendering:pixelated;border:1px solid #8888'/>"
    )


def _png(indices: np.ndarray) -> bytes:
    """A PNG file of palette indices uint8[height, width] (PNG specification, sections 5 and 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return b"".join([struct.pack(">I", len(data)), kind, data, check])

    height, width = indices.shape
    ramp = np.linspace([158, 202, 225], [8, 48, 107], STRONGEST).astype(np.uint8)
    palette = np.concatenate([[[255, 255, 255]], ramp, [[215, 25, 28]]]).astype(np.uint8)
    lines = np.pad(indices, [(0, 0), (1, 0)])  # each line starts with its filter: none
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", palette.tobytes())
        + chunk(b"tRNS", b"\x00")
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
