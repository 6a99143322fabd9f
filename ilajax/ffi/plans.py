"""How kernels cut their work: the extension is asked for a plan when a call is traced."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ilajax.ffi import gpus
from ilajax.ffi.registry import extensions
from ilajax.geometry import Window

# Samples, or calls that vmap has folded, that a plan is made for where jax.export leaves their number open:
# as many as keep every thread busy.
OPEN_BATCH = 64

_tuning: dict[str, dict[str, int]] = {"cpu": {}, "cuda": {}}


class Plan(NamedTuple):
    """What a kernel with a workspace is called with besides its operands."""

    numbers: np.ndarray  # that say how the work is cut
    workspace: Any  # its bytes; an expression where the batch is open
    limit: str  # why the kernel cannot do this on this machine's devices, "" if it can
    map_words: int  # of a slot in the site map that it takes, 0 if it takes none


def plan(
    platform: str,
    target: str,
    arrays: Sequence[Any],
    dtype: Any,
    batch: Any,
    groups: Any,
    window: Window | None = None,
) -> Plan | None:
    """The plan for one call; None for a kernel that needs none, and no workspace.

    Args:
      platform: "cpu" or "cuda".
      target: the FFI target's name.
      arrays: operands and results but the workspace; `dtype` is that of the values.
      batch, groups: the leading sizes of arrays; symbols where `jax.export` leaves them open.
      window: of the call, if it has one.
    """
    is_open = not (isinstance(batch, int) and isinstance(groups, int))
    sizes = {batch: batch, groups: groups}
    if is_open:
        sizes[groups] = _known(groups)
        sizes[batch] = _known(batch // groups) * sizes[groups]
    shapes = [tuple(sizes.get(s, s) for s in array.shape) for array in arrays]
    tuning = {"open_batch": int(is_open)} | _tuning[platform]
    if platform == "cuda":
        tuning = {"shared_memory": gpus.shared_memory()} | tuning
    attribute = [] if window is None else window_attribute(window).tolist()
    found = extensions[platform].module.plan(
        target, shapes, np.dtype(dtype).name, attribute, tuning
    )
    if found is None:
        return None
    numbers, workspace, fixed, each_item, each_group, limit, map_words = found
    if is_open:
        # A kernel does any batch with any plan, since what it cuts are tasks or chunks.
        workspace = fixed + each_item * batch + each_group * groups
    return Plan(np.array(numbers, np.int64), workspace, limit, map_words)


def window_attribute(window: Window) -> np.ndarray:
    """A window as one flat array: a row for each of its fields."""
    w = window
    reads = (w.input_shape, w.window_shape, w.strides, w.dilation, w.low)
    return np.array([*reads, w.output_shape, w.input_dilation], np.int64).ravel()


@contextlib.contextmanager
def tuned(platform: str, **numbers: int) -> Iterator[None]:
    """Plans with other numbers of the struct Tuning (xla_kernels/common/tuning.h): for tests and experiments.

    A program that has been compiled keeps the plans that it was traced with.
    """
    before = _tuning[platform]
    _tuning[platform] = before | numbers
    try:
        yield
    finally:
        _tuning[platform] = before


def _known(size: Any) -> int:
    return size if isinstance(size, int) else OPEN_BATCH
