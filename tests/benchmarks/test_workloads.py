"""The benchmarks' inputs: valid, repeatable, of the density that they say, and nothing cut."""

import itertools

import jax
import numpy as np
import pytest
from scipy import ndimage

import ilajax
from benchmarks import workloads

MAKERS = {
    "random": lambda seed: workloads.random_sites(16, 3, batch=2, seed=seed),
    "disjoint": lambda seed: workloads.random_sites(16, 3, batch=2, disjoint=True, seed=seed),
    "full": lambda seed: workloads.random_sites(4, 2, density=1.0, seed=seed),
    "shell": lambda seed: workloads.shell(16, 3, batch=2, seed=seed),
    "shared shell": lambda seed: workloads.shell(16, 3, batch=2, subset=None, seed=seed),
    "near shell": lambda seed: workloads.near_shell(16, 3, batch=2, density=0.3, seed=seed),
    "solids": lambda seed: workloads.solids(16, batch=2, seed=seed)[0],
}


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_valid_repeatable_and_full(name):
    x = MAKERS[name](0).validate()
    assert same(x, MAKERS[name](0))
    assert not same(x, MAKERS[name](1))
    assert x.counts.max() == x.capacity
    stored = x.unshare().keys < x.sites
    assert (x.values[stored] > 0).all()


def test_random_sites_have_the_density_asked_for():
    x = workloads.random_sites(16, 4, batch=6, density=0.125, capacity=600)
    assert x.capacity == 600
    assert (x.counts == 512).all()
    first, *others = np.asarray(x.keys)
    assert not any(np.array_equal(first, other) for other in others[:3])
    assert np.array_equal(first, others[3])  # four distinct samples
    assert not np.array_equal(first[0], first[1])


def test_disjoint_channels_share_no_site():
    x = workloads.random_sites(8, 4, batch=2, disjoint=True)
    for sample in np.asarray(x.keys):
        stored = sample[sample < x.sites]
        assert len(np.unique(stored)) == len(stored) == 4 * 64


def test_a_sphere_is_what_its_surface_meets():
    """Against every voxel's nearest and farthest point."""
    resolution, radius, centre = 14, 5.3, np.array([7.2, 6.5, 6.9])
    inside, outside = (np.zeros((resolution,) * 3) for _ in range(2))
    for voxel in itertools.product(range(resolution), repeat=3):
        low, high = np.array(voxel) - centre, np.array(voxel) + 1 - centre
        inside[voxel] = np.hypot.reduce(np.maximum(0, np.maximum(low, -high)))
        outside[voxel] = np.hypot.reduce(np.maximum(abs(low), abs(high)))
    expected = np.flatnonzero((inside < radius) & (outside > radius))
    assert np.array_equal(workloads.sphere(resolution, radius, centre), expected)


def test_channels_of_a_shell_store_subsets_of_it():
    shared = workloads.shell(24, 4, batch=2, subset=None)
    assert shared.shared
    x = workloads.shell(24, 8, subset=0.6)
    assert not x.shared
    union = np.unique(np.asarray(x.keys)[np.asarray(x.keys) < x.sites])
    share = np.asarray(x.counts) / len(union)
    assert (abs(share - 0.6) < 0.06).all()


def test_sites_near_a_shell_are_as_many_as_asked_for():
    """All in a layer around a sphere, of which each channel has a part of its own."""
    x = workloads.near_shell(16, 4, density=0.1, subset=0.5)
    assert (x.counts == 409).all()
    keys = np.asarray(x.keys)[0]
    union = np.unique(keys)
    assert 600 < len(union) <= 818
    assert not np.array_equal(keys[0], keys[1])
    places = np.stack(np.unravel_index(union, (16,) * 3), axis=1)
    centre = (places.min(axis=0) + places.max(axis=0)) / 2
    assert np.ptp(np.linalg.norm(places - centre, axis=1)) < 4


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_a_fitting_shell_fits(resolution):
    slots = ilajax.capacity(1 / resolution, (resolution,) * 3)
    radius = workloads.fitting_radius(resolution, slots)
    for seed in range(4):
        x = workloads.shell(resolution, subset=None, radius=radius, capacity=slots, seed=seed)
        assert 0.75 < x.counts[0, 0] / slots <= 1


def test_nothing_is_cut_silently():
    with pytest.raises(ValueError, match="capacity must be at least"):
        workloads.shell(16, capacity=10)


def test_solids_are_closed_surfaces():
    """A surface keeps inside and outside apart: what is reached from a corner leaves a hollow."""
    x, labels = workloads.solids(32, batch=10)
    assert set(labels) == set(range(len(workloads.SOLIDS)))
    for voxels in np.asarray(ilajax.to_dense(x))[..., 0]:
        assert set(np.unique(voxels)) == {0, 1}
        _, regions = ndimage.label(voxels == 0)
        assert regions > 1


def test_a_seed_gives_the_same_solids_at_every_resolution():
    (small, labels), (large, others) = (workloads.solids(r, batch=3) for r in (16, 32))
    assert np.array_equal(labels, others)
    dense = np.asarray(ilajax.to_dense(large)).reshape(3, 16, 2, 16, 2, 16, 2)
    coarse = dense.max(axis=(2, 4, 6))
    fine = np.asarray(ilajax.to_dense(small))[..., 0]
    assert (coarse != fine).mean() < 0.02


def test_parts(tmp_path):
    corners = np.array([[0, 0, 0], [65535, 65535, 65535], [65535, 0, 32768]], np.uint16)
    points = np.stack([corners, np.zeros_like(corners)])
    np.savez(
        tmp_path / "train.npz",
        points=points,
    )
    x = workloads.parts(8, tmp_path, batch=2)
    x.validate()
    stored = [set(keys[keys < 512].tolist()) for keys in np.asarray(x.keys[:, 0])]
    assert sorted(stored, key=len) == [{0}, {0, 511, 7 * 64 + 4}]
    assert x.values.max() == 1


def test_kernels():
    assert workloads.kernel(2, 4).shape == (3, 3, 3, 2, 4)
    assert workloads.kernel(2, 4).density == 1
    assert 0.05 < workloads.kernel(2, 4, density=0.1).density < 0.15


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_kernel_that_cuts_and_one_that_does_not(density):
    x = workloads.random_sites(16)
    for cut in (False, True):
        kernel = workloads.kernel(1, 4, density=density, cut=cut)
        responses = ilajax.conv(x, kernel, capacity=x.capacity).responses
        assert (responses.max() > x.capacity) == cut
