"""Rooms and what scanners see of them, against the solids that they are made of."""

import numpy as np
import pytest

from experiments.data import scenes
from experiments.data.scenes import CLASSES, EXTENT, SceneSource, make_scene

RAYS = 1500


@pytest.fixture(scope="module")
def some():
    return [make_scene(3, number, RAYS) for number in range(12)]


def inside(part, points, *, grown=0.0):
    """Whether points lie in a solid that is larger by so many metres on each side."""
    x, y, z = (points - part.centre).T
    cos, sin = np.cos(part.angle), np.sin(part.angle)
    a, b, c = part.half + grown
    along, across = x * cos + y * sin, y * cos - x * sin
    if part.shape == "box":
        return (abs(along) <= a) & (abs(across) <= b) & (abs(z) <= c)
    if part.shape == "cylinder":
        return (np.hypot(along / a, across / b) <= 1) & (abs(z) <= c)
    return (along / a) ** 2 + (across / b) ** 2 + (z / c) ** 2 <= 1


def test_a_scene_depends_on_seed_and_number_alone(some):
    again = make_scene(3, 5, RAYS)
    for name in ("points", "normals", "labels", "scanners", "low"):
        np.testing.assert_array_equal(getattr(again, name), getattr(some[5], name))
    for other in (make_scene(3, 6, RAYS), make_scene(4, 5, RAYS)):
        assert (other.high - other.low != again.high - again.low).all()
    # More rays look into the same room.
    finer = make_scene(3, 5, 2 * RAYS)
    assert len(finer.points) > 1.5 * len(again.points)
    np.testing.assert_array_equal(finer.scanners, again.scanners)
    for one, other in zip(finer.parts, again.parts, strict=True):
        np.testing.assert_array_equal(one.centre, other.centre)


def test_points_lie_in_the_room_and_the_room_in_the_grid(some):
    for scene in some:
        noise = 6 * scenes.RANGE_NOISE
        assert (scene.points >= scene.low - noise).all()
        assert (scene.points <= scene.high + noise).all()
        assert (scene.low >= 0.1).all()
        assert (scene.high <= np.array(EXTENT) - 0.1 + 1e-9).all()
        assert len(scene.points) == len(scene.normals) == len(scene.labels) <= RAYS
        assert len(scene.points) > (1 - scenes.DROPPED) * RAYS * 0.9
        np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=1), 1, rtol=1e-5)


def test_every_class_occurs():
    found = np.concatenate([make_scene(0, n, 4000).labels for n in range(8)])
    assert (np.bincount(found, minlength=len(CLASSES)) > 100).all()


def test_labels_are_those_of_the_nearest_solid(some):
    """A point lies on a solid of its label, or on the face of the room that its label says."""
    near = 6 * scenes.RANGE_NOISE
    for scene in some:
        on = np.zeros((len(CLASSES), len(scene.points)), bool)
        for part in scene.parts:
            on[part.label] |= inside(part, scene.points, grown=near)
        x, y, z = 0, 1, 2
        for axis in (x, y):
            on[CLASSES.index("wall")] |= abs(scene.points[:, axis] - scene.low[axis]) < near
            on[CLASSES.index("wall")] |= abs(scene.points[:, axis] - scene.high[axis]) < near
        on[CLASSES.index("floor")] |= abs(scene.points[:, z] - scene.low[z]) < near
        on[CLASSES.index("ceiling")] |= abs(scene.points[:, z] - scene.high[z]) < near
        assert on[scene.labels, np.arange(len(scene.labels))].all()


def test_nothing_stands_between_a_scanner_and_what_it_sees(some):
    """Catches points behind a cabinet: on the way from the scanner no solid is met, 8 cm before the point."""
    for scene in some:
        start = scene.scanners[scene.scanner]
        way = scene.points - start
        length = np.linalg.norm(way, axis=1, keepdims=True)
        for share in np.linspace(0, 1, 60)[:, None]:
            point = start + way * np.minimum(share, 1 - 0.08 / length)
            for part in scene.parts:
                # 1 mm less, as a ray may graze an edge.
                assert not inside(part, point, grown=-0.001).any()


def test_what_is_hidden_is_missing():
    """Parts of the floor that furniture hides from every scanner have no points, though the rest has."""
    scene = make_scene(3, 5, 20000)
    floor = scene.points[scene.labels == CLASSES.index("floor")]
    x, y = (np.arange(scene.low[axis] + 0.1, scene.high[axis] - 0.1, 0.1) for axis in (0, 1))
    places = np.stack([*np.meshgrid(x, y), np.full((len(y), len(x)), scene.low[2])], axis=-1)
    hidden = np.ones(places.shape[:2], bool)
    for scanner in scene.scanners:
        behind = np.zeros_like(hidden)
        for share in np.linspace(0, 1, 200):
            point = scanner + share * (places.reshape(-1, 3) - scanner)
            for part in scene.parts:
                behind |= inside(part, point).reshape(hidden.shape)
        hidden &= behind
    around = hidden.copy()  # where the places beside it are hidden too
    for axis in (0, 1):
        around &= np.roll(hidden, 1, axis) & np.roll(hidden, -1, axis)

    def nearest(some):
        apart = np.linalg.norm(some[:, None, :2] - floor[None, :, :2], axis=2)
        return apart.min(axis=1)

    assert around.sum() > 20
    assert nearest(places[around]).min() > 0.04
    assert np.quantile(nearest(places[~hidden]), 0.9) < 0.1


