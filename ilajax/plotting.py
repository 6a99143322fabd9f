"""Pictures of feature maps, by matplotlib, or by k3d in notebooks."""

import importlib.util
import operator
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from ilajax.geometry import sites
from ilajax.sparse_tensor import SparseTensor, check_sparse

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"kept": "#0072B2", "cut": "#D55E00", "added": "#009E73"}
VEIL = 0.35  # opacity of what was cut, which surrounds what was kept
NAN = "#FF00FF"  # on neither of the colour scales
IMAGE_SITES = 2**22  # of a two-dimensional grid that is drawn as an image, not by its stored sites
CUBES = 10_000  # sites of a three-dimensional map that are drawn as cubes; more are drawn as points
SUN = np.array([0.3, 0.2, 0.9])  # how bright a cube's faces are along each axis


def plot(
    x: SparseTensor,
    other: SparseTensor | None = None,
    *,
    sample: int = 0,
    channel: int | None = None,
    ax: Any = None,
    title: str | None = None,
) -> Any:
    """Draws the stored sites of a feature map, coloured by value; or what a selection cut.

    A map of one axis is drawn as stems, one of two as an image (axis 0 runs down), one of three as voxels. Of
    four or more axes the last three are drawn, with the strongest value along the others. NaN is magenta.

    Of two maps, as in `ilajax.plot(before, after)`, sites of both are "kept", those of the first only "cut",
    and those of the second only "added"; values do not matter.

    Args:
      x: the map; concrete, may have NumPy leaves.
      other: a second map on the same grid, to compare x with.
      sample: index in the batch.
      channel: index of the channel; None draws at each site the value of the largest magnitude over channels.
      ax: matplotlib's Axes to draw into, with `projection="3d"` for maps of three or more axes. None makes a
        new figure; in a notebook with k3d installed, k3d then draws maps of three or more axes, which can be
        turned.
      title: title of the picture; by default it says what is drawn.

    Returns:
      The Axes, or k3d's Plot.

    Raises:
      ImportError: if matplotlib is missing.
      TypeError, ValueError: if an argument has a wrong type or value, or a map is traced.

    Example:
      >>> x = ilajax.from_dense(jnp.eye(9)[None, ..., None], capacity=9)
      >>> axes = ilajax.plot(x, ilajax.k_select(x, 5))
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['kept 5', 'cut 4']
    """
    sample, channel = _check(x, other, sample, channel)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("ilajax.plot draws with matplotlib: pip install 'ilajax[plot]'.")
    stored = _stored(x, sample, channel)
    groups = None if other is None else _compare(stored, _stored(other, sample, channel))
    shape = x.spatial_shape[-3:]
    if title is None:
        title = _title(x, sample, channel, len(stored.keys) if groups is None else None)
    if ax is None and len(shape) == 3 and _turns():
        return _turning(stored, groups, shape, title)
    ax = _axes(ax, len(shape))
    if groups is None:
        _draw_values(ax, stored, shape)
    else:
        _draw_groups(ax, groups, shape)
    _frame(ax, shape, x.spatial_shape)
    ax.set_title(title, fontsize=11)
    return ax


# --- What is drawn ---------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """The stored sites of a map over its last three axes at most."""

    keys: np.ndarray  # int64[n], ascending
    values: np.ndarray  # float32[n]


def _stored(x: SparseTensor, sample: int, channel: int | None) -> _Stored:
    keys, values = np.asarray(x.keys[sample], np.int64), np.asarray(x.values[sample], np.float32)
    keys = np.broadcast_to(keys, values.shape)
    if channel is not None:
        keys, values = keys[channel], values[channel]
    inside = (keys >= 0) & (keys < x.sites)
    keys, values = keys[inside] % sites(x.spatial_shape[-3:]), values[inside]
    # The strongest of each site comes first; NaN is the strongest.
    strength = np.nan_to_num(np.abs(values), nan=np.inf)
    order = np.lexsort((-strength, keys))
    unique, first = np.unique(keys[order], return_index=True)
    return _Stored(unique, values[order][first])


def _compare(before: _Stored, after: _Stored) -> dict[str, np.ndarray]:
    """Keys by what became of them; "added" only where there are any."""
    groups = {
        "kept": np.intersect1d(before.keys, after.keys),
        "cut": np.setdiff1d(before.keys, after.keys),
        "added": np.setdiff1d(after.keys, before.keys),
    }
    return {name: keys for name, keys in groups.items() if keys.size or name != "added"}


