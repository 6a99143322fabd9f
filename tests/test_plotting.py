"""plot: what it draws is read back off the Axes."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import ilajax
import samples
from ilajax import plotting

RANKS = [(7,), (5, 6), (3, 4, 5), (2, 3, 4, 5)]


@pytest.fixture(autouse=True)
def pyplot():
    """Figures that no window shows, closed behind the test."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    yield plt
    plt.close("all")


def draw(axes):
    axes.figure.canvas.draw()
    return axes


@pytest.mark.parametrize("grid", RANKS)
@pytest.mark.parametrize("shared", [False, True])
def test_every_rank_is_drawn(grid, shared):
    """Catches a rank that cannot be drawn, a frame that is not the whole grid, and axes without names."""
    x = samples.tensor(0, 2, 3, grid, capacity=9, shared=shared, dtype="bfloat16")
    for axes in (ilajax.plot(x), ilajax.plot(x, ilajax.k_select(x, 3), sample=1, channel=2)):
        draw(axes)
        assert axes.get_xlim() == (-0.5, grid[-min(len(grid), 3) if len(grid) != 2 else 1] - 0.5)
        assert axes.get_xlabel() == f"axis {[0, 1, 0, 1][len(grid) - 1]}"
        assert axes.get_title()


def test_image():
    """Catches an image that is transposed, padding that is drawn, and a value at another site."""
    x = samples.from_entries((2, 3), [[{0: 1.0, 5: 3.0}, {0: -2.0, 1: 0.0}]], 4)
    axes = draw(ilajax.plot(x))
    image = axes.images[0].get_array()
    grey = (image == [0.93, 0.93, 0.93, 1]).all(axis=-1)
    np.testing.assert_array_equal(grey, [[False, False, True], [True, True, False]])
    assert "3 stored sites" in axes.get_title()
    assert "strongest of 2 channels" in axes.get_title()
    # The stronger -2 is blue, and 0 lies in the middle of the scale.
    assert image[0, 0, 2] > 0.5 > image[0, 0, 0]
    assert image[0, 1].min() > 0.9
    assert image[1, 2, 0] > image[1, 2, 2]
    one = draw(ilajax.plot(x, channel=0)).images[0].get_array()
    assert (one[0, 1] == [0.93, 0.93, 0.93, 1]).all()
    assert one[1, 2].sum() < one[0, 0].sum()  # from light to dark


def test_stems():
    """Catches stems of padding, or at wrong sites."""
    x = samples.from_entries((6,), [[{1: 2.0, 4: -1.0}]], 5)
    stems = ilajax.plot(x).lines[1]
    np.testing.assert_array_equal(stems.get_xdata(), [1, 4])
    np.testing.assert_array_equal(stems.get_ydata(), [2, -1])


def test_cubes():
    """Catches faces inside a solid, a face that is missing, and cubes at other sites."""
    x = samples.from_entries((3, 4, 5), [[{0: 1.0, 1: 2.0, 59: 3.0}]], 5)
    axes = draw(ilajax.plot(x))
    # Two cubes that touch show 10 faces, the third 6.
    assert len(axes.collections[0].get_facecolor()) == 16


def test_many_sites_are_points(monkeypatch):
    """Catches a large map that takes minutes to draw, and a large grid that is made dense."""
    monkeypatch.setattr(plotting, "CUBES", 3)
    monkeypatch.setattr(plotting, "IMAGE_SITES", 10)
    x = samples.tensor(0, 1, 1, (3, 4, 5), capacity=20, density=0.3)
    axes = draw(ilajax.plot(x))
    keys = np.asarray(x.keys[0, 0][x.keys[0, 0] < 60])
    np.testing.assert_array_equal(
        np.stack(axes.collections[0]._offsets3d).data, np.unravel_index(keys, (3, 4, 5))
    )
    y = samples.from_entries((3, 4), [[{6: 1.0}]], 2)
    for axes in (draw(ilajax.plot(y)), draw(ilajax.plot(y, y))):
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[2, 1]])


@pytest.mark.parametrize("grid", RANKS)
def test_an_empty_map_is_an_empty_frame(grid):
    """Catches a colour scale or a collection over nothing."""
    x = samples.from_entries(grid, [[{}]], 3)
    for axes in (ilajax.plot(x), ilajax.plot(x, x)):
        draw(axes)
        assert axes.get_xlim()[0] == -0.5


