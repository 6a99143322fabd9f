# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What k-selection keeps
#
# A convolution on sparse data responds at more sites than it was given: the map fills in. The paper's
# answer is *attention*. Each channel may store k responses: the k strongest are kept, and the others are
# cut. This notebook shows what that does to a digit, to a solid, and to gradients.
#
# In pictures of a selection, blue is kept, orange is cut, and grey was never a response.

# %%
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import ilajax


def panels(count, rank=2, height=3.3):
    """Axes in a row, for maps of two or three axes."""
    projection = {"projection": "3d"} if rank == 3 else {}
    _, axes = plt.subplots(
        1, count, figsize=(3.2 * count, height), layout="constrained", subplot_kw=projection
    )
    for axis in axes:
        axis.set_anchor("N")  # aligns maps with and without a legend below
    return axes


# %% [markdown]
# ## What does a convolution do to a mostly empty page?
#
# A digit is a line on 28 x 28 pixels. One of the simplest filters, a blur over 3 x 3 sites, is applied
# three times. Nothing is selected: every site may be stored. The title of each map gives its density,
# the share of sites that are stored.

# %%
root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())
digits = root / "experiments" / "data" / "digits"
pixels = gzip.decompress((digits / "train-images-idx3-ubyte.gz").read_bytes())[16:]
image = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1)[8] / np.float32(256)
image = np.where(image < 0.2, 0, image)

grid = (28, 28)
sites = 28 * 28
digit = ilajax.from_dense(image[None], capacity=300)
weights = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 16
blur = ilajax.SparseKernel.from_dense(weights[..., None, None])

filled = [digit]
for _ in range(3):
    filled.append(ilajax.conv(filled[-1], blur, capacity=sites).features)

names = ("the digit", "1 convolution", "2 convolutions", "3 convolutions")
for axis, name, x in zip(panels(4), names, filled, strict=True):
    ilajax.plot(x, ax=axis, title=f"{name}: {float(x.density[0, 0]):.0%}")

# %% [markdown]
# The line becomes a blot. What was added is faint, but each of its sites takes as much memory as a site
# of the line.
#
# ## What does a bound keep?
#
# A density bound of 0.05 allows 39 of the 784 sites. All responses of one convolution are candidates.
# Four bounds select from the same candidates.

# %%
before = filled[1]
keys, values = np.asarray(before.keys[0, 0]), np.asarray(before.values[0, 0])
bounds = (0.02, 0.05, 0.1, 0.2)
print("bound  kept   cut  weakest kept  strongest cut")
for axis, bound in zip(panels(4), bounds, strict=True):
    after = ilajax.k_select(before, ilajax.capacity(bound, grid))
    ilajax.plot(before, after, ax=axis, title=f"bound {bound}")

    kept = np.isin(keys, after.keys[0, 0]) & (keys < sites)
    cut = ~kept & (keys < sites)
    weakest, strongest = values[kept].min(), values[cut].max()
    print(f"{bound:5} {kept.sum():5} {cut.sum():5} {weakest:13.4f} {strongest:14.4f}")

# %% [markdown]
# The selection is a threshold that adapts: it is just high enough for the bound. Here the responses are
# strong where the pen was. A low bound leaves the thickest strokes, a high one the whole line; the rim
# is cut first.
#
# `ilajax.conv` convolves and selects in one call: `capacity=ilajax.capacity(0.05, grid)`.
#
# ## What is "strong"?
#
# `select=` has three answers. A filter with both signs shows the difference: it responds to the edges of
# the line, above 0 on the left and below 0 on the right. The bound is 0.2, 156 sites.
#
# - `"positive"`, the default: responses above 0. This contains the ReLU. It may leave slots empty.
# - `"value"`: the largest values, whatever their sign.
# - `"magnitude"`: the largest absolute values.

# %%
sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
edge = ilajax.SparseKernel.from_dense(sobel[..., None, None])
responses = ilajax.conv(digit, edge, capacity=sites, select="magnitude").features
axes = panels(4)
ilajax.plot(responses, ax=axes[0], title=f"all {int(responses.counts[0, 0])} responses")
for axis, select in zip(axes[1:], ("positive", "value", "magnitude"), strict=True):
    kept = ilajax.conv(digit, edge, capacity=ilajax.capacity(0.2, grid), select=select).features
    ilajax.plot(responses, kept, ax=axis, title=f'"{select}"')