def _positions(keys: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int[n, axes]."""
    return np.stack(np.unravel_index(keys, shape), axis=1)


def _title(x: SparseTensor, sample: int, channel: int | None, count: int | None) -> str:
    channels = f", strongest of {x.channels} channels" if x.channels > 1 else ""
    if channel is not None:
        channels = f", channel {channel}"
    # Of more than three axes, several stored sites may be drawn as one.
    what = "stored sites" if len(x.spatial_shape) <= 3 else "drawn sites"
    counted = "" if count is None else f"{count:,} {what}, "
    return f"sample {sample}{channels}\n{counted}grid {'×'.join(map(str, x.spatial_shape))}"


# --- matplotlib ------------------------------------------------------------------------------------


def _axes(ax: Any, rank: int) -> Any:
    if ax is not None:
        if not hasattr(ax, "set_title"):
            raise TypeError(f"ax must be matplotlib Axes, got {type(ax).__name__}.")
        if (rank == 3) != (ax.name == "3d"):
            wanted = 'projection="3d"' if rank == 3 else "a flat projection"
            raise ValueError(
                f"ax must have {wanted} for a map of {rank} axes, got projection {ax.name!r}. "
                f"Leave ax out for a figure that fits."
            )
        return ax
    import matplotlib.pyplot as plt

    size = {1: (7, 3), 2: (5.5, 5), 3: (6.5, 5.5)}[rank]
    figure = plt.figure(figsize=size, layout="constrained")
    ax = figure.add_subplot(projection="3d" if rank == 3 else None)
    # Ticks at whole sites, of which an axis may have only one.
    ax.locator_params(axis="x" if rank == 1 else "both", integer=True, min_n_ticks=1)
    return ax


def _colours(values: np.ndarray) -> dict[str, Any]:
    """Light to dark for values of one sign, blue over white to red where both signs occur."""
    from matplotlib import colormaps, colors

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0 < high:
        limit = max(-low, high)
        name, low, high = "RdBu_r", -limit, limit
    elif high <= 0:
        name, high = "viridis", 0.0
    else:
        # From 0, so that the colour says how strong a site is.
        name, low = "viridis_r", 0.0
    high = high if high > low else low + 1.0
    colormap = colormaps[name].with_extremes(bad=NAN)
    return {"cmap": colormap, "norm": colors.Normalize(low, high)}


def _draw_values(ax: Any, stored: _Stored, shape: tuple[int, ...]) -> None:
    import matplotlib.cm

    if len(shape) == 1:
        ax.axhline(0, color="0.7", linewidth=0.8, zorder=1)
        ax.vlines(stored.keys, 0, stored.values, color=COLOURS["kept"], linewidth=1.2, zorder=2)
        ax.plot(stored.keys, stored.values, "o", color=COLOURS["kept"], markersize=4, zorder=3)
        odd = stored.keys[~np.isfinite(stored.values)]  # no stem is that long
        ax.plot(odd, np.zeros(len(odd)), "x", color=NAN, markersize=6, zorder=4)
        ax.set_ylabel("value")
        return
    colours = _colours(stored.values)
    _draw_sites(ax, [(stored.keys, colours["cmap"](colours["norm"](stored.values)))], shape)
    pad = 0.12 if len(shape) == 3 else 0.03  # beyond the label of the third axis
    bar = ax.figure.colorbar(matplotlib.cm.ScalarMappable(**colours), ax=ax, shrink=0.8, pad=pad)
    bar.set_label("value")


def _draw_groups(ax: Any, groups: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    if len(shape) == 1:
        for row, (name, keys) in enumerate(groups.items()):
            ax.vlines(keys, -row - 0.4, -row + 0.4, color=COLOURS[name], linewidth=2)
        ax.set_yticks([-row for row in range(len(groups))], list(groups))
        ax.set_ylim(-len(groups) + 0.4, 0.6)
    else:
        layers = []
        for name, keys in groups.items():
            opacity = VEIL if len(shape) == 3 and name != "kept" else 1.0
            layers.append((keys, np.tile(to_rgba(COLOURS[name], opacity), (len(keys), 1))))
        _draw_sites(ax, layers, shape)
    handles = [
        Line2D([], [], color=COLOURS[name], marker="s", ls="", ms=8, label=f"{name} {len(keys):,}")
        for name, keys in groups.items()
    ]
    # Below the name of the axis, whatever the height of the Axes: the distance is in font sizes.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.5}
    ax.legend(handles=handles, ncols=len(handles), frameon=False, **below)


def _draw_sites(
    ax: Any, layers: list[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]
) -> None:
    """Draws keys with their colours [n, 4] as an image, as cubes, or, if there are too many, as squares."""
    if len(shape) == 2 and sites(shape) <= IMAGE_SITES:
        image = np.full((sites(shape), 4), [0.93, 0.93, 0.93, 1])
        for keys, colours in layers:
            image[keys] = colours
        ax.imshow(image.reshape(*shape, 4), interpolation="nearest")
        return
    cubes = len(shape) == 3 and sum(len(keys) for keys, _ in layers) <= CUBES
    # Squares of about a site's size: the longest axis is half of the figure's height; 72 points an inch.
    edge = max(36 * ax.figure.get_size_inches()[1] / max(shape), 1.0)
    for keys, colours in layers:
        position = _positions(keys, shape)
        if cubes and keys.size:
            _draw_cubes(ax, position, keys, shape, colours)
        elif keys.size:
            across = position if len(shape) == 3 else position[:, ::-1]
            ax.scatter(*across.T, c=colours, marker="s", s=edge**2, linewidths=0)


def _draw_cubes(
    ax: Any, position: np.ndarray, keys: np.ndarray, shape: tuple[int, ...], colours: np.ndarray
) -> None:
    """The faces between a stored site and one that is not."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    square = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)])
    faces, shades = [], []
    for axis in range(3):
        for side in (-1, 1):
            neighbour = position.copy()
            neighbour[:, axis] += side
            inside = (neighbour[:, axis] >= 0) & (neighbour[:, axis] < shape[axis])
            stored = np.isin(np.ravel_multi_index(neighbour.T, shape, mode="clip"), keys)
            seen = ~(inside & stored)
            corners = np.insert(square, axis, 0.5 * side, axis=1)
            faces.append(position[seen, None] + corners)
            bright = 0.65 + 0.35 * SUN[axis]
            shades.append(colours[seen] * [bright, bright, bright, 1])
    colours = np.concatenate(shades)
    style = {"facecolors": colours, "edgecolors": colours * [0.75, 0.75, 0.75, 1]}
    ax.add_collection3d(Poly3DCollection(np.concatenate(faces), linewidths=0.2, **style))


def _frame(ax: Any, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """Shows the whole grid, stored or not, with equal steps along the axes."""
    limits = [(-0.5, size - 0.5) for size in shape]
    names = [f"axis {len(grid) - len(shape) + a}" for a in range(len(shape))]
    if len(shape) == 2:
        ax.set(xlim=limits[1], ylim=limits[0][::-1], xlabel=names[1], ylabel=names[0])
        ax.set_aspect("equal")
        return
    ax.set(xlim=limits[0], xlabel=names[0])
    if len(shape) == 3:
        ax.set(ylim=limits[1], zlim=limits[2], ylabel=names[1], zlabel=names[2])
        ax.set_box_aspect(shape)


# --- k3d -------------------------------------------------------------------------------------------


def _turns() -> bool:
    """Whether this is a notebook with k3d."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive else None
    return hasattr(shell, "kernel") and importlib.util.find_spec("k3d") is not None


def _turning(
    stored: _Stored, groups: dict[str, np.ndarray] | None, shape: tuple[int, ...], title: str
) -> Any:
    import k3d

    grid = [-0.5] * 3 + [size - 0.5 for size in shape]
    figure = k3d.plot(name=title.replace("\n", ", "), grid_auto_fit=False, grid=grid)
    layers: list[tuple[np.ndarray, dict[str, Any]]] = []
    if groups is None:
        colours, ramp, nan = _colours(stored.values), np.linspace(0, 1, 32), np.isnan(stored.values)
        by_value = {
            "attribute": np.nan_to_num(stored.values[~nan]),  # infinities
            "color_map": [c for p in ramp for c in (p, *colours["cmap"](p)[:3])],
            "color_range": [colours["norm"].vmin, colours["norm"].vmax],
            "name": "value",
        }
        no_number = {"color": int(NAN[1:], 16), "name": "NaN"}
        layers = [(stored.keys[~nan], by_value), (stored.keys[nan], no_number)]
    for name, keys in (groups or {}).items():
        colour, opacity = int(COLOURS[name][1:], 16), 1.0 if name == "kept" else VEIL
        style = {"color": colour, "opacity": opacity, "name": f"{name} {len(keys):,}"}
        layers.append((keys, style))
    for keys, style in layers:
        if keys.size:
            positions = _positions(keys, shape).astype(np.float32)
            figure += k3d.points(positions, point_size=1.0, **style)
    return figure


# --- Checks ----------------------------------------------------------------------------------------


def _check(
    x: SparseTensor, other: SparseTensor | None, sample: int, channel: int | None
) -> tuple[int, int | None]:
    maps = {"x": x} if other is None else {"x": x, "other": other}
    for name, y in maps.items():
        check_sparse(name, y)
        if y.spatial_shape != x.spatial_shape:
            raise ValueError(
                f"other must have x's grid {x.spatial_shape}, got {y.spatial_shape}. plot compares a map "
                f"before and after a selection."
            )
        if any(isinstance(a, jax.core.Tracer) for a in (y.keys, y.values)):
            raise ValueError(f"{name} must be concrete, got tracers. Call plot outside jit.")
    if channel is not None:
        channel = _check_index("channel", channel, min(y.channels for y in maps.values()))
    return _check_index("sample", sample, min(y.batch_size for y in maps.values())), channel


def _check_index(name: str, index: int, size: int) -> int:
    try:
        index = operator.index(index)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {index!r}.") from None
    if not 0 <= index < size:
        raise ValueError(f"{name} must lie in [0, {size}), got {index}.")
    return index
