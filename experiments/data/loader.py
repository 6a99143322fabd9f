"""Batches for training, by Grain: in an order that can be resumed, from worker processes where that pays."""

import dataclasses
import functools
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """What a training step takes, as NumPy arrays."""

    inputs: Any  # what the net, or its `to_input`, takes: an array or a pytree
    labels: np.ndarray  # int[B]
    overflow: np.ndarray | None = None  # int32[B], voxels that did not fit; None: none can be cut


class Source(Protocol):
    """Labelled samples. Worker processes get it pickled, so it must not hold a JAX array."""

    def __len__(self) -> int: ...

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        """The samples int[B], a function of the arguments alone: what is random is drawn from them."""
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Samples that are in memory, ready for the step."""

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        return Batch(self.inputs[chosen], self.labels[chosen])


@functools.lru_cache(maxsize=1)
def batches(count: int, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order, int[steps, size]: a function of seed and epoch, and of nothing before.

    What is left over when `size` does not divide `count` is left out; another part in each epoch.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return order[: count - count % size].reshape(-1, size)


def feed(
    source: Source, size: int, *, seed: int, epochs: int, start: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
    """The batches of epochs 1 to `epochs`, one after the other, in the order of the function `batches`.

    A batch depends on its number alone, so all that a checkpoint need hold is how many were taken. The number
    of workers may change in between.

    Args:
      source: the samples.
      size: samples of a batch.
      seed: of the order.
      epochs: how often every sample comes.
      start: batches that are behind, from epoch 1 on.
      workers: processes that make batches ahead, until the generator is closed; 0: made here, when they are
        asked for. Grain spawns them, so a script that calls this must have its main program under
        `if __name__ == "__main__"`.
    """
    if len(source) < size:
        raise ValueError(
            f"size must be at most the {len(source)} samples of the source, got {size}."
        )
    numbers = range(start, epochs * (len(source) // size))
    numbered = _Numbered(source, size, seed)
    if not workers:
        return (numbered(number) for number in numbers)
    return _from_workers(numbers, numbered, workers)


def _from_workers(
    numbers: range, numbered: "_Numbered", workers: int
) -> Generator[Batch, None, None]:
    # Imported where it is used: nothing else needs Grain, and it may be missing where kernels are timed.
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks its flags for their values, which stay the defaults
    made = grain.MapDataset.range(numbers.start, numbers.stop).map(numbered)
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ahead = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
    fed = iter(made.to_iter_dataset(here).mp_prefetch(ahead))
    try:
        yield from fed
    finally:
        fed.close()


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """The batch of a number, counted from 0 over all epochs."""

    source: Source
    size: int
    seed: int

    def __call__(self, number: int) -> Batch:
        epoch, step = divmod(number, len(self.source) // self.size)
        order = batches(len(self.source), self.size, seed=self.seed, epoch=epoch + 1)
        return self.source.batch(order[step], epoch + 1)