# %% [markdown]
# `"value"` first takes the same responses as `"positive"`. Then it fills the remaining slots with the
# negative responses nearest to 0, the weakest of all. A ReLU after it would drop them again, which is why
# the default contains the ReLU. `"magnitude"` keeps both edges of the line.
#
# ## Do all channels keep the same sites?
#
# No. Each channel is selected separately. Four filters, four directions, and a bound of 0.05 for each:

# %%
directions = np.stack([sobel, -sobel, sobel.T, -sobel.T], axis=-1)[:, :, None]
kernel = ilajax.SparseKernel.from_dense(directions)
channels, candidates = ilajax.conv(digit, kernel, capacity=ilajax.capacity(0.05, grid))
for channel, axis in enumerate(panels(4)):
    count, of = int(channels.counts[0, channel]), int(candidates[0, channel])
    ilajax.plot(channels, channel=channel, ax=axis, title=f"channel {channel}: {count} of {of}")
stored = np.asarray(channels.keys)
union = np.unique(stored[stored < sites]).size
print(f"{int(channels.counts.sum())} entries stored, on {union} different sites")

# %% [markdown]
# A single list of sites for all channels would have to hold the union, with a value for each channel at
# each site.
#
# ## What if two responses are equally strong?
#
# The one with the lower key is kept: the one that comes first, row by row. Nothing is random, so the same
# input gives the same output. Here is a square whose 64 sites all hold a 1, and 20 of them may stay:

# %%
ones = np.zeros((1, 12, 12, 1), np.float32)
ones[:, 2:10, 2:10] = 1
square = ilajax.from_dense(ones, capacity=64)
_, axis = plt.subplots(figsize=(3.2, 3.3), layout="constrained")
ilajax.plot(square, ilajax.k_select(square, 20), ax=axis, title="20 of 64 equal values")

# %% [markdown]
# ## What happens from layer to layer?
#
# Take six layers of eight channels with random weights, as in a network before training. Without a bound,
# every response above 0 is stored; with one, the density cannot exceed it.

# %%
rng = np.random.default_rng(0)


def stack(axes):
    """Six filters with He's initial weights."""
    shapes = [(*(3,) * axes, before, 8) for before in (1, 8, 8, 8, 8, 8)]
    return [
        ilajax.SparseKernel.from_dense(
            rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)
        )
        for shape in shapes
    ]


def densities(x, filters, bound):
    """The mean density over channels of the input and after each layer; and the last map."""
    found, capacity = [x.density.mean()], ilajax.capacity(bound, x.spatial_shape)
    for kernel in filters:
        x = ilajax.conv(x, kernel, capacity=capacity).features
        found.append(x.density.mean())
    return np.array(found), x


_, axis = plt.subplots(figsize=(6, 3.3), layout="constrained")
filters, last = stack(2), {}
for bound in (1.0, 0.2, 0.095, 0.035):
    name = f"bound {bound}" if bound < 1 else "no bound"
    by_layer, last[name] = densities(digit, filters, bound)
    axis.plot(by_layer, "o-", label=name)
axis.set(xlabel="layers passed", ylabel="density", ylim=(0, None))
axis.legend(frameon=False)

# %% [markdown]
# A ReLU drops about half of the responses, so a layer of a network fills the map more slowly than a blur
# does. Without a bound the map still fills. What is left of the digit after the sixth layer, in the first
# of its eight channels?

# %%
for axis, (name, x) in zip(panels(4), last.items(), strict=True):
    ilajax.plot(x, channel=0, ax=axis, title=name)

# %% [markdown]
# ## What happens in three dimensions?
#
# A bound matters most here: a filter of 3 x 3 x 3 spreads each voxel over 27. A torus of 20,000 points on
# 32^3 voxels is blurred once; a bound of 0.04 keeps 1,310 of the responses.

# %%
around, tube = rng.uniform(0, 2 * np.pi, (2, 20_000))
radius = 10 + 4 * np.cos(tube)
torus = np.stack([radius * np.cos(around), radius * np.sin(around), 4 * np.sin(tube)], axis=1)
volume = (32, 32, 32)
solid = ilajax.data.voxelize(
    [torus], spatial_shape=volume, capacity=2000, voxel_size=1, origin=-16
).tensor
distance2 = sum(axis**2 for axis in np.meshgrid(*[[-1, 0, 1]] * 3))
weights = np.exp(-distance2 / 1.5).astype(np.float32)
bell = ilajax.SparseKernel.from_dense((weights / weights.sum())[..., None, None])
before = ilajax.conv(solid, bell, capacity=32**3).features
after = {bound: ilajax.k_select(before, ilajax.capacity(bound, volume)) for bound in (0.04, 0.08)}