def legend(axes):
    return [text.get_text() for text in draw(axes).get_legend().get_texts()]


@pytest.mark.parametrize("grid", RANKS)
def test_what_a_selection_cut(grid):
    """Catches kept and cut sites the wrong way round, or padding that is counted."""
    n = min(int(np.prod(grid)), 6)
    before = samples.from_entries(grid, [[{k: k + 1.0 for k in range(n)}]], 8)
    after = ilajax.k_select(before, 2)
    assert legend(ilajax.plot(before, after)) == ["kept 2", f"cut {n - 2}"]
    assert legend(ilajax.plot(after, before)) == ["kept 2", "cut 0", f"added {n - 2}"]


def test_colours_of_a_selection():
    """Catches a site that is drawn in the colour of another fate."""
    before = samples.from_entries((2, 2), [[{0: 1.0, 1: 2.0}]], 3)
    after = samples.from_entries((2, 2), [[{1: 2.0, 2: 1.0}]], 3)
    image = draw(ilajax.plot(before, after)).images[0].get_array()
    cut, kept, added = (
        matplotlib.colors.to_rgba(plotting.COLOURS[name]) for name in ("cut", "kept", "added")
    )
    np.testing.assert_allclose(image.reshape(4, 4)[:3], [cut, kept, added])


@pytest.mark.nans
@pytest.mark.parametrize("grid", RANKS)
def test_nan_and_inf_are_drawn(grid):
    """Catches a colour scale that a diverged value breaks, and NaN or infinity that looks like nothing."""
    axes = draw(ilajax.plot(samples.from_entries(grid, [[{0: np.nan, 1: np.inf, 2: 1.0}]], 4)))
    colour = matplotlib.colors.to_rgba(plotting.NAN)
    if len(grid) == 1:
        np.testing.assert_array_equal(axes.lines[-1].get_xdata(), [0, 1])
    elif len(grid) == 2:
        np.testing.assert_allclose(axes.images[0].get_array()[0, 0], colour)
    else:
        faces = axes.collections[0].get_facecolor()[:, :3]
        assert (np.abs(faces - 0.965 * np.array(colour[:3])).max(axis=1) < 0.01).any()  # the top


@pytest.mark.nans
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (-1, -1)])
def test_nan_looks_like_no_number(signs):
    """Catches NaN in a colour that some value has too."""
    values = np.linspace(*np.array(signs) * [1.0, 2.0], 64)
    x = samples.from_entries((8, 9), [[dict(enumerate([np.nan, *values.tolist()]))]], 70)
    image = ilajax.plot(x).images[0].get_array().reshape(-1, 4)
    assert np.abs(image[1:] - image[0]).max(axis=1).min() > 0.25


def test_axes_count_sites():
    """Catches ticks between the sites, and a legend upon the name of an axis where the grid is flat."""
    axes = draw(ilajax.plot(samples.from_entries((1, 2, 3), [[{0: 1.0}]], 3)))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        assert (axis.get_ticklocs() % 1 == 0).all()
    x = samples.from_entries((2, 90), [[{0: 1.0}]], 3)
    axes = draw(ilajax.plot(x, x))
    assert (axes.get_xticks() % 1 == 0).all()
    assert not axes.get_legend().get_window_extent().overlaps(axes.xaxis.label.get_window_extent())


def test_numpy_leaves_axes_and_title(pyplot):
    """Catches a figure of its own where Axes were given, and a title that is passed over."""
    x = jax.tree.map(np.asarray, samples.tensor(0))
    _, axes = pyplot.subplots()
    assert ilajax.plot(x, ax=axes, title="mine") is axes
    assert axes.get_title() == "mine"
    assert len(pyplot.get_fignums()) == 1


def test_the_strongest_of_the_projected_axis():
    """Catches a map of four axes that shows a weak value in front of a strong one, or counts a site twice."""
    x = samples.from_entries((2, 1, 2, 2), [[{0: 1.0, 4: -3.0, 6: 2.0}]], 4)
    stored = plotting._stored(x, 0, None)
    np.testing.assert_array_equal(stored.keys, [0, 2])
    np.testing.assert_array_equal(stored.values, [-3, 2])
    assert "2 drawn sites" in ilajax.plot(x).get_title()  # it stores 3


