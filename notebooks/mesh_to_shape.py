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
# # From a mesh to a shape with a name
#
# A mesh is a surface, and a surface fills little of a volume: less than a tenth of 32^3 voxels here. This
# notebook makes meshes, turns them into voxels, trains a network that never stores more than a bound
# allows, and looks into it in three dimensions.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import ilajax

# %% [markdown]
# ## Meshes
#
# Four kinds of surface, each a sheet of triangles that is bent: vertices `[V, 3]`, and the three corners of
# each triangle `[F, 3]`. A mesh from a file has the same two arrays; `trimesh.load("chair.off")` calls them
# `vertices` and `faces`.

# %%
CLASSES = ("ball", "ring", "tube", "cone")


def sheet(rows=12, columns=24):
    """A sheet of triangles: the place of each vertex in [0, 1]^2, and the faces."""
    v, u = np.mgrid[0 : rows + 1, 0 : columns + 1]
    at = np.arange((rows + 1) * (columns + 1)).reshape(rows + 1, columns + 1)
    a, b, c, d = (part.ravel() for part in (at[:-1, :-1], at[1:, :-1], at[:-1, 1:], at[1:, 1:]))
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])
    return u.ravel() / columns, v.ravel() / rows, faces


def mesh(kind, random):
    """A surface of a kind, stretched and turned at random."""
    u, v, faces = sheet()
    around, up = 2 * np.pi * u, 2 * v - 1
    radius = {
        "ball": np.sqrt(np.maximum(0, 1 - up**2)),
        "ring": 1 + 0.35 * np.cos(2 * np.pi * v),
        "tube": 0.5 + 0 * v,
        "cone": v,
    }[kind]
    height = 0.35 * np.sin(2 * np.pi * v) if kind == "ring" else up
    vertices = np.stack([radius * np.cos(around), radius * np.sin(around), height], axis=1)
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    return vertices * random.uniform(0.7, 1, 3) @ turn, faces


random = np.random.default_rng(0)
figure, axes = plt.subplots(1, 4, figsize=(11, 3), subplot_kw={"projection": "3d"})
for axis, kind in zip(axes, CLASSES, strict=True):
    vertices, faces = mesh(kind, random)
    axis.plot_trisurf(
        *vertices.T, triangles=faces, color="lightsteelblue", edgecolor="white", lw=0.1
    )
    axis.set_title(kind)
    axis.set_axis_off()
    axis.set_aspect("equal")

# %% [markdown]
# ## Voxels
#
# `mesh_voxels` finds every voxel that a surface meets. `voxelize` packs several shapes into one batch of
# fixed shape: a list of keys for each sample, with room for `capacity` voxels. Nothing dense is made.

# %%
GRID = (32, 32, 32)
CAPACITY = 6 * 32**2  # of a box, which meets the most


def batch_of(kinds, random):
    """A batch of shapes as a sparse tensor."""
    shapes = [ilajax.data.mesh_voxels(*mesh(kind, random), spatial_shape=GRID) for kind in kinds]
    packed = ilajax.data.voxelize(
        [voxels + 0.5 for voxels in shapes],
        spatial_shape=GRID,
        capacity=CAPACITY,
        voxel_size=1.0,
        origin=(0, 0, 0),
    )
    assert not packed.overflow.any()
    return packed.tensor


shown = batch_of(CLASSES, random)
print(shown)
print("voxels:", shown.counts.ravel(), "of", shown.sites)


# %%
def draw(x, sample, axis, title):
    """A shape in three dimensions, coloured by height: its voxels are all 1."""
    heights = np.float32(1) + x.coordinates()[..., 2].astype(np.float32)
    ilajax.plot(x.with_values(heights), sample=sample, ax=axis, title=title)
    axis.set_axis_off()
    axis.figure.axes[-1].remove()  # the colours' scale


figure, axes = plt.subplots(1, 4, figsize=(11, 3), subplot_kw={"projection": "3d"})
for number, (axis, kind) in enumerate(zip(axes, CLASSES, strict=True)):
    draw(shown, number, axis, kind)

