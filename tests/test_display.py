"""How a SparseTensor shows itself, as text and in notebooks; PNG files are read back by another decoder."""

import base64
import io
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import ilajax
import samples
from ilajax import display


def with_counts(counts, capacity=4, grid=(3, 4)):
    """A tensor whose segments [B][C] store so many sites, from key 0 on."""
    segments = [[dict.fromkeys(range(n), 1.0) for n in row] for row in counts]
    return samples.from_entries(grid, segments, capacity)


# --- Text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "fill"),
    [
        ([[4, 4], [4, 4]], "100% filled"),
        ([[0, 0]], "0% filled"),
        ([[1, 0], [4, 2]], "44% filled, full in 1 of 4 segments"),
        ([[3, 3]], "75% filled"),
    ],
)
def test_fill(counts, fill):
    """Catches a share of the wrong total, and a segment without a free slot that nobody sees."""
    x = with_counts(counts)
    shape = [len(counts), 3, 4, len(counts[0])]
    want = f"SparseTensor(float32{shape}, capacity=4 of 12 sites, {fill})"
    assert repr(x) == want
    assert repr(jax.tree.map(np.asarray, x)) == want


def test_nearly_full_is_not_full():
    """Catches 99.9 % that reads as 100 %, and one site that reads as none."""
    assert "99% filled, full" in repr(with_counts([[500, 499]], 500, (500,)))
    assert "1% filled" in repr(with_counts([[1, 0]], 500, (500,)))


def test_shared_support():
    """Catches a shared support that does not show, or whose one key row is counted for each channel."""
    x = samples.tensor(0, 2, 8, (5, 6), capacity=40, density=1.0, shared=True)
    assert repr(x) == (
        "SparseTensor(float32[2, 5, 6, 8], capacity=40 of 30 sites, shared support, 75% filled)"
    )


def test_traced_text_has_no_fill():
    """Catches a tracer that is read."""
    texts = []
    jax.jit(lambda x: texts.append((repr(x), x._repr_html_())))(with_counts([[1, 2]]))
    text = "SparseTensor(float32[1, 3, 4, 2], capacity=4 of 12 sites)"
    assert texts == [(text, None)]


def test_a_running_computation_is_not_waited_for(monkeypatch):
    """Catches a print in a training loop that waits for the step."""
    x = with_counts([[1, 2]])
    monkeypatch.setattr(display, "PATIENCE", 0.01)
    monkeypatch.setattr(type(x.keys), "is_ready", lambda self: False)
    assert "filled" not in repr(x)
    assert x._repr_html_() is None


def test_large_arrays_are_not_read(monkeypatch):
    """Catches a print that copies gigabytes off a device."""
    x = samples.tensor(0, 2, 8, (5, 6), shared=True)
    monkeypatch.setattr(display, "CHEAP", x.keys.nbytes)
    assert "filled" in repr(x)
    assert "filled" in x._repr_html_()
    assert "<img" not in x._repr_html_()
    monkeypatch.setattr(display, "CHEAP", x.keys.nbytes - 1)
    assert "filled" not in repr(x)
    assert x._repr_html_() is None


def test_deleted_arrays():
    """Catches a print that fails after a buffer was donated, which is when one looks."""
    x = with_counts([[1, 2]])
    x.keys.delete()
    assert "capacity=4 of 12 sites)" in repr(x)
    assert x._repr_html_() is None


def test_other_leaves():
    """Catches a repr that fails on what transformations put into a tensor."""
    x = with_counts([[1, 2]])
    empty = jax.tree.unflatten(jax.tree.structure(x), [None, "values"])
    assert repr(empty) == "SparseTensor(keys=None, values='values')"
    stacked = jax.tree.map(lambda a: jnp.stack([a, a, a]), x)
    assert repr(stacked) == "SparseTensor(keys=int32[3, 1, 2, 4], values=float32[3, 1, 2, 4])"
    shapes = jax.eval_shape(lambda x: x, x)
    assert repr(shapes) == "SparseTensor(float32[1, 3, 4, 2], capacity=4 of 12 sites)"
    gradient = jax.grad(lambda x: x.values.sum(), allow_int=True)(x)
    assert repr(gradient) == repr(shapes)
    for odd in (empty, stacked, shapes, gradient):
        assert odd._repr_html_() is None


