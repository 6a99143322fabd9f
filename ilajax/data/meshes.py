"""Triangle meshes to voxels: which voxels a surface meets. NumPy only: any worker process may run it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ilajax.data._place import axes_first, column, in_voxels, spacing
from ilajax.geometry import check_spatial_shape

# For memory: triangles that are prepared at once, and (triangle, cell) pairs that are tested at once.
_TRIANGLES = 1 << 14
_PAIRS = 1 << 15
_KEYS = 1 << 21  # found keys that may wait until repeated ones are dropped
_FARTHEST = 2.0**40  # voxels from the grid, where float64 still resolves 1/4096 of a voxel


def mesh_voxels(
    vertices: Any,
    faces: Any,
    *,
    spatial_shape: Sequence[int],
    voxel_size: float | Sequence[float] | None = None,
    origin: Sequence[float] | None = None,
) -> np.ndarray:
    """The voxels that the surface of a triangle mesh meets.

    These are the voxels `floor((p - origin) / voxel_size)` of all points p of all triangles. A voxel owns its
    lower borders, not its upper ones; it is met even if a triangle touches it in a single point that it owns.
    A triangle without an area counts as the segment or the point that it is. Faces need no order, no
    orientation, and no neighbours. The inside of a closed surface is not filled.

    Each triangle starts with a block of 2 x 2 x 2 cells that covers it. Cells that it meets are split in 8,
    down to single voxels. A triangle is tested against a cell by separating axes [1], where each border
    belongs to one side. The test is in float64, so within rounding error of a border either side may get the
    voxel. It is exact if coordinates in voxels are multiples of 1/64, in a grid of up to 1024.

    It needs only NumPy. Time depends on the number of triangles and of the voxels that they meet, not on the
    sites of the grid.

    Args:
      vertices: float[V, 3] of positions, in any unit.
      faces: int[F, 3], the three vertices of each triangle. Vertices that no face uses do not count.
      spatial_shape: the grid, 3 axes, in the order of the columns of `vertices`.
      voxel_size: edge of a voxel, in the unit of the vertices: one number, or one for each axis. By default
        the surface is scaled into the grid as `voxelize` scales a cloud: its box reaches from border to
        border, and what is on an upper border belongs to the last voxel.
      origin: lower corner of the grid, one number for each axis; by default the minimum of the surface.
        Only with `voxel_size`. Whatever is outside the grid is left out.

    Returns:
      int32[M, 3], the coordinates of the voxels in ascending order of their keys, without repeats; M = 0 if
      there are no faces.

    Raises:
      TypeError, ValueError: if an argument has a wrong type, shape or value, a position is NaN or infinite,
        or a face names a vertex that does not exist.

    References:
      [1] Akenine-Möller, Fast 3D triangle-box overlap testing, 2001.

    Example:
      >>> vertices = np.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
      >>> grid = {"spatial_shape": (4, 4, 4), "voxel_size": 1.0, "origin": (0, 0, 0)}
      >>> voxels = ilajax.data.mesh_voxels(vertices, [[0, 1, 2]], **grid)
      >>> len(voxels), voxels[:2].tolist()
      (13, [[0, 0, 0], [0, 1, 0]])

      Several meshes make a batch as clouds: the centres of their voxels, `voxels + 0.5`, in the same grid.

      >>> batch = ilajax.data.voxelize([voxels + 0.5], capacity=16, **grid)
      >>> batch.tensor.values[0].sum()
      np.float32(13.0)
    """
    spatial_shape = check_spatial_shape(spatial_shape)
    if len(spatial_shape) != 3:
        raise ValueError(f"spatial_shape must have 3 axes, as a mesh has, got {spatial_shape}.")
    grid = spacing(voxel_size, origin, 3)
    points = axes_first("vertices", vertices, 3)
    points, corners = _used(points, _checked_faces(faces, points.shape[1]))
    points = in_voxels(points, spatial_shape, grid)
    if np.abs(points).max(initial=0) > _FARTHEST:
        raise ValueError(
            f"voxel_size {voxel_size!r} puts a vertex {np.abs(points).max():.3g} voxels away from the "
            f"origin, too far to be exact. Use larger voxels, or drop such vertices and their faces."
        )
    # A surface that is scaled into the grid may touch its upper borders, as in one more layer of voxels.
    extent = column(spatial_shape)
    reach = extent + 1 if grid.edge is None else extent
    found, waiting = [np.zeros(0, np.int64)], 0
    for start in range(0, len(corners), _TRIANGLES):
        triangles = points[:, corners[start : start + _TRIANGLES].T]
        for cells in _met(triangles, reach):
            found.append(np.ravel_multi_index(tuple(np.minimum(cells, extent - 1)), spatial_shape))
            waiting += len(found[-1])
            if waiting > max(_KEYS, len(found[0])):
                found, waiting = [np.unique(np.concatenate(found))], 0
    places = np.unravel_index(np.unique(np.concatenate(found)), spatial_shape)
    return np.stack(places, axis=1, dtype=np.int32, casting="same_kind")


def _checked_faces(faces: Any, vertices: int) -> np.ndarray:
    """int64[F, 3]."""
    corners = np.asarray(faces)
    if corners.size == 0:
        return np.zeros((0, 3), np.int64)  # an empty list too
    if corners.ndim != 2 or corners.shape[1] != 3:
        raise ValueError(
            f"faces must have shape [F, 3], the vertices of each triangle, got {corners.shape}. Cut faces of "
            f"more corners into triangles first."
        )
    if not np.issubdtype(corners.dtype, np.integer):
        raise TypeError(f"faces must be integers, got {corners.dtype}.")
    wrong = ((corners < 0) | (corners >= vertices)).any(axis=1)
    if wrong.any():
        face = int(np.argmax(wrong))
        raise ValueError(
            f"faces must name vertices 0 to {vertices - 1}, but face {face} is {corners[face].tolist()} "
            f"({int(wrong.sum())} such faces)."
        )
    return corners.astype(np.int64, copy=False)


def _used(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that a face uses, and the faces with the new numbers of these points."""
    used = np.zeros(points.shape[1], bool)
    used[corners] = True
    return points[:, used], (np.cumsum(used) - 1)[corners]


