"""Draws the pictures of docs/concepts, each from what ilajax computes: python docs/pictures/draw.py"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import ListedColormap, TwoSlopeNorm

import ilajax

HERE = Path(__file__).parent
BLUE, RED, GREY, STORED = "#0072B2", "#D55E00", "#eeeeee", "#b9d8ee"
GRID = (32, 32)
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: the test reads it
    "svg.hashsalt": "ilajax",  # the same file from the same numbers
}


def drawing() -> np.ndarray:
    """A spiral on an empty page, [1, 32, 32, 1]."""
    turn = np.linspace(0.6, 4.2 * np.pi, 600)
    page = np.zeros(GRID, np.float32)
    spiral = 15.5 + turn[:, None] * np.stack([np.sin(turn), np.cos(turn)], axis=1)
    page[tuple(spiral.round().astype(int).T)] = 1
    return page[None, ..., None]


def edge_filter() -> ilajax.SparseKernel:
    """A filter of both signs, [3, 3, 1, 1], so that responses have both."""
    weights = np.random.default_rng(0).normal(size=(3, 3, 1, 1))
    return ilajax.SparseKernel.from_dense(jnp.asarray(weights, jnp.float32))


def data_types() -> plt.Figure:
    """Two channels of a small grid, and the keys and values that store them."""
    dense = np.zeros((1, 3, 5, 2), np.float32)
    dense[0, [0, 1, 2], [1, 1, 4], 0] = 3, 5, 2
    dense[0, [1, 2], [2, 3], 1] = 4, 1
    x = ilajax.from_dense(dense, capacity=4)
    figure, rows = plt.subplots(2, 2, figsize=(7.6, 3.4), layout="constrained")
    for channel, (grid, table) in enumerate(rows):
        plane = dense[0, ..., channel]
        grid.imshow(plane > 0, cmap=ListedColormap([GREY, STORED]))
        for key, value in enumerate(plane.flat):
            row, column = divmod(key, plane.shape[1])
            grid.text(column - 0.44, row - 0.22, key, fontsize=6, color="0.45")
            if value:
                grid.text(column, row + 0.12, f"{value:g}", ha="center", va="center", weight="bold")
        grid.set(xticks=[], yticks=[], ylabel=f"channel {channel}")
        entries = zip(x.keys[0, channel], x.values[0, channel], strict=True)
        for column, (key, value) in enumerate(entries):
            shade = STORED if key < x.sites else "white"
            for row, number in ((0.0, f"{int(key)}"), (-1.0, f"{float(value):g}")):
                table.add_patch(plt.Rectangle((column, row), 1, 1, fc=shade, ec="0.5"))
                table.text(column + 0.5, row + 0.5, number, ha="center", va="center")
        table.text(-0.15, 0.5, "keys", ha="right", va="center")
        table.text(-0.15, -0.5, "values", ha="right", va="center")
        table.set(xlim=(-1.2, 4.1), ylim=(-1.5, 1.5), aspect="equal")
        table.axis("off")
    rows[0, 0].set_title("grid 3 × 5, with its keys", fontsize=10)
    rows[0, 1].set_title("capacity 4; padding has the key 15", fontsize=10)
    return figure


def attention() -> plt.Figure:
    """What one selection keeps, and densities from layer to layer with and without a bound."""
    x, kernel = ilajax.from_dense(drawing(), capacity=300), edge_filter()
    bound = 0.1
    capacity, sites = ilajax.capacity(bound, GRID), x.sites
    responses = ilajax.conv(x, kernel, capacity=sites).features
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    ilajax.plot(x, ax=left, title=f"input: {float(x.density[0, 0]):.1%} of the sites")
    kept = ilajax.conv(x, kernel, capacity=capacity).features
    ilajax.plot(responses, kept, ax=middle, title=f"positive responses; bound {bound:.0%}")
    free = bounded = x
    densities = {"no bound": [float(x.density[0, 0])], "bound 10%": [float(x.density[0, 0])]}
    ones = ilajax.SparseKernel.from_dense(jnp.ones((3, 3, 1, 1)) / 9)
    for _ in range(5):
        free = ilajax.conv(free, ones, capacity=sites).features
        bounded = ilajax.conv(bounded, ones, capacity=capacity).features
        densities["no bound"].append(float(free.density[0, 0]))
        densities["bound 10%"].append(float(bounded.density[0, 0]))
    for (name, line), colour in zip(densities.items(), (RED, BLUE), strict=True):
        right.plot(line, "o-", color=colour, label=name)
        right.text(5, line[-1] + 0.03, f"{line[-1]:.0%}", ha="right")
    right.set(xlabel="convolutions", ylabel="density", ylim=(0, 1.08), title="fill-in")
    right.legend(frameon=False)
    return figure


def gradient() -> plt.Figure:
    """The gradient of a bounded convolution with respect to its input: of the dense network, and here."""
    dense = drawing()
    x, kernel = ilajax.from_dense(dense, capacity=300), edge_filter()
    capacity = ilajax.capacity(0.1, GRID)
    output = ilajax.conv(x, kernel, capacity=capacity).features
    kept = ilajax.to_dense(output) != 0

    def of_dense(page):
        axes = ("NHWC", "HWIO", "NHWC")
        responses = jax.lax.conv_general_dilated(
            page, kernel.to_dense(), (1, 1), "SAME", dimension_numbers=axes
        )
        return (responses * kept).sum()  # the same outputs are kept

    def of_stored(values):
        return ilajax.conv(x.with_values(values), kernel, capacity=capacity).features.values.sum()

    everywhere = jax.grad(of_dense)(jnp.asarray(dense))
    stored = ilajax.to_dense(x.with_values(jax.grad(of_stored)(x.values)))
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
    limit = float(jnp.abs(everywhere).max())
    norm = TwoSlopeNorm(0, -limit, limit)
    ilajax.plot(output, ax=panels[0], title=f"outputs that were kept: {int(output.counts[0, 0])}")
    gradients = {"dense": everywhere, "ilajax": stored}
    for panel, (name, page) in zip(panels[1:], gradients.items(), strict=True):
        picture = panel.imshow(page[0, ..., 0], cmap="RdBu_r", norm=norm)
        reached = int((page != 0).sum())
        panel.set_title(f"gradient of the input, {name}:\nnon-zero at {reached} sites", fontsize=11)
    figure.colorbar(picture, ax=panels[1:], shrink=0.8)
    return figure


def density_and_pruning() -> plt.Figure:
    """Equation 4, and a small network that is trained with and without the recipe."""
    figure, (formula, density, weights) = plt.subplots(
        1, 3, figsize=(10, 3.2), layout="constrained"
    )
    bound, numbers = 0.3, {"offset": 0.1, "b1": 0.5, "b2": 0.5}
    rho = jnp.linspace(0, 0.8, 161)
    push = ilajax.optim.density_biased_l2(1.0, **numbers)
    w = jnp.zeros_like(rho)
    bias = push.update(w, push.init(w), w, excess_density=rho - bound)[1].bias
    above = np.asarray(rho) > bound
    for side in (above, ~above):
        formula.plot(rho[side], bias[side], color=BLUE)
    formula.axvline(bound, color="0.6", ls=":")
    formula.axhline(0, color="0.6", lw=0.8)
    formula.set(xlabel="density ρ, bound at 0.3", ylabel="bias b", title="equation 4")
    runs = {"plain Adam": (RED, 0.0, 0.0), "recipe": (BLUE, 0.1, 0.05)}
    for name, (colour, scale, threshold) in runs.items():
        densities, left, right = _train(scale, threshold)
        line = {"color": colour, "marker": "o", "label": f"{name}: {right} of 16 right"}
        density.plot(range(1, len(densities) + 1), densities, **line)
        weights.plot(range(1, len(left) + 1), left, **line)
    density.axhline(0.1, color="0.6", ls=":")
    density.set(xlabel="epoch", title="density (bound: 0.1)", ylim=(0, 0.33))
    weights.set(xlabel="epoch", title="share of weights left", ylim=(0, 1.05))
    density.legend(frameon=False)
    return figure


def _train(scale: float, threshold: float) -> tuple[list[float], list[float], int]:
    """Learns to tell flat clouds from others: densities and weights left by epoch, and how many are right."""
    rng = np.random.default_rng(0)
    clouds = [rng.random((200, 3)) * (1, 1, i % 2) for i in range(16)]
    x = ilajax.data.voxelize(clouds, spatial_shape=(16,) * 3, capacity=200).tensor
    labels = jnp.arange(16) % 2
    layer = ilajax.nn.Conv(1, 8, (3, 3, 3), density_bound=0.1, rngs=nnx.Rngs(0))
    net = nnx.Sequential(layer, ilajax.global_avg_pool, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    recipe = ilajax.optim.sparse_training(net, optax.adam(0.01), scale=scale, threshold=threshold)
    optimizer = nnx.Optimizer(net, recipe, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, epoch_end):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

        gradients = nnx.grad(loss)(net)
        excess = ilajax.optim.excess_density(net)
        optimizer.update(net, gradients, excess_density=excess, epoch_end=epoch_end)

    densities, left = [], []
    for _ in range(6):
        for number in range(10):
            step(net, optimizer, epoch_end=number == 9)
        ilajax.optim.compact(net, optimizer)
        densities.append(float(layer.density[...].mean()))
        left.append(float(layer.sparse_kernel.density))
    net.eval()
    return densities, left, int((net(x).argmax(axis=1) == labels).sum())


PICTURES = (data_types, attention, gradient, density_and_pruning)


def draw(folder: Path) -> None:
    with matplotlib.rc_context(STYLE):
        for picture in PICTURES:
            figure = picture()
            figure.savefig(folder / f"{picture.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    matplotlib.use("agg")
    draw(HERE)