@pytest.fixture
def notebook(monkeypatch):
    """An IPython that says it has a kernel."""
    k3d = pytest.importorskip("k3d")
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    return k3d


@pytest.mark.filterwarnings("ignore")
def test_maps_turn_in_notebooks(notebook):
    """Catches a notebook without k3d's plot, or with other sites, colours or counts."""
    x = samples.from_entries((3, 4, 5), [[{0: 1.0, 7: 2.0, 59: 3.0}]], 5)
    figure = ilajax.plot(x)
    assert isinstance(figure, notebook.Plot)
    (points,) = figure.objects
    np.testing.assert_array_equal(points.positions, [[0, 0, 0], [0, 1, 2], [2, 3, 4]])
    np.testing.assert_array_equal(points.attribute, [1, 2, 3])
    figure = ilajax.plot(x, ilajax.k_select(x, 1))
    assert [o.name for o in figure.objects] == ["kept 1", "cut 2"]
    assert ilajax.plot(samples.tensor(0)).name == "rectilinear"


@pytest.mark.nans
@pytest.mark.filterwarnings("ignore")
def test_nan_shows_in_notebooks(notebook):
    """Catches NaN that k3d draws as a sound 0."""
    x = samples.from_entries((2, 2, 2), [[{0: np.nan, 3: 1.0}]], 3)
    value, nan = ilajax.plot(x).objects
    np.testing.assert_array_equal(value.positions, [[0, 1, 1]])
    np.testing.assert_array_equal(nan.positions, [[0, 0, 0]])
    assert (nan.name, nan.color) == ("NaN", 0xFF00FF)
    assert [o.name for o in ilajax.plot(x.map(lambda v: v * np.nan)).objects] == ["NaN"]


def test_outside_of_notebooks_matplotlib_draws(monkeypatch):
    """Catches a script in which k3d's widget would show nothing."""
    shell = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert ilajax.plot(samples.tensor(0, 1, 1, (2, 3, 4))).name == "3d"


def test_without_matplotlib(monkeypatch):
    """Catches an ImportError that does not say what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ilajax\[plot\]'"):
        ilajax.plot(samples.tensor(0))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "x must be an ilajax.SparseTensor"),
        ((samples.tensor(0), 3), {}, TypeError, "other must be an ilajax.SparseTensor"),
        ((samples.tensor(0), samples.tensor(0, 2, 2, (6, 5))), {}, ValueError, r"other.*\(6, 5\)"),
        ((samples.tensor(0),), {"sample": 2}, ValueError, r"sample must lie in \[0, 2\), got 2"),
        ((samples.tensor(0),), {"sample": None}, TypeError, "sample must be an integer"),
        (
            (samples.tensor(0),),
            {"channel": -1},
            ValueError,
            r"channel must lie in \[0, 2\), got -1",
        ),
        ((samples.tensor(0),), {"ax": 3}, TypeError, "ax must be matplotlib Axes, got int"),
    ],
)
def test_errors(arguments, options, error, message):
    """Catches a wrong argument that is taken, or an error that does not name it."""
    with pytest.raises(error, match=message):
        ilajax.plot(*arguments, **options)


def test_axes_of_another_projection(pyplot):
    """Catches a map of three axes that ends flat in the wrong Axes."""
    flat = pyplot.figure().add_subplot()
    with pytest.raises(ValueError, match=r'ax must have projection="3d"'):
        ilajax.plot(samples.tensor(0, 1, 1, (2, 3, 4)), ax=flat)
    with pytest.raises(ValueError, match="ax must have a flat projection"):
        ilajax.plot(samples.tensor(0), ax=pyplot.figure().add_subplot(projection="3d"))


def test_traced():
    """Catches an error deep in NumPy where the map is a tracer."""
    with pytest.raises(ValueError, match="x must be concrete, got tracers"):
        jax.jit(lambda x: ilajax.plot(x))(samples.tensor(0))
    x = samples.tensor(0)
    with pytest.raises(ValueError, match="other must be concrete"):
        jax.jit(lambda v: ilajax.plot(x, x.with_values(v)))(jnp.ones_like(x.values))