maps = {"the torus": solid, "one convolution": before, "bound 0.04": after[0.04]}
for axis, (name, x) in zip(panels(3, rank=3, height=3.6), maps.items(), strict=True):
    ilajax.plot(x, ax=axis, title=f"{name}: {float(x.density[0, 0]):.1%}")
    axis.view_init(elev=40, azim=-70)

# %% [markdown]
# Where did the selection cut? The outside does not show it, but a section through the middle does:


# %%
def middle(x):
    """The sites in the middle of axis 1, as a map of two axes; axis 2 points up."""
    plane = np.asarray(ilajax.to_dense(x))[:, :, 16].swapaxes(1, 2)[:, ::-1]
    return ilajax.from_dense(plane, capacity=32**2)


axes = panels(4)
ilajax.plot(middle(solid), ax=axes[0], title="the torus")
ilajax.plot(middle(before), ax=axes[1], title="one convolution")
for axis, (bound, x) in zip(axes[2:], after.items(), strict=True):
    ilajax.plot(middle(before), middle(x), ax=axis, title=f"bound {bound}")
for axis in axes:
    axis.set(xlabel="axis 0", ylabel="axis 2", yticks=[])

# %% [markdown]
# Sites off the surface are cut first, on both sides of it. A bound of 0.04 is less than the density of the
# surface itself, so parts of it are cut too.
#
# The table shows the density from layer to layer, with a bound of 0.04 and without one, for the torus and
# for the same number of voxels at random places. How fast a map fills in depends on the shape of the data:
# on a surface, many sites reach the same neighbours.

# %%
scattered = np.zeros(32**3, np.float32)
scattered[rng.choice(32**3, int(solid.counts[0, 0]), replace=False)] = 1
noise = ilajax.from_dense(scattered.reshape(1, 32, 32, 32, 1), capacity=2000)
filters = stack(3)
print("layers passed            " + "".join(f"{layer:7}" for layer in range(7)))
for bound in (1.0, 0.04):
    for name, x in (("torus", solid), ("random voxels", noise)):
        label = f"{name}, bound {bound}" if bound < 1 else f"{name}, no bound"
        by_layer, _ = densities(x, filters, bound)
        print(f"{label:25}" + "".join(f"{density:7.1%}" for density in by_layer))

# %% [markdown]
# ## Which inputs get a gradient?
#
# Gradients start at the kept responses and flow to stored inputs only (equation 3 of the paper). So a
# pixel of the digit gets a gradient if a kept response is within reach of the filter, and an empty site
# never gets one. Below, "kept" is a pixel with a gradient, and "cut" is one without.


# %%
def energy(values, bound):
    output = ilajax.conv(digit.with_values(values), blur, capacity=ilajax.capacity(bound, grid))
    return jnp.sum(output.features.values**2)


gradient = jax.jit(jax.grad(energy), static_argnums=1)
for axis, bound in zip(panels(3), (0.005, 0.02, 0.1), strict=True):
    of_pixels = digit.with_values(gradient(digit.values, bound))
    reached = ilajax.from_dense(ilajax.to_dense(of_pixels), capacity=digit.capacity)
    ilajax.plot(digit, reached, ax=axis, title=f"bound {bound}")
    count, stored = int(reached.counts[0, 0]), int(digit.counts[0, 0])
    print(f"bound {bound}: a gradient reaches {count} of {stored} pixels")

# %% [markdown]
# In a dense network, the gradient would reach every site that a response depends on, empty or not:


# %%
def dense_energy(x):
    axes = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, blur.to_dense(), (1, 1), "SAME", dimension_numbers=axes)
    return jnp.sum(y**2)


of_sites = np.asarray(jax.jit(jax.grad(dense_energy))(ilajax.to_dense(digit)))
print(f"dense: a gradient reaches {np.count_nonzero(of_sites)} of {sites} sites")

# %% [markdown]
# This is the trade-off. A low bound saves memory and time, but the filters learn from fewer inputs in each
# step. `python -m experiments.mnist` measures how much accuracy each bound costs on MNIST.