# %% [markdown]
# ## A network with bounds
#
# Each layer keeps the strongest responses of a channel, up to its bound. So memory and time are known
# before the first step, and maps cannot fill in, however many layers there are.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = ilajax.nn.Conv(1, 8, (3, 3, 3), density_bound=0.1, rngs=rngs)
        self.conv2 = ilajax.nn.Conv(8, 16, (3, 3, 3), density_bound=0.2, rngs=rngs)
        self.conv3 = ilajax.nn.Conv(16, 24, (3, 3, 3), density_bound=0.4, rngs=rngs)
        self.logits = nnx.Linear(4**3 * 24, len(CLASSES), rngs=rngs)

    def features(self, x):
        x = ilajax.max_pool(self.conv1(x), 2)
        x = ilajax.max_pool(self.conv2(x), 2)
        return ilajax.max_pool(self.conv3(x), 2)

    def __call__(self, x):
        x = ilajax.to_dense(self.features(x))
        return self.logits(x.reshape(x.shape[0], -1))


@nnx.jit
def train_step(net, optimizer, x, labels):
    def loss_of(net):
        logits = net(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(net)
    optimizer.update(net, gradients)
    return loss


net = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
losses = []
for _ in range(40):
    chosen = random.integers(len(CLASSES), size=16)
    x = batch_of([CLASSES[n] for n in chosen], random)
    losses.append(float(train_step(net, optimizer, x, jnp.asarray(chosen))))
print(f"loss {losses[0]:.2f} at first, {np.mean(losses[-5:]):.2f} at the end")

# %% [markdown]
# ## What it says
#
# New shapes, with the network's probabilities.

# %%
net.eval()
test_random = np.random.default_rng(1)
truth = np.arange(64) % len(CLASSES)
x = batch_of([CLASSES[n] for n in truth], test_random)
probabilities = np.asarray(jax.nn.softmax(net(x)))
found = probabilities.argmax(axis=1)
print(f"{(found == truth).mean():.0%} of 64 new shapes are named right")

figure = plt.figure(figsize=(11, 4.6), layout="constrained")
for number, kind in enumerate(CLASSES):
    axis = figure.add_subplot(2, 4, number + 1, projection="3d")
    draw(x, number, axis, f"a {kind}, named a {CLASSES[found[number]]}")
    axis = figure.add_subplot(4, 4, 9 + number)
    axis.barh(CLASSES, probabilities[number], color="steelblue")
    axis.set_xlim(0, 1)

# %% [markdown]
# ## What it looked at
#
# The first layer of the ring: a channel of its responses, and a slice through them, where blue is what the
# bound keeps, the strongest, and orange is what it cuts.

# %%
kernel, bias = net.conv1.sparse_kernel, net.conv1.bias[...]
one = jax.tree.map(lambda array: array[1:2], x)
everything = ilajax.conv(one, kernel, bias, capacity=one.sites, select="positive").features
kept = net.conv1(one)
channel = int(np.argmax(np.asarray(everything.counts - kept.counts)[0]))
figure = plt.figure(figsize=(9, 4), layout="constrained")
axis = figure.add_subplot(1, 2, 1, projection="3d")
ilajax.plot(kept, channel=channel, ax=axis, title=f"channel {channel}: what is kept")
slices = [
    ilajax.from_dense(ilajax.to_dense(each)[:, 16, ..., channel : channel + 1], capacity=32**2)
    for each in (everything, kept)
]
axis = figure.add_subplot(1, 2, 2)
ilajax.plot(*slices, ax=axis, title="a slice through the middle")
print(
    f"channel {channel}: {int(kept.counts[0, channel])} of {int(everything.counts[0, channel])} kept"
)

# %% [markdown]
# With your own meshes: read `vertices` and `faces`, and start at "Voxels".
# `python -m experiments.classification --data modelnet40 --data-dir FOLDER` does so with ModelNet40's files.
