"""How a kernel cuts its work, chosen from static shapes at trace time, and the workspace that takes.

The workspace is bound by max(8 * sites, 32 MiB) on the CPU, where sites is one grid, whatever the batch and
the number of threads. The sizes below are those that the kernels carve out of it, in the same order.
"""

import dataclasses

from ilajax.geometry import Window

_CPU_BUDGET = 32 << 20
# A slab's buffer, which should stay in a core's cache.
_CPU_SLAB = 512 << 10
# Threads that share a workspace. More threads than this take no part in one call.
_CPU_WORKERS = 16
_TAP_OFFSETS = 9
_CHUNK = 256  # sites of a submanifold convolution's task
_TOP_K = 96  # an upper bound of sizeof(RunningTopK)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes of a workspace, and the attributes that tell the kernel how to use it."""

    workspace: int
    attributes: dict[str, int]


def conv_forward(
    window: Window, batch: int, in_channels: int, out_channels: int, capacity: int, itemsize: int
) -> Plan:
    """Tasks are (sample, block of output channels), each over all slabs."""
    budget = cpu_budget(window)
    block = min(out_channels, 16)
    while block > 4 and batch * _ceil(out_channels, block) < 4:
        block = _ceil(block, 2)
    overflow = max(64, min(capacity, 1 << 14))
    output_row = window.output_sites // window.output_shape[0]
    while True:
        rows = _slab_rows(window.output_shape[0], output_row * block * 4)
        worker = (
            _slab(rows * output_row, block)
            + _align(block * overflow * 4)
            + _align(block * overflow * itemsize)
            + _align(block * _TOP_K)
        )
        shared = _filters(window, in_channels, out_channels, block)
        if block == 1 or shared + worker <= budget:
            break
        block = _ceil(block, 2)
    workers = _workers(batch * _ceil(out_channels, block), worker, budget - shared)
    return Plan(
        shared + workers * worker,
        {"channel_block": block, "slab_rows": rows, "overflow": overflow, "workers": workers},
    )


def conv_backward(
    window: Window,
    batch: int,
    groups: int,
    in_channels: int,
    out_channels: int,
    slots: int,
    weights: int,
) -> Plan:
    """Tasks are a fixed number of runs of (sample, slab of input rows) for each group."""
    budget = cpu_budget(window)
    block = out_channels
    input_row = window.input_sites // window.input_shape[0]
    output_row = window.output_sites // window.output_shape[0]
    extent = (window.window_shape[0] - 1) * window.dilation[0] + 1

    def reach(rows: int) -> int:
        return min((rows + extent - 2) // window.strides[0] + 1, window.output_shape[0])

    while True:
        rows = window.input_shape[0]
        while rows > 1 and reach(rows) * output_row * block * 4 > _CPU_SLAB:
            rows = _ceil(rows, 2)
        blocks = _ceil(out_channels, block)
        entries = 0 if blocks == 1 else in_channels * min(slots, rows * input_row)
        worker = (
            _slab(reach(rows) * output_row, block)
            + _align(blocks * in_channels * window.taps * block * 4)
            + _align(entries * 4)
        )
        shared = _filters(window, in_channels, out_channels, block)
        if block == 1 or shared + worker + _align(groups * weights * 4) <= budget:
            break
        block = _ceil(block, 2)
    units = batch // groups * _ceil(window.input_shape[0], rows)
    parts = _parts(units, groups * weights * 4, budget)
    shared += _align(groups * parts * weights * 4)
    workers = _workers(groups * parts, worker, budget - shared)
    return Plan(
        shared + workers * worker,
        {"channel_block": block, "slab_rows": rows, "parts": parts, "workers": workers},
    )


def submanifold_forward(window: Window, batch: int, cin: int, cout: int, slots: int) -> Plan:
    """Tasks are chunks of a sample's sites."""
    chunks = batch * _ceil(slots, _CHUNK)
    block = min(cout, 64)
    shared = _filters(window, cin, cout, block) + _align(batch) + _align(chunks * cout * 4)
    worker = _chunk(window, block)
    workers = _workers(chunks, worker, cpu_budget(window) - shared)
    return Plan(shared + workers * worker, {"channel_block": block, "workers": workers})


def submanifold_backward(
    window: Window, batch: int, groups: int, cin: int, cout: int, slots: int, weights: int
) -> Plan:
    """Tasks are a fixed number of runs of chunks for each group."""
    units = batch // groups * _ceil(slots, _CHUNK)
    block = min(cout, 64)
    parts = _parts(units, groups * weights * 4, cpu_budget(window))
    shared = (
        _filters(window, cin, cout, block) + _align(batch) + _align(groups * parts * weights * 4)
    )
    rows = _ceil(cout, block) * cin * window.taps * block * 4
    worker = _chunk(window, block) + _align(_CHUNK * cin * 4) + _align(rows)
    workers = _workers(groups * parts, worker, cpu_budget(window) - shared)
    attributes = {"channel_block": block, "parts": parts, "workers": workers}
    return Plan(shared + workers * worker, attributes)


def pool(cells: Window, segments: int, capacity: int, itemsize: int) -> Plan:
    """Tasks are segments, each over all slabs."""
    overflow = max(64, min(capacity, 1 << 14))
    output_row = cells.output_sites // cells.output_shape[0]
    rows = _slab_rows(cells.output_shape[0], output_row * 8)
    sites = rows * output_row
    worker = 2 * _align(sites * 4) + _bitmap(sites)
    worker += _align(overflow * 4) + _align(overflow * itemsize)
    workers = _workers(segments, worker, cpu_budget(cells))
    return Plan(workers * worker, {"slab_rows": rows, "overflow": overflow, "workers": workers})


def from_dense(batch: int, channels: int, capacity: int, itemsize: int) -> Plan:
    """Tasks are (sample, block of channels)."""
    overflow = max(64, min(capacity, 1 << 14))
    block = min(channels, 16)
    worker = (
        _align(block * _TOP_K) + _align(block * overflow * 4) + _align(block * overflow * itemsize)
    )
    workers = _workers(batch * _ceil(channels, block), worker, _CPU_BUDGET)
    attributes = {"channel_block": block, "overflow": overflow, "workers": workers}
    return Plan(workers * worker, attributes)


def cpu_budget(window: Window) -> int:
    """Bytes that a CPU workspace may take."""
    return max(8 * max(window.input_sites, window.output_sites), _CPU_BUDGET)


def _parts(units: int, weights_bytes: int, budget: int) -> int:
    """Into how many partial sums of the weights the units go."""
    return max(1, min(units, _CPU_WORKERS, budget // 8 // weights_bytes))


def _chunk(window: Window, block: int) -> int:
    rank = len(window.input_shape)
    return _align(_CHUNK * rank * 4) + _align(_CHUNK * 4) + _align(_CHUNK * block * 4)


def _workers(tasks: int, worker: int, budget: int) -> int:
    return max(1, min(tasks, _CPU_WORKERS, budget // max(worker, 1)))


def _slab_rows(rows: int, row_bytes: int) -> int:
    return max(1, min(rows, _CPU_SLAB // row_bytes))


def _slab(sites: int, block: int) -> int:
    return _align(sites * block * 4) + _bitmap(sites)


def _bitmap(sites: int) -> int:
    return _align(_ceil(sites, 64) * 8)


def _filters(window: Window, in_channels: int, out_channels: int, block: int) -> int:
    rows = _ceil(out_channels, block) * in_channels * window.taps
    return _align(rows * block * 4) + _align(rows) + _align(window.taps * _TAP_OFFSETS * 4)


def _align(size: int) -> int:
    return -(-size // 64) * 64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
