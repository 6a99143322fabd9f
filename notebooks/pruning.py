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
# # A network that gets sparser as it learns
#
# Two things make a network sparser while it trains. A regulariser pushes the *densities of its feature
# maps* towards their bounds, and pruning takes *filter weights* away that stay small. This notebook trains
# a digit classifier with both, and draws what happens while it happens.

# %%
import gzip
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import display

import ilajax

# %%
root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())
digits = root / "experiments" / "data" / "digits"
pixels = gzip.decompress((digits / "train-images-idx3-ubyte.gz").read_bytes())[16:]
classes = gzip.decompress((digits / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1)[:2304] / np.float32(255)
images = np.where(images < 0.2, 0, images)
labels = np.frombuffer(classes, np.uint8)[:2304].astype(np.int32)
training, held_out = slice(0, 1792), slice(1792, None)

# %% [markdown]
# ## The network, and the recipe
#
# Each `ilajax.nn.Conv` has a bound on the density of its output, and measures the density of its responses
# before the selection. If they are denser than the bound, responses are cut, and gradients are lost with
# them.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = ilajax.nn.Conv(1, 8, (3, 3), density_bound=0.095, rngs=rngs)
        self.conv2 = ilajax.nn.Conv(8, 8, (3, 3), density_bound=0.095, rngs=rngs)
        self.conv3 = ilajax.nn.Conv(8, 16, (3, 3), density_bound=0.19, rngs=rngs)
        self.logits = nnx.Linear(7 * 7 * 16, 10, rngs=rngs)

    def __call__(self, x):
        x = ilajax.max_pool(self.conv2(self.conv1(x)), 2)
        x = ilajax.to_dense(ilajax.max_pool(self.conv3(x), 2))
        return self.logits(x.reshape(x.shape[0], -1))


net = Net(nnx.Rngs(0))
convs = {"conv1": net.conv1, "conv2": net.conv2, "conv3": net.conv3}
{name: (conv.density_bound, conv.kernel.size) for name, conv in convs.items()}

# %% [markdown]
# `sparse_training` wraps any Optax optimizer. Before it stands the regulariser: a layer that is denser than
# its bound gets its weights pushed down, the more, the denser it is. After it stands pruning: a weight
# that is smaller than `threshold` at the end of an epoch is warned, and at the end of the next one it is
# gone for good, if it is small still. [The recipe](../docs/recipe.md) says how to choose the numbers.

# %%
recipe = ilajax.optim.sparse_training(net, optax.adam(3e-3), scale=0.01, threshold=0.07)
optimizer = nnx.Optimizer(net, recipe, wrt=nnx.Param)


@nnx.jit
def train_step(net, optimizer, images, labels, epoch_end):
    def loss_of(net):
        logits = net(ilajax.from_dense(images, capacity=300))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(net)
    excess = ilajax.optim.excess_density(net)  # of each layer's density over its bound
    optimizer.update(net, gradients, excess_density=excess, epoch_end=epoch_end)
    return loss


@nnx.jit
def right(net, images, labels):
    logits = net(ilajax.from_dense(images, capacity=300))
    return (logits.argmax(axis=1) == labels).mean()


# %% [markdown]
# ## Training, drawn as it goes
#
# The picture is updated after each epoch: the accuracy on digits that the network has not seen, the
# weights that are left, and the densities beside their bounds, which are dashed.

# %%
figure, (accuracy_of, weights_of, density_of) = plt.subplots(
    1, 3, figsize=(11, 3.2), layout="constrained"
)
history = {"accuracy": [], **{name: [] for name in convs}}
densities = {name: [] for name in convs}


def draw():
    for axis, title in (
        (accuracy_of, "accuracy on new digits"),
        (weights_of, "weights left"),
        (density_of, "densities and bounds"),
    ):
        axis.clear()
        axis.set_title(title)
        axis.set_xlabel("epoch")
    epochs = range(1, len(history["accuracy"]) + 1)
    accuracy_of.plot(epochs, history["accuracy"], color="black", marker=".")
    accuracy_of.set_ylim(0, 1)
    for number, (name, conv) in enumerate(convs.items()):
        weights_of.plot(epochs, history[name], color=f"C{number}", marker=".", label=name)
        density_of.plot(epochs, densities[name], color=f"C{number}", marker=".")
        density_of.axhline(conv.density_bound, color=f"C{number}", ls="--", lw=0.8)
    weights_of.set_ylim(0, 1.02)
    density_of.set_ylim(0, None)
    weights_of.legend()


picture = display(figure, display_id=True)
full = {name: conv.kernel.size for name, conv in convs.items()}
random = np.random.default_rng(0)
for _ in range(10):
    net.train()
    batches = random.permutation(1792).reshape(-1, 64)
    for number, chosen in enumerate(batches, 1):
        train_step(
            net, optimizer, images[chosen], labels[chosen], jnp.asarray(number == len(batches))
        )
    for name, conv in convs.items():
        densities[name].append(float(conv.density[...].mean()))
    ilajax.optim.compact(net, optimizer)  # takes pruned weights out of storage; nothing recompiles
    net.eval()  # densities are measured in training only
    history["accuracy"].append(float(right(net, images[held_out], labels[held_out])))
    for name, conv in convs.items():
        history[name].append(int(conv.sparse_kernel.count) / full[name])
    draw()
    picture.update(figure)
plt.close(figure)  # it stands above

# %% [markdown]
# ## What is left
#
# Weights went where the network missed them least. Filters stay lists of keys and values, so a pruned
# weight takes no memory once the arrays are cut to what is left.

# %%
before = sum(full.values())
left = sum(int(conv.sparse_kernel.count) for conv in convs.values())
ilajax.optim.compact(net, optimizer, shrink=True)
stored = sum(conv.kernel.size for conv in convs.values())
print(f"{left} of {before} filter weights are left, stored in {stored} slots")
print(f"{history['accuracy'][-1]:.1%} of {len(labels[held_out])} digits that it has not seen")

# %% [markdown]
# The eight filters of the first layer, with what was pruned left white:

# %%
filters = np.array(net.conv1.sparse_kernel.to_dense())[:, :, 0]
live = np.array(
    ilajax.SparseKernel(
        net.conv1.sparse_kernel.keys,
        jnp.ones_like(net.conv1.sparse_kernel.values),
        net.conv1.sparse_kernel.shape,
    ).to_dense()
)[:, :, 0]
figure, axes = plt.subplots(1, 8, figsize=(11, 1.6), layout="constrained")
largest = np.abs(filters).max()
for number, axis in enumerate(axes):
    shown = np.where(live[..., number] > 0, filters[..., number], np.nan)
    axis.imshow(shown, cmap="PuOr", vmin=-largest, vmax=largest)
    axis.set_xticks([]), axis.set_yticks([])

# %% [markdown]
# `python -m experiments.regularisation` does this at several strengths, on shapes in three dimensions, with
# the time of a step beside it.
