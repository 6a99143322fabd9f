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
# # Quick start
#
# A sparse tensor, a convolution that keeps it sparse, gradients, and a small network that learns.
#
# `jupytext --to notebook notebooks/quick_start.py` turns this file into a notebook. Jupyter with jupytext
# opens it directly.

# %%
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import ilajax

# %% [markdown]
# ## Data that is mostly empty
#
# A handwritten digit is a line on an empty page. The repository contains 10,000 of them. Any array
# `[batch, *grid, channels]` with one to four spatial axes will do.

# %%
root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())
digits = root / "experiments" / "data" / "digits"
pixels = gzip.decompress((digits / "train-images-idx3-ubyte.gz").read_bytes())[16:]
classes = gzip.decompress((digits / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1) / np.float32(255)
images = np.where(images < 0.2, 0, images)[:2048]
labels = np.frombuffer(classes, np.uint8)[:2048].astype(np.int32)
images.shape, float((images > 0).mean())

# %% [markdown]
# `from_dense` stores the non-zero pixels: for each sample and channel, a list of at most `capacity` keys
# (positions in the grid) with their values. The shape of the list is fixed, so the tensor goes through
# `jit`, `vmap` and `scan` like any array.

# %%
x = ilajax.from_dense(images[:4], capacity=300)
print(x.counts.ravel(), x.density.ravel())
x

# %% [markdown]
# Points become a sparse tensor without a dense array in between. All channels then share one list of
# sites, their support.

# %%
points = np.array([[0, 0, 0], [5, 6, 7], [5, 6, 7]])
features = np.array([[1.0, 0.0], [2.0, 4.0], [4.0, 0.0]], np.float32)
cloud = ilajax.from_points(
    points, features, np.array([0, 0, 0]), spatial_shape=(64, 64, 64), batch_size=1, capacity=8
)
print(cloud, cloud.counts)

# %% [markdown]
# ## Convolution, and what it does to sparsity
#
# Every convolution reaches one site further: the map fills in. A density bound keeps only the strongest
# responses of each channel, which the paper calls attention. `select="positive"`, the default, drops
# whatever is not above 0, so the ReLU is included.

# %%
kernel = ilajax.SparseKernel.from_dense(jnp.ones((3, 3, 1, 1)) / 9)
sites = 28 * 28
free = bounded = x
for _ in range(3):
    free = ilajax.conv(free, kernel, capacity=sites).features
    bounded, responses = ilajax.conv(bounded, kernel, capacity=ilajax.capacity(0.095, (28, 28)))

panels = {"digit": x, "three convolutions": free, "with a bound of 9.5 %": bounded}
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for axis, (title, tensor) in zip(axes, panels.items(), strict=True):
    ilajax.plot(tensor, ax=axis, title=f"{title}: {float(tensor.density[0, 0]):.1%}")

# %% [markdown]
# `responses` counts the candidates before the selection. If there are more than the capacity, it cut.

# %%
responses.ravel(), bounded.capacity

# %% [markdown]
# Given two maps, `ilajax.plot` shows what a selection kept and what it cut.

# %%
before = ilajax.conv(x, kernel, capacity=sites).features
ilajax.plot(before, ilajax.k_select(before, ilajax.capacity(0.095, (28, 28))))

# %% [markdown]
# ## Gradients
#
# Gradients flow from the kept outputs to the stored inputs and the live weights, and nowhere else
# (equation 3 of the paper). So every gradient has the shape of what it belongs to. Keys are integers:
# differentiate with respect to values.


# %%
def energy(weights, values):
    filters = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
    output = ilajax.conv(x.with_values(values), filters, capacity=74).features
    return jnp.sum(output.values**2)


of_weights, of_values = jax.grad(energy, argnums=(0, 1))(kernel.values, x.values)
print(of_weights.shape, of_values.shape)

# %% [markdown]
# ## A network
#
# `ilajax.nn.Conv` is a Flax NNX module like any other, and mixes with Flax's own. `sparse_training` wraps
# an Optax optimizer. A regulariser before it pushes the layers' densities towards their bounds, and
# pruning after it removes filter weights that are small at the ends of two epochs in a row.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = ilajax.nn.Conv(1, 8, (3, 3), density_bound=0.095, rngs=rngs)
        self.conv2 = ilajax.nn.Conv(8, 16, (3, 3), density_bound=0.19, rngs=rngs)
        self.logits = nnx.Linear(7 * 7 * 16, 10, rngs=rngs)

    def __call__(self, x):
        x = ilajax.max_pool(self.conv1(x), 2)
        x = ilajax.to_dense(ilajax.max_pool(self.conv2(x), 2))
        return self.logits(x.reshape(x.shape[0], -1))


@nnx.jit
def train_step(net, optimizer, images, labels, epoch_end):
    def loss_of(net):
        logits = net(ilajax.from_dense(images, capacity=300))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(net)
    excess = ilajax.optim.excess_density(net)
    optimizer.update(net, gradients, excess_density=excess, epoch_end=epoch_end)
    return loss


net = Net(nnx.Rngs(0))
recipe = ilajax.optim.sparse_training(net, optax.adam(3e-3))
optimizer = nnx.Optimizer(net, recipe, wrt=nnx.Param)
train_images, train_labels = images[:1792], labels[:1792]
random, losses = np.random.default_rng(0), []
for _ in range(4):
    batches = random.permutation(len(train_labels)).reshape(-1, 64)
    for number, chosen in enumerate(batches, 1):
        batch = train_images[chosen], train_labels[chosen]
        loss = train_step(net, optimizer, *batch, epoch_end=number == len(batches))
        losses.append(float(loss))
    ilajax.optim.compact(net, optimizer)  # takes pruned weights out of storage
losses[0], np.mean(losses[-10:])

# %% [markdown]
# The layers have measured how dense their responses were before the selection. Pruning has removed some of
# their weights.

# %%
{
    name: (
        round(float(conv.density[...].mean()), 3),
        f"{int(conv.sparse_kernel.count)} of {conv.sparse_kernel.size} weights",
    )
    for name, conv in (("conv1", net.conv1), ("conv2", net.conv2))
}

# %%
net.eval()  # densities are measured in training only
held_out = net(ilajax.from_dense(images[1792:], capacity=300))
accuracy = float((held_out.argmax(axis=1) == labels[1792:]).mean())
print(f"{accuracy:.1%} of {len(labels) - 1792} digits that it has not seen")

# %% [markdown]
# Next: `k_selection.py` shows in pictures what a bound keeps. `python -m experiments.mnist` trains the
# paper's network under several bounds, and its dense twin; pruning and the density regulariser are
# optional.
