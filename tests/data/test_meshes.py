"""Meshes to voxels: against exact clipping of every triangle at every voxel, and against sampled points."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import ilajax
from ilajax.data import meshes

mesh_voxels = ilajax.data.mesh_voxels
UNIT = {"voxel_size": 1.0, "origin": (0, 0, 0)}
# Its corners and faces; the faces are turned either way.
CUBE = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
CUBE_FACES = [
    *([0, 1, 2], [1, 2, 3], [4, 5, 6], [5, 6, 7], [0, 1, 4], [1, 4, 5]),
    *([2, 3, 6], [3, 6, 7], [0, 2, 4], [2, 4, 6], [1, 3, 5], [3, 5, 7]),
]


def met(triangle, grid):
    """The voxels that a triangle meets, in exact arithmetic: what a closed box leaves of the triangle is met
    unless all of it lies on an upper border."""
    exact = [[Fraction(float(x)) for x in corner] for corner in triangle]
    voxels = []
    for voxel in np.ndindex(*grid):
        rest = exact
        for axis, low in enumerate(voxel):
            rest = clipped(clipped(rest, axis, low, 1), axis, low + 1, -1)
        if rest and all(min(p[axis] for p in rest) < voxel[axis] + 1 for axis in range(3)):
            voxels.append(list(voxel))
    return voxels


def clipped(polygon, axis, border, sign):
    """What lies at or above the border; at or below, if the sign is -1."""
    rest = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        at_p, at_q = sign * (p[axis] - border), sign * (q[axis] - border)
        if at_p >= 0:
            rest.append(p)
        if at_p * at_q < 0:
            share = at_p / (at_p - at_q)
            rest.append([a + share * (b - a) for a, b in zip(p, q, strict=True)])
    return rest


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("kind", ["any", "flat", "sliver", "segment", "point"])
def test_the_voxels_are_those_of_exact_clipping(steps, kind):
    """Catches a voxel too much or too few, above all where corners and edges lie on borders of voxels."""
    rng = np.random.default_rng(steps)
    for _ in range(6):
        grid = tuple(int(size) for size in rng.integers(1, 6, 3))
        triangle = rng.integers(-2 * steps, 7 * steps, (3, 3)) / steps
        if kind == "flat":
            triangle[:, rng.integers(3)] = rng.integers(0, 3)
        if kind == "sliver":
            triangle[2] = (triangle[0] + triangle[1]) / 2 + (0, 0, 1 / 64)
        if kind == "segment":
            triangle[2] = (3 * triangle[0] + triangle[1]) / 4
        if kind == "point":
            triangle[:] = np.abs(triangle[0])
        expected = met(triangle, grid)
        for order in ([0, 1, 2], [1, 0, 2]):
            found = mesh_voxels(triangle, [order], spatial_shape=grid, **UNIT)
            assert found.dtype == np.int32
            assert found.tolist() == expected


def test_all_points_of_large_triangles_are_found():
    """Catches a coarse cell that is given up too early, in a grid that is no power of two."""
    rng = np.random.default_rng(0)
    grid = (50, 33, 70)
    vertices = rng.integers(-300, 3600, (12, 3)) / 64
    faces = rng.permutation(12).reshape(4, 3)
    voxels = mesh_voxels(vertices, faces, spatial_shape=grid, **UNIT)
    # Weights that are multiples of 1/1024 put every point exactly where it belongs.
    weights = np.sort(rng.integers(0, 1025, (40_000, 2)), axis=1)
    weights = np.diff(weights, axis=1, prepend=0, append=1024) / 1024
    places = np.floor(np.einsum("pk,fka->fpa", weights, vertices[faces])).reshape(-1, 3).astype(int)
    places = places[((places >= 0) & (places < grid)).all(axis=1)]
    sampled = set(np.ravel_multi_index(places.T, grid).tolist())
    found = np.ravel_multi_index(voxels.T, grid)
    assert len(sampled) > 2000
    assert sampled <= set(found.tolist())
    assert (np.diff(found) > 0).all()
    # Those that no sample fell into: all of them near a triangle's edge, so few.
    assert len(found) < 1.2 * len(sampled)
    missed = np.setdiff1d(found, list(sampled))[:6]
    for voxel in np.stack(np.unravel_index(missed, grid), axis=1):
        moved = [vertices[face] - voxel for face in faces]
        assert any(met(triangle, (1, 1, 1)) for triangle in moved)


@pytest.mark.parametrize("grid", [(7, 7, 7), (5, 6, 9), (1, 1, 1), (2, 40, 3)])
def test_a_cube_is_scaled_into_the_grid(grid):
    """Catches another scale than that of `voxelize`, and a face on the upper border that falls off."""
    edge = min(grid)
    voxels = mesh_voxels(3 * CUBE - 1, CUBE_FACES, spatial_shape=grid)
    low = [(size - edge) / 2 for size in grid]
    along = [
        {int(np.floor(l)), min(int(np.floor(l + edge)), size - 1)}
        for l, size in zip(low, grid, strict=True)
    ]
    expected = [
        list(voxel)
        for voxel in itertools.product(*(range(min(a), max(a) + 1) for a in along))
        if any(v in a for v, a in zip(voxel, along, strict=True))
    ]
    assert voxels.tolist() == expected


def test_rounding_loses_no_face():
    """Catches a face of the box that rounding puts just outside of the grid it is scaled into."""
    rng = np.random.default_rng(3)
    for size, shift in rng.uniform(0, 9, (60, 2)):
        voxels = mesh_voxels(size * CUBE + shift, CUBE_FACES, spatial_shape=(7, 7, 7))
        assert len(voxels) == 7**3 - 5**3


def test_a_mesh_lies_where_the_cloud_of_its_vertices_does():
    """Catches a voxel of a vertex that is missing, and a batch of other voxels than were found."""
    rng = np.random.default_rng(1)
    vertices, faces = rng.normal(size=(30, 3)).astype(np.float32), np.arange(30).reshape(10, 3)
    for grid in (
        {"spatial_shape": (12, 9, 20)},
        {"spatial_shape": (12, 9, 20), "voxel_size": (0.3, 0.5, 0.2)},
        {"spatial_shape": (12, 9, 20), "voxel_size": 0.2, "origin": (-1, -0.5, 0)},
    ):
        cloud = ilajax.data.voxelize([vertices], capacity=2160, **grid).tensor
        occupied = cloud.keys[0, 0][cloud.keys[0, 0] < 2160]
        voxels = mesh_voxels(vertices, faces, **grid)
        found = np.ravel_multi_index(voxels.T, (12, 9, 20))
        assert set(occupied.tolist()) < set(found.tolist())
        batch = ilajax.data.voxelize(
            [voxels + 0.5], spatial_shape=(12, 9, 20), capacity=2160, **UNIT
        )
        assert batch.tensor.keys[0, 0, : len(found)].tolist() == found.tolist()
        assert batch.tensor.values.sum() == len(found)


def test_borders_belong_to_one_side():
    """Catches a face between two layers of voxels that is found in both, or in the wrong one."""
    square = np.array([[0, 0, 2], [4, 0, 2], [0, 4, 2], [4, 4, 2.0]])
    up = np.array([0, 0, 2])
    grid = {"spatial_shape": (4, 4, 4), **UNIT}
    faces = [[0, 1, 2], [1, 2, 3]]
    assert set(mesh_voxels(square, faces, **grid)[:, 2].tolist()) == {2}
    assert len(mesh_voxels(square, faces, **grid)) == 16
    assert len(mesh_voxels(square + up, faces, **grid)) == 0
    assert len(mesh_voxels(square - up, faces, **grid)) == 16
    # Through the corners of voxels: each is met in its own corner, or along its diagonal.
    diagonal = np.array([[0, 0, 0], [4, 4, 0], [0, 0, 4], [4, 4, 4.0]])
    voxels = mesh_voxels(diagonal, faces, **grid)
    assert voxels.tolist() == [[i, i, k] for i in range(4) for k in range(4)]


def test_pieces_do_not_show(monkeypatch):
    """Catches a triangle that is lost or doubled where the work is cut."""
    rng = np.random.default_rng(2)
    vertices = rng.random((40, 3)) * rng.choice([1, 10, 40], (40, 1))
    faces = rng.integers(0, 40, (60, 3))
    expected = mesh_voxels(vertices, faces, spatial_shape=(30, 30, 30), **UNIT)
    monkeypatch.setattr(meshes, "_TRIANGLES", 7)
    monkeypatch.setattr(meshes, "_PAIRS", 50)
    monkeypatch.setattr(meshes, "_KEYS", 100)
    found = mesh_voxels(vertices, faces, spatial_shape=(30, 30, 30), **UNIT)
    np.testing.assert_array_equal(found, expected)


def test_what_is_no_surface():
    """Catches an error where there is nothing, and a vertex of no face that moves the surface."""
    for vertices, faces in ((CUBE, []), ([], []), (CUBE, np.zeros((0, 3), int))):
        assert mesh_voxels(vertices, faces, spatial_shape=(4, 4, 4)).shape == (0, 3)
    alone = mesh_voxels(CUBE, CUBE_FACES, spatial_shape=(6, 6, 6))
    beside = mesh_voxels(
        np.vstack([[[-90, 0, 0]], CUBE]), np.add(CUBE_FACES, 1), spatial_shape=(6, 6, 6)
    )
    np.testing.assert_array_equal(alone, beside)
    one = mesh_voxels(CUBE, [[3, 3, 3]], spatial_shape=(5, 5, 5))
    assert one.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"spatial_shape": (4, 4)}, ValueError, r"spatial_shape must have 3 axes.*\(4, 4\)"),
        ({"vertices": CUBE[:, :2]}, ValueError, r"vertices must have shape \[N, 3\].*\(8, 2\)"),
        ({"vertices": CUBE * np.nan}, ValueError, r"vertices has a position that is not finite"),
        ({"vertices": CUBE.astype(str)}, TypeError, "vertices must hold numbers"),
        ({"faces": [[0, 1, 2, 3]]}, ValueError, r"faces must have shape \[F, 3\].*\(1, 4\).*Cut"),
        ({"faces": [[0.0, 1.0, 2.0]]}, TypeError, "faces must be integers, got float64"),
        ({"faces": [[0, 1, 2], [0, 1, 8]]}, ValueError, r"0 to 7, but face 1 is \[0, 1, 8\]"),
        ({"faces": [[0, -1, 2]]}, ValueError, r"face 0 is \[0, -1, 2\] \(1 such faces\)"),
        ({"vertices": []}, ValueError, "faces must name vertices 0 to -1"),
        ({"origin": (0, 0, 0)}, ValueError, "origin needs a voxel_size"),
        ({"voxel_size": 0}, ValueError, "voxel_size must be above 0"),
        ({"voxel_size": (1, 2)}, ValueError, "voxel_size must be a finite number, or 3"),
        ({"voxel_size": 1e-13}, ValueError, "voxel_size 1e-13 puts a vertex 1e.13 voxels away"),
    ],
)
def test_errors_name_the_argument(changes, error, expected):
    """Catches an error of NumPy's that does not say which argument is wrong."""
    arguments = {"vertices": CUBE, "faces": CUBE_FACES, "spatial_shape": (4, 4, 4), **changes}
    with pytest.raises(error, match=expected):
        mesh_voxels(**arguments)