def test_normals_stand_on_surfaces_and_look_at_the_scanner(some):
    for scene in some:
        floor = scene.labels == CLASSES.index("floor")
        assert scene.normals[floor, 2].mean() > 0.9
        assert scene.normals[scene.labels == CLASSES.index("ceiling"), 2].mean() < -0.9
        towards = scene.scanners[scene.scanner] - scene.points
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        assert ((scene.normals * towards).sum(axis=1) > 0).mean() > 0.9


def test_far_surfaces_have_fewer_points(some):
    """Of two equal rings of the floor around the only scanner's foot the far one has fewer points."""
    near = far = 0
    for scene in some:
        for number, (x, y, _) in enumerate(scene.scanners):
            seen = scene.points[
                (scene.labels == CLASSES.index("floor")) & (scene.scanner == number)
            ]
            distance = np.hypot(seen[:, 0] - x, seen[:, 1] - y)
            near += (distance < 1.0).sum()
            far += ((distance > 2.0) & (distance < np.sqrt(5.0))).sum()  # the same area
    assert near > 1.5 * far > 0


def test_furniture_does_not_overlap(some):
    """Corners of one piece's boxes lie in no solid of another label."""
    signs = np.array(np.meshgrid(*[(-0.98, 0.98)] * 3)).reshape(3, -1).T
    for scene in some:
        for one in scene.parts:
            cos, sin = np.cos(one.angle), np.sin(one.angle)
            turn = np.array([(cos, -sin, 0), (sin, cos, 0), (0, 0, 1)])
            corners = one.centre + (signs * one.half) @ turn.T
            for other in scene.parts:
                if other.label != one.label:
                    assert not inside(other, corners).any()


def test_a_batch_holds_the_scenes_and_marks_padding():
    source = SceneSource(6, 400, 32, 512, seed=1)
    clouds, labels, overflow = source.batch(np.array([4, 1]), epoch=2)
    assert clouds.voxels.shape == (2, 32, 32, 16, scenes.FEATURES)
    assert overflow.tolist() == [0, 0]
    for row, index in enumerate((4, 1)):
        scene = source.scene(index, epoch=2)
        count = len(scene.points)
        assert count < 400
        np.testing.assert_array_equal(labels[row, :count], scene.labels)
        assert (labels[row, count:] == -1).all()
        np.testing.assert_array_equal(clouds.present[row], np.arange(400) < count)
        np.testing.assert_allclose(clouds.points[row, :count] * 0.2, scene.points, rtol=1e-6)
        # Every point's voxel is stored, with the mean of its features.
        place = np.floor(scene.points / 0.2).astype(int)
        keys = np.ravel_multi_index(place.T, (32, 32, 16))
        stored = clouds.voxels.keys[row, 0]
        np.testing.assert_array_equal(np.unique(keys), stored[stored < 32 * 32 * 16])
        first = scene.features()[keys == stored[0]].mean(axis=0)
        np.testing.assert_allclose(clouds.voxels.values[row, :, 0], first, rtol=1e-5, atol=1e-6)


def test_each_epoch_has_new_scenes_unless_they_repeat():
    new = SceneSource(3, 100, 32, 128, seed=1)
    np.testing.assert_array_equal(new.scene(1, epoch=2).points, make_scene(1, 4, 100).points)
    fixed = SceneSource(3, 100, 32, 128, seed=1, repeats=True)
    np.testing.assert_array_equal(fixed.scene(1, epoch=2).points, make_scene(1, 1, 100).points)


def test_an_odd_grid_is_named():
    with pytest.raises(ValueError, match="even number, got 33"):
        SceneSource(3, 100, 33, 128, seed=1)


@pytest.mark.parametrize("shape", sorted(scenes.SHAPES))
def test_a_ray_stops_where_a_march_along_it_first_meets_the_solid(shape):
    """From so near to a long solid that its middle lies behind the ray that meets its end."""
    part = scenes.Part(shape, 3, np.array([0.5, 0.2, 0.1]), np.array([2.0, 0.4, 0.7]), 0.6)
    rng = np.random.default_rng(0)
    ray = rng.normal(size=(300, 3))
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    cos, sin = np.cos(0.6), np.sin(0.6)
    start = part.centre + np.tile((1.2 * cos - 0.55 * sin, 1.2 * sin + 0.55 * cos, 0), (300, 1))
    far, normals, labels = np.full(300, 9.0), np.zeros((300, 3)), np.full(300, -1)
    scenes._meet(part, start, ray, far, normals, labels)

    steps = np.arange(0, 5, 0.002)
    met = inside(part, (start[:, None] + steps[:, None] * ray[:, None]).reshape(-1, 3))
    met = met.reshape(300, -1)
    hit = met.any(axis=1)
    assert hit.sum() > 50
    sure = hit == (labels == 3)  # a march may pass over an edge
    assert sure.mean() > 0.98
    both = hit & sure
    np.testing.assert_allclose(far[both], steps[met.argmax(axis=1)][both], atol=0.003)
    assert (far[~hit & sure] == 9).all()
    # A little along the normal it is outside, against it inside.
    point = start[both] + far[both, None] * ray[both]
    assert not inside(part, point + 1e-4 * normals[both]).any()
    assert inside(part, point - 1e-4 * normals[both]).mean() > 0.97
    # The solid lies behind the plane that touches it there.
    beside = np.cross(normals[both], ray[both])
    for way in (-0.1, 0.1):
        assert not inside(part, point + way * beside + 1e-4 * normals[both]).any()