# --- Notebooks -------------------------------------------------------------------------------------


def pictures(x):
    """The pictures of a tensor's HTML as RGBA in 0..1."""
    files = re.findall(r"base64,([^']*)'", x._repr_html_())
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(f, validate=True))) for f in files]


def test_table():
    """Catches a number that is missing or wrong."""
    html = with_counts([[1, 0], [4, 2]])._repr_html_()
    for part in ("[2, 3, 4, 2]", "float32", "4 of 12 sites", "44% filled, full in 1 of 4", "0.146"):
        assert part in html
    assert html.count("<img") == 2


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_picture_shows_the_stored_sites(grid, shared):
    """Catches a picture that is transposed, shifted or of another sample, and padding that is drawn."""
    x = samples.tensor(3, 2, 3, grid, capacity=6, density=0.2, shared=shared, zeros=True)
    keys = np.broadcast_to(x.keys, x.values.shape)
    for b, picture in enumerate(pictures(x)):
        seen = np.zeros((x.sites + 1,))
        np.maximum.at(seen, keys[b].ravel(), 1)
        seen = seen[:-1].reshape(-1, *(1, *grid)[-2:]).max(axis=0)
        np.testing.assert_array_equal(picture[..., 3], seen)


def test_picture_shows_the_magnitude():
    """Catches shades that do not follow the magnitude, a sign that hides a site, and NaN that looks sound."""
    entries = {0: 0.0, 1: 1.0, 2: -2.0, 3: 4.0, 5: np.nan}
    (picture,) = pictures(samples.from_entries((6,), [[entries]], 8))
    blue = picture[0, :4, :3].sum(axis=1)
    assert (np.diff(blue) < 0).all()
    np.testing.assert_allclose(picture[0, 5], np.array([215, 25, 28, 255]) / 255, atol=1e-3)
    assert picture[0, 4, 3] == 0


@pytest.mark.parametrize("value", [0.0, 7.0, np.inf, 1e-45])
def test_picture_of_one_value(value):
    """Catches a division by 0, and a site that vanishes because of its value."""
    (picture,) = pictures(samples.from_entries((2, 2), [[{1: value}]], 2))
    np.testing.assert_array_equal(picture[..., 3], [[0, 1], [0, 0]])


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_large_grids_make_small_pictures(dtype):
    """Catches a dense grid, and a page that swells with the resolution."""
    rng = np.random.default_rng(0)
    keys = np.sort(rng.choice(256**3, (8, 1, 30000)).astype(np.int32), axis=2)
    values = jnp.asarray(rng.normal(size=(8, 2, 30000)), dtype)
    x = ilajax.SparseTensor(keys, values, (256, 256, 256))
    assert len(x._repr_html_()) < 100_000
    assert [p.shape for p in pictures(x)] == [(128, 128, 4)] * 4


def test_keys_outside_the_grid():
    """Catches a write outside the picture where the tensor is not valid."""
    keys = np.array([[[-5, 3, 99]]], np.int32)
    (picture,) = pictures(ilajax.SparseTensor(keys, np.ones((1, 1, 3), np.float32), (2, 2)))
    np.testing.assert_array_equal(picture[..., 3], [[0, 0], [0, 1]])


def test_no_samples():
    """Catches a mean over nothing."""
    x = ilajax.SparseTensor(np.zeros((0, 1, 3), np.int32), np.zeros((0, 1, 3), np.float32), (2, 2))
    assert "capacity=3 of 4 sites, 0% filled" in repr(x)
    assert "<img" not in x._repr_html_()
