"""Whole training steps, ready to be timed: sparse networks and their dense twins."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ilajax
from benchmarks import workloads
from benchmarks.timing import Candidate
from experiments import mnist
from experiments.data.mnist import load_mnist
from experiments.training import as_it_is, train_step
from ilajax.models import OctNet3
from ilajax.models.octnet3 import TABLE_2


def training_step(model: nnx.Module, images: Any, labels: np.ndarray, to_input: Any) -> Candidate:
    """One step of Adagrad, with dropout, as in `experiments.training`."""
    optimizer = nnx.Optimizer(model, mnist.make_transformation(0.01), wrt=nnx.Param)
    model.train()
    step = nnx.cached_partial(train_step, model, optimizer)
    parameters = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)]
    epoch_end = jnp.asarray(False)

    def call() -> Any:
        # The new weights are waited for too.
        return step(images, labels, epoch_end, to_input=to_input), [v[...] for v in parameters]

    return call


def solids_step(dense: bool, *, resolution: int = 64, batch: int = 8) -> Candidate:
    """OctNet3 on generated meshes; bounds are twice the surfaces' density, about 2 / r before any pooling."""
    x, labels = workloads.solids(resolution, batch=batch)
    blocks = len(TABLE_2[resolution].sparse)
    bounds = [min(1.0, 4 * 2**block / resolution) for block in range(blocks)]
    classes = len(workloads.SOLIDS)
    model = OctNet3(
        resolution, num_classes=classes, density_bounds=bounds, rngs=nnx.Rngs(0), dense=dense
    )
    return training_step(model, ilajax.to_dense(x) if dense else x, labels, as_it_is)


def mnist_step(dense: bool, *, batch: int = 32) -> Candidate:
    """OctNet3-24^2 on digits, as in `experiments.mnist`."""
    digits = load_mnist()[0].threshold(mnist.PIXEL_THRESHOLD)
    to_input = mnist.dense_input if dense else mnist.SparseInput(int(digits.counts().max()))
    model = mnist.make_net(None if dense else 0.095, seed=0)
    return training_step(model, digits.images[:batch], digits.labels[:batch], to_input)


class Head(nnx.Module):
    """The dense layers of OctNet3-24^2, which the sparse net and its twin share."""

    def __init__(self, *, rngs: nnx.Rngs):
        net = mnist.make_net(None, seed=0)
        self.hidden, self.dropout, self.logits = net.hidden, net.dropout, net.logits

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits(self.dropout(nnx.relu(self.hidden(x))))


def mnist_head_step(*, batch: int = 32) -> Candidate:
    """The part of a step of OctNet3-24^2 that no convolution can make faster."""
    head = Head(rngs=nnx.Rngs(0))
    x = jnp.ones((batch, head.hidden.in_features))
    return training_step(head, x, np.zeros(batch, np.int32), as_it_is)
