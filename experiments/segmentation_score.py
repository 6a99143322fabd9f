"""How labels of points are judged: loss, IoU by class, a baseline. A label of -1 does not count."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.scenes import CLASSES, Clouds, SceneSource
from experiments.training import Row, totals


def score_points(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean loss of the points, and the share that is told right: a `Score` of the training loop."""
    counts = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    right = (jnp.argmax(logits, axis=-1) == labels) & counts
    return jnp.sum(losses * counts) / jnp.sum(counts), jnp.sum(right) / jnp.sum(counts)


@functools.partial(nnx.jit, static_argnames="to_input")
def test_step(
    model: nnx.Module, inputs: Clouds, labels: jax.Array, *, to_input: Any
) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses, and how many points of each class [true] were told to be of which [found]."""
    logits = model(to_input(inputs))
    counts = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    true = jax.nn.one_hot(labels, len(CLASSES)).reshape(-1, len(CLASSES))  # zeros for -1
    found = jax.nn.one_hot(jnp.argmax(logits, axis=-1), len(CLASSES)).reshape(true.shape)
    return jnp.sum(losses * counts), true.T @ found


def test_row(step: Any, inputs: Clouds, labels: np.ndarray, batch: int) -> Row:
    """A row's figures: loss, accuracy, IoU."""
    loss, confusion = totals(step, inputs, labels, batch)
    figures = judged(confusion)
    named = {f"test_{name}": figures.pop(name) for name in ("accuracy", "mean_iou")}
    return {"test_loss": float(loss / confusion.sum())} | named | figures


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """For each class the points that are it and were found, as a share of those that are either.

    Args:
      confusion: numbers of points [true, found].

    Returns float[C]; NaN for a class that no point has or was said to have.
    """
    both = np.diag(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def judged(confusion: np.ndarray) -> Row:
    """Accuracy and IoU of numbers of points [true, found]."""
    ious = class_ious(confusion)
    shares = {"accuracy": np.trace(confusion) / confusion.sum(), "mean_iou": np.nanmean(ious)}
    shares |= {f"iou_{name}": iou for name, iou in zip(CLASSES, ious, strict=True)}
    # JSON has no NaN.
    return {name: None if np.isnan(v) else float(v) for name, v in shares.items()}


def baseline(training: SceneSource, held_out: SceneSource, most: int = 64) -> np.ndarray:
    """Numbers of held-out points [true, found], if each bin of heights and normals gets its usual class.

    It is what height and normal tell without a look at the neighbours.

    Bins are 5 cm of height, and a tenth of the normal's share of the vertical, upwards and downwards.
    """
    votes = np.zeros((64 * 20, len(CLASSES)), np.int64)
    for number in range(min(most, len(training))):
        np.add.at(
            votes,
            _bins(scene := training.scene(number)),
            np.eye(len(CLASSES), dtype=int)[scene.labels],
        )
    usual = votes.argmax(axis=1)
    confusion = np.zeros((len(CLASSES),) * 2, np.int64)
    for number in range(len(held_out)):
        scene = held_out.scene(number)
        np.add.at(confusion, (scene.labels, usual[_bins(scene)]), 1)
    return confusion


def _bins(scene: Any) -> np.ndarray:
    _, height, _, _, up = scene.features().T
    level = np.floor(height / 0.05).clip(0, 63)
    slope = np.floor((up + 1) * 10).clip(0, 19)
    return (level * 20 + slope).astype(np.int64)