def _met(triangles: np.ndarray, extent: np.ndarray) -> Iterator[np.ndarray]:
    """The cells int64[3, M] of the grid that triangles float64[3 axes, 3 corners, T] meet, with repeats."""
    low = np.floor(triangles.min(axis=1)).clip(0, None)
    high = np.floor(triangles.max(axis=1)).clip(None, extent - 1)
    near = (low <= high).all(axis=0)
    triangles = triangles[:, :, near]
    low, high = low[:, near].astype(np.int64), high[:, near].astype(np.int64)
    for level, chosen in _pieces(low, high):
        piece, first, last = triangles[:, :, chosen], low[:, chosen], high[:, chosen]
        triangle, block = np.arange(len(chosen)), first >> level
        for cell_level in range(level, -1, -1):
            halves = _half_spaces(piece / (1 << cell_level))
            box = (first >> cell_level, last >> cell_level)
            triangle, cells = _split(triangle, block, halves, box)
            block = 2 * cells
        yield cells


def _pieces(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Splits triangles into pieces that start with cells of one edge, 2 ** level, and do not meet too many.

    Yields:
      The level at which 2 x 2 x 2 cells cover each triangle, and the triangles' indices.
    """
    level = np.zeros(low.shape[1], np.int64)
    while (wide := ((high >> level) - (low >> level) > 1).any(axis=0)).any():
        level += wide
    # A flat piece of surface meets at most 3 voxels on each of its larger sides' sites, roughly.
    spans = np.sort(high - low + 1, axis=0)
    pairs = np.minimum(spans[0], 3) * spans[1] * spans[2]
    order = np.argsort(level, kind="stable")
    part = np.cumsum(pairs[order]) // _PAIRS
    cuts = np.flatnonzero(np.diff(level[order]) | np.diff(part)) + 1
    for chosen in np.split(order, cuts) if len(order) else ():
        yield int(level[chosen[0]]), chosen


class _HalfSpaces(NamedTuple):
    """What bounds the places of the unit cells that triangles meet, apart from the triangles' boxes.

    The Minkowski sum of a triangle and a cell is an intersection of half-spaces: a cell with the lower corner
    c is met only if `normal . c <= top` for all of them. Those of three edges in a projection along an axis
    have a normal without that axis. A cell is open above: if its farthest corner is not its own, the
    inequality is strict, and `top` is the next float below.
    """

    # float64[3 axes, 3 edges, (u, v, top), T], u and v the two other axes in ascending order.
    edges: np.ndarray
    plane: np.ndarray  # float64[2 sides, (x, y, z, top), T]


def _half_spaces(triangles: np.ndarray) -> _HalfSpaces:
    """The half-spaces of float64[3 axes, 3 corners, T], in units of cells."""
    edge = triangles[:, [1, 2, 0]] - triangles
    normal = np.cross(edge[:, 0], edge[:, 1], axis=0)
    edges = np.empty((3, 3, 3, triangles.shape[-1]))
    for axis in range(3):
        u, v = _others(axis)
        # Outwards: to the right of the edge, if the triangle's projection on (u, v) turns to the left. For a
        # projection without an area both are right, as edges go back and forth.
        turn = np.where((normal[axis] < 0) == (axis == 1), 1.0, -1.0)
        nu, nv = turn * edge[v], -turn * edge[u]
        farthest = nu * triangles[u] + nv * triangles[v]
        top = _top(farthest, np.minimum(nu, 0) + np.minimum(nv, 0))
        edges[axis] = np.stack([nu, nv, top], axis=1)
    along = (normal[:, None] * triangles).sum(axis=0)
    over = _top(along.max(axis=0), np.minimum(normal, 0).sum(axis=0))
    under = _top(-along.min(axis=0), np.minimum(-normal, 0).sum(axis=0))
    plane = np.stack([np.vstack([normal, over]), np.vstack([-normal, under])])
    return _HalfSpaces(edges, plane)


def _top(farthest: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The largest `normal . c` of a cell c that is met.

    Args:
      farthest: the largest `normal . p` of the triangle's points p.
      reach: the sum of the negative components of the normal, by which a cell comes closer than its corner c.
        The corner that does so is not the cell's own, unless it is c.
    """
    top = farthest - reach
    # Just below 0 there are subnormal numbers, which a processor may be set to treat as 0.
    below = np.nextafter(top - np.finfo(np.float64).tiny, -np.inf)
    return np.where(reach < 0, below, top)


def _others(axis: int) -> tuple[int, int]:
    """The two other axes, in ascending order."""
    return (1 if axis == 0 else 0), (1 if axis == 2 else 2)


def _split(
    triangle: np.ndarray, block: np.ndarray, halves: _HalfSpaces, box: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the 2 x 2 x 2 cells of each block that its triangle meets.

    Args:
      triangle: int[P], the triangle of each pair.
      block: int[3, P], the lowest cell of each pair's block.
      halves: the half-spaces of all triangles.
      box: the lowest and the highest cell of each triangle's box, int[3, T].

    Returns:
      The triangle int[M] and the cell int[3, M] of each pair that is left.
    """
    cells = block[:, None] + np.arange(2)[:, None]  # [3, 2, P]
    low, high = (bound[:, None, triangle] for bound in box)
    inside = (low <= cells) & (cells <= high)
    met = np.ones((2, 2, 2, len(triangle)), bool)
    for axis in range(3):
        u, v = _others(axis)
        by_axis = np.moveaxis(met, axis, 0)
        by_axis &= inside[axis][:, None, None]
        for edge in halves.edges[axis]:
            nu, nv, top = edge[:, triangle]
            by_axis &= (nu * cells[u])[:, None] + (nv * cells[v])[None] <= top
    for side in halves.plane:
        nx, ny, nz, top = side[:, triangle]
        in_plane = (ny * cells[1])[:, None] + (nz * cells[2])[None]
        met &= (nx * cells[0])[:, None, None] + in_plane <= top
    *offset, pair = np.nonzero(met)
    return triangle[pair], block[:, pair] + np.stack(offset)
