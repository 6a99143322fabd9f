"""How a CPU kernel cuts its work, chosen from static shapes at trace time, and the workspace that takes.

The workspace is bound by max(8 * sites, 32 MiB) on the CPU, where sites is one grid, whatever the batch and
the number of threads. The sizes below are those that the kernels carve out of it, in the same order.
"""

import dataclasses

from ilajax.geometry import Window

_CPU_BUDGET = 32 << 20
# The buffer of a slab in pooling, and in convolution of a line, and the tables over the lines of a slab:
# they should stay in a core's cache.
_CPU_SLAB = 512 << 10
_CPU_LINE = 256 << 10
_CPU_TABLES = 1 << 20
# Tasks to cut a call into where the batch is small.
_CPU_TASKS = 8
# Threads that share a workspace. More threads than this take no part in one call.
_CPU_WORKERS = 16
# The dense form of convolution: what a worker lays out at once, and the grids it may pay on.
_CPU_DENSE = 1 << 20
_CPU_DENSE_SHARE = 32  # a channel stores at least one in so many sites
_CPU_DENSE_PERCENT = 65  # what it may cost of the other form's cost, see experiments.dense_form
_LIVE_TAP = 12  # sizeof(LiveTap)
_SEGMENT = 32  # sizeof(Segment)
_TAP_LINE = 48  # sizeof(TapLine)
_MAX_RANK = 8
_TOP_K = 96  # an upper bound of sizeof(RunningTopK)
_DIGITS = 2048  # first digits that a selection counts ranks by


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes of a workspace, and the attributes that tell the kernel how to use it."""

    workspace: int
    attributes: dict[str, int]


# Samples that a plan reckons with where the batch is left open: as many as keep every thread busy.
_OPEN_BATCH = 64


def planned(size: int) -> int:
    """The size that attributes are chosen for: the size itself, or a guess where `jax.export` leaves it open.

    A kernel does any batch with any plan, since what it cuts are tasks or chunks. Only a workspace that
    grows with the batch is reckoned with the size itself, as an expression that is known once it runs.
    """
    return size if is_known(size) else _OPEN_BATCH


def is_known(size: int) -> bool:
    """Whether a dimension is a number, and not a symbol of `jax.export`."""
    return isinstance(size, int)


def conv_forward(
    window: Window,
    batch: int,
    in_channels: int,
    out_channels: int,
    slots: int,
    capacity: int,
    itemsize: int,
    weights: int,
) -> Plan:
    """Tasks are (sample, block of output channels, part of the rows), each over all lines of its part.

    With more than one part each selects for itself, and what it keeps is merged at the end.
    """
    batch, budget = planned(batch), cpu_budget(window)
    sums = _Sums(window, in_channels, out_channels, slots, weights)
    lines, block, blocks = sums.lines, sums.block, sums.blocks
    shared = sums.shared + _align(blocks * block * 4)
    worker = sums.worker + 3 * _align(block * 4) + _align(block * _TOP_K)
    # Half of the stage takes in a whole line at once. With one part, a stage twice as large as the output
    # mostly takes in all; with several an early look at the others' counts keeps the lists short.
    least = 2 * (min(lines.line_sites, lines.output_length) + 1)
    tasks = batch * blocks
    parts = lines.parts(tasks)
    while parts > 1:
        kept = min(capacity, _ceil(lines.rows, parts) * lines.row_sites)
        segments = batch * out_channels * parts
        selections = (
            _align(segments * kept * 4)
            + _align(segments * kept * itemsize)
            + 2 * _align(segments * 4)
            + _align(batch * out_channels * _DIGITS * 4)
        )
        if selections <= (budget - shared) // 2:
            break
        parts -= 1
    if parts > 1:
        shared += selections
        stage = _stage(max(least, min(capacity, 1 << 11)))
    else:
        most = (budget - shared) // 4 // (block * 8)
        stage = _stage(max(least, min(max(2 * capacity, 1 << 10), 1 << 16, most)))
        worker += _align(block * _DIGITS * 4)
    worker += _align(block * stage * 8)
    workers = _workers(tasks * parts, worker, budget - shared)
    attributes = {"stage": stage, "parts": parts, "workers": workers}
    return Plan(shared + workers * worker, sums.attributes | attributes)


class _Sums:
    """What xla_kernels/conv_sums.h needs, of conv and of the submanifold convolution.

    Attributes:
      lines: the grid as lines.
      block, blocks: of the output channels.
      shared: bytes that all workers share.
      worker: bytes of each.
      attributes: of the plan.
    """

    def __init__(
        self, window: Window, in_channels: int, out_channels: int, slots: int, weights: int
    ):
        budget = cpu_budget(window)
        self.block, self.blocks = _blocks(out_channels)
        self.lines = lines = _Lines(window, self.block)
        self.shared = _filters(window, in_channels, self.blocks, self.block)
        self.shared += lines.tap_tables(self.blocks)
        room = _entries_room(lines, in_channels, slots, budget)
        live_taps = _live_taps(out_channels, lines, weights)
        dense_rows = 0
        if lines.may_be_dense(slots) and live_taps <= budget // 16:
            dense_line = in_channels * lines.dense_pitch
            dense_rows = lines.rows_within(lines.max_rows, _CPU_DENSE // 4 // dense_line)
            if dense_rows > 0:
                room = max(room, _ceil(lines.read_lines(dense_rows) * dense_line, 4))
                self.shared += live_taps
        self.worker = (
            _align(lines.line_sites * self.block * 4)
            + _bitmap(lines.line_sites)
            + _align(lines.tap_lines * _SEGMENT)
            + _align((lines.taps + 1) * lines.words * 8)
            + lines.tables(lines.max_rows)
            + _align(room * 16)
            + _align(lines.tap_lines * 8)
            + (_align(lines.read_lines(dense_rows)) if dense_rows else 0)
        )
        self.attributes = {
            "channel_block": self.block,
            "line_sites": lines.line_sites,
            "max_rows": lines.max_rows,
            "dense_rows": dense_rows,
            "dense_percent": _CPU_DENSE_PERCENT,
            "room": room,
        }


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
    block, blocks = _blocks(out_channels)
    lines = _Lines(window, block)
    # As many slabs as make a few tasks for every thread: each looks at the cotangents within its reach.
    items = planned(batch // groups)
    slabs = min(_ceil(_CPU_TASKS, items), lines.input_rows)
    slab_rows = _ceil(lines.input_rows, slabs)
    room = _entries_room(lines, in_channels, slots, budget)
    worker = (
        _align(lines.line_sites * block * 4)
        + _bitmap(lines.line_sites)
        + _align(lines.tap_lines * _SEGMENT)
        + lines.slab_tables(slab_rows)
        + _align(room * 24)
        + 2 * _align(block * 4)
        + _align(blocks * in_channels * window.taps * block * 4)
    )
    shared = _filters(window, in_channels, blocks, block) + lines.tap_tables(blocks)
    transposed = _Lines(_transposed(window), block)
    live_taps = _live_taps(in_channels, transposed, weights)
    dense_rows = 0
    if lines.may_be_dense(slots) and set(window.strides) == {1} and live_taps <= budget // 16:
        dense_line = out_channels * transposed.dense_pitch
        dense_rows = transposed.rows_within(slab_rows, _CPU_DENSE // 4 // dense_line)
        if dense_rows > 0:
            shared += live_taps
            worker += (
                _align(transposed.read_lines(dense_rows) * dense_line * 4)
                + _align(weights * 32)
                + 2 * _align(_ceil(transposed.output_length, 8) * 32)
                + _align(lines.tap_lines * 8)
                + _align(transposed.read_lines(dense_rows))
            )
    units = items * _ceil(lines.input_rows, slab_rows)
    parts = _parts(units, planned(groups) * weights * 4, budget)
    sums = parts * weights * 4
    rest = budget - shared - _align(planned(groups) * sums)
    workers = _workers(planned(groups) * parts, worker, rest)
    return Plan(
        shared + _align(groups * sums) + workers * worker,
        {
            "channel_block": block,
            "line_sites": lines.line_sites,
            "slab_rows": slab_rows,
            "dense_rows": dense_rows,
            "dense_percent": _CPU_DENSE_PERCENT,
            "room": room,
            "parts": parts,
            "workers": workers,
        },
    )


class _Lines:
    """How conv.cc sees a grid: as lines along its last axis; see xla_kernels/common/lines.h.

    Attributes:
      line_sites: sites of a line's buffer, with what taps reach past its ends.
      max_rows: output rows whose input lines are sorted at once, at most.
      dense_pitch: floats of an input line in the dense form, see xla_kernels/conv_dense.h.
    """

    def __init__(self, window: Window, block: int):
        axes = [
            axis
            for axis in zip(
                window.input_shape,
                window.window_shape,
                window.strides,
                window.dilation,
                window.low,
                window.output_shape,
                strict=True,
            )
            if not (axis[0] == axis[1] == axis[5] == 1 and axis[4] == 0)
        ] or [(1, 1, 1, 1, 0, 1)]
        size, taps, stride, dilation, low, length = axes[-1]
        self.output_length = length
        self._length = size
        self.taps, self.tap_lines = taps, window.taps // taps
        lead = axes[:-1]
        self.rows: int = lead[0][5] if lead else 1
        self.input_rows: int = lead[0][0] if lead else 1
        self.row_sites = window.output_sites // self.rows
        self.input_row_lines = window.input_sites // size // self.input_rows
        self.extent = (lead[0][1] - 1) * lead[0][3] + 1 if lead else 1
        self._stride = lead[0][2] if lead else 1
        most = max(1, _CPU_LINE // (block * 4))
        around = max((taps - 1) * dilation - low, 0) + max(size + low - length, 0)
        self.line_sites = length + around if stride == 1 else length
        if self.line_sites > most:
            self.line_sites = min(length, most)
        self.max_rows = self.rows
        self._plain = stride == 1 and self.line_sites == length + around
        # Only plain lines have bitmaps.
        self.words = _ceil(size, 64) if self._plain else 0
        while self.max_rows > 1 and self.tables(self.max_rows) > _CPU_TABLES:
            self.max_rows = _ceil(self.max_rows, 2)
        self._input_sites = window.input_sites
        before = max(low, 0)
        read = before - low + _ceil(length, 8) * 8 + (taps - 1) * dilation
        self.dense_pitch = _ceil(max(before + size, read), 8) * 8

    def parts(self, tasks: int) -> int:
        """Into how many parts the output rows go, to make a few tasks for every thread."""
        return 1 if tasks >= _CPU_TASKS // 2 else min(_ceil(_CPU_TASKS, tasks), self.rows)

    def may_be_dense(self, slots: int) -> bool:
        """Whether the dense form can be used, and entries are not too rare for it."""
        return self._plain and slots * _CPU_DENSE_SHARE >= self._input_sites

    def read_lines(self, output_rows: int) -> int:
        """Input lines that so many output rows read, at most."""
        rows = min((output_rows - 1) * self._stride + self.extent, self.input_rows)
        return rows * self.input_row_lines

    def rows_within(self, output_rows: int, lines: int) -> int:
        """Of `output_rows`, how many read no more than so many lines."""
        rows = (lines // self.input_row_lines - self.extent) // self._stride + 1
        if self.read_lines(output_rows) <= lines:
            return output_rows
        return max(0, min(output_rows, rows))

    def tables(self, output_rows: int) -> int:
        """Bytes of the tables over the input lines of so many output rows."""
        return self.slab_tables(self.read_lines(output_rows) // self.input_row_lines)

    def tap_tables(self, blocks: int) -> int:
        return _align(blocks * self.tap_lines * _TAP_LINE) + _align(blocks * 8)

    def slab_tables(self, input_rows: int) -> int:
        """Bytes of the tables over the lines of so many input rows."""
        lines = input_rows * self.input_row_lines
        words = lines * self._length // 64 + 2 if self._plain else 0
        return _align((lines + 2) * 4) + _align(words * 8) + _align(words * 4)


def _stage(entries: int) -> int:
    # The channels' stages fill at the same pace: an odd number of cache lines between them keeps them from
    # sharing one set of the cache.
    return _ceil(entries, 512) * 512 + 40


def _entries_room(lines: _Lines, in_channels: int, slots: int, budget: int) -> int:
    """Entries that are sorted at once: those of a few rows if they are spread over the grid."""
    rows = in_channels * _ceil(slots, lines.input_rows) * 4 * lines.extent
    return min(in_channels * slots, max(1 << 17, min(rows, budget // 64)))


def _live_taps(targets: int, lines: _Lines, weights: int) -> int:
    return (
        _align((targets * lines.tap_lines + 2) * 4)
        + _align(weights * _LIVE_TAP)
        + _align(lines.tap_lines * 4)
    )


def _transposed(window: Window) -> Window:
    """The window of the gradient of the values, for strides of 1."""
    return dataclasses.replace(
        window,
        input_shape=window.output_shape,
        output_shape=window.input_shape,
        low=tuple(
            (taps - 1) * dilation - low
            for taps, dilation, low in zip(
                window.window_shape, window.dilation, window.low, strict=True
            )
        ),
    )


def _blocks(out_channels: int) -> tuple[int, int]:
    """The width of a block of output channels, a multiple of 8 up to 32, and how many there are."""
    blocks = _ceil(out_channels, 32)
    block = _ceil(_ceil(out_channels, blocks), 8) * 8
    return block, _ceil(out_channels, block)


def submanifold_forward(
    window: Window, batch: int, in_channels: int, out_channels: int, slots: int, weights: int
) -> Plan:
    """Tasks are (sample, block of output channels, part of the rows), as in conv."""
    sums = _Sums(window, in_channels, out_channels, slots, weights)
    tasks = planned(batch) * sums.blocks
    parts = sums.lines.parts(tasks)
    counts = parts * out_channels * 4
    rest = cpu_budget(window) - sums.shared - _align(planned(batch) * counts)
    workers = _workers(tasks * parts, sums.worker, rest)
    attributes = {"parts": parts, "workers": workers}
    workspace = sums.shared + _align(batch * counts) + workers * sums.worker
    return Plan(workspace, sums.attributes | attributes)


# The gradient is that of a conv that kept the input's sites.
submanifold_backward = conv_backward


def pool(cells: Window, segments: int, capacity: int, itemsize: int) -> Plan:
    """Tasks are segments, each over all slabs."""
    stage = max(64, min(capacity, 1 << 14))
    output_row = cells.output_sites // cells.output_shape[0]
    rows = _slab_rows(cells.output_shape[0], output_row * 8)
    sites = rows * output_row
    worker = 2 * _align(sites * 4) + _bitmap(sites)
    worker += _align(stage * 8) + _align(_DIGITS * 4)
    workers = _workers(planned(segments), worker, cpu_budget(cells))
    return Plan(workers * worker, {"slab_rows": rows, "room": stage, "workers": workers})


def from_dense(batch: int, channels: int, capacity: int, itemsize: int) -> Plan:
    """Tasks are (sample, block of channels)."""
    stage = max(64, min(capacity, 1 << 14))
    block = min(channels, 16)
    worker = _align(block * _TOP_K) + _align(block * stage * 8) + _align(block * _DIGITS * 4)
    workers = _workers(planned(batch) * _ceil(channels, block), worker, _CPU_BUDGET)
    attributes = {"channel_block": block, "room": stage, "workers": workers}
    return Plan(workers * worker, attributes)


def cpu_budget(window: Window) -> int:
    """Bytes that a CPU workspace may take."""
    return max(8 * max(window.input_sites, window.output_sites), _CPU_BUDGET)


def _parts(units: int, weights_bytes: int, budget: int) -> int:
    """Into how many partial sums of the weights the units go."""
    return max(1, min(units, _CPU_WORKERS, budget // 8 // weights_bytes))


def _workers(tasks: int, worker: int, budget: int) -> int:
    return max(1, min(tasks, _CPU_WORKERS, budget // max(worker, 1)))


def _slab_rows(rows: int, row_bytes: int) -> int:
    return max(1, min(rows, _CPU_SLAB // row_bytes))


def _slab(sites: int, block: int) -> int:
    return _align(sites * block * 4) + _bitmap(sites)


def _bitmap(sites: int) -> int:
    return _align(_ceil(sites, 64) * 8)


def _filters(window: Window, in_channels: int, blocks: int, block: int) -> int:
    lines = window.taps // window.window_shape[-1]
    taps = blocks * in_channels * window.taps
    return (
        _align(taps * block * 4)
        + _align(taps)
        + _align(blocks * lines * in_channels)
        + _align(blocks * lines)
        + _align(blocks * window.taps)
        + _align(window.taps * _MAX_RANK * 4)
    )


def _align(size: int) -> int:
    return -(-size // 64) * 64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
