"""What pooling must compute, as NumPy loops that share no code with ilajax; see oracles.py."""

import itertools
import math

import numpy as np

import oracles


def side_by_side(grid, window):
    """The geometry of cells that cover a grid without overlap."""
    past = [-s % w for s, w in zip(grid, window, strict=True)]
    return oracles.Geometry(grid, window, window, [(0, p) for p in past])


def windows_of(position, geometry):
    """The windows that hold a position, by trying all that come near it."""
    holding = []
    for axis, p in enumerate(map(int, position)):
        place, width = p + geometry.pads[axis][0], geometry.window[axis]
        stride = geometry.strides[axis]
        near = range((place - width) // stride, place // stride + 2)
        windows = [o for o in near if 0 <= place - o * stride < width]
        holding.append([o for o in windows if 0 <= o < geometry.shape[axis]])
    return itertools.product(*holding)


def cells(x, geometry):
    """Entries by window: table [B][C] of {output key: [(slot, key, value), ...]}."""
    table = []
    for sample in oracles.segments(x):
        table.append([])
        for entries in sample:
            found = {}
            for slot, key, value in entries:
                for window in windows_of(np.unravel_index(key, geometry.grid), geometry):
                    cell = int(np.ravel_multi_index(window, geometry.shape))
                    found.setdefault(cell, []).append((slot, key, value))
            table[-1].append(found)
    return table


def divisor(kind, cell, entries, geometry):
    """What a sum over a window's entries is divided by: its positions inside the grid, or its entries."""
    if kind == "sum":
        return 1
    if kind == "stored":
        return len(entries)
    corner = np.unravel_index(cell, geometry.shape)
    starts = [
        int(o) * s - low
        for o, s, (low, _) in zip(corner, geometry.strides, geometry.pads, strict=True)
    ]
    return math.prod(
        min(start + w, size) - max(start, 0)
        for start, w, size in zip(starts, geometry.window, geometry.grid, strict=True)
    )


def largest(entries):
    """The entry of a cell that max_pool takes: NaN first, of equals the lower key."""
    return min(entries, key=lambda e: (0, 0.0, e[1]) if math.isnan(e[2]) else (1, -e[2], e[1]))


def pool(x, geometry, capacity, kind):
    """keys and values of a pooling: "max", "sum", "avg" over sites, or over "stored" entries."""
    kept = []
    for sample in cells(x, geometry):
        kept.append([])
        for found in sample:
            keys = sorted(found)
            values = []
            for key in keys:
                if kind == "max":
                    value = largest(found[key])[2]
                else:
                    value = sum(e[2] for e in found[key]) / divisor(kind, key, found[key], geometry)
                values.append(float(np.asarray(value, np.float32).astype(x.values.dtype)))
            chosen, _ = oracles.select(keys, values, capacity, "value")
            kept[-1].append([(keys[i], values[i]) for i in chosen])
    return oracles.pack(kept, capacity, geometry.sites, x.values.dtype)


def pool_backward(x, geometry, kind, output_keys, cotangent):
    """Cotangent of x.values: to each window's maximum, or evenly to its entries."""
    gradient = np.zeros(x.values.shape)
    output_keys = np.broadcast_to(oracles.read(output_keys), cotangent.shape)
    for b, sample in enumerate(cells(x, geometry)):
        for c, found in enumerate(sample):
            for key, g in zip(output_keys[b, c], oracles.read(cotangent)[b, c], strict=True):
                if key == geometry.sites:
                    continue
                if kind == "max":
                    gradient[b, c, largest(found[key])[0]] += g
                else:
                    for slot, _, _ in found[key]:
                        gradient[b, c, slot] += g / divisor(kind, key, found[key], geometry)
    return gradient
