"""How the CUDA kernels cut their work, chosen from static shapes at trace time.

The workspace is bound by max(8 * sites, 256 MiB), where sites is one grid, whatever the batch. Where the
whole batch does not fit, it goes in chunks of items; where one item does not fit, in slabs of rows of the
leading axis. The sizes below are those that the kernels carve out of it, in the same order.
"""

from ilajax.geometry import Window
from ilajax.ops._plans import Plan

_BUDGET = 256 << 20
_GROUP = 32  # channels of a site map's mask
_BLOCK = 8  # output channels of a block
_MAX_TILE = 8192  # output sites of a block
_MIN_TILE = 512
_TILE_WARPS = 8
_BLOCKS = 528  # blocks that fill a large GPU: 4 for each of 132 multiprocessors
_BINS = 2048
_TILES_OF_RUN = 64
_STRIP = 256  # stored entries of a block of the gradient kernel
_BIAS_STRIP = 8192
_GRADIENT_WARPS = 4
_MAX_SUMS = 96 << 10


def budget(window: Window) -> int:
    """Bytes that a workspace may take."""
    return max(8 * max(window.input_sites, window.output_sites), _BUDGET)


def conv_forward(
    window: Window, batch: int, in_channels: int, slots: int, out_channels: int, capacity: int
) -> Plan:
    """Blocks are (item, block of output channels, tile of output sites)."""
    most = budget(window)
    batch = max(batch, 1)
    blocks = _ceil(out_channels, _BLOCK)
    all_rows, row = window.output_shape[0], _row(window.output_shape)
    tile = _MAX_TILE
    while tile > _MIN_TILE and batch * blocks * _ceil(window.output_sites, tile) < _BLOCKS:
        tile //= 2
    filters = _filters(window, in_channels, out_channels)

    def size(items: int, rows: int, pool: int) -> int:
        slabs = _ceil(all_rows, rows)
        last = all_rows - (slabs - 1) * rows
        tiles = (slabs - 1) * _ceil(rows * row, tile) + _ceil(last * row, tile)
        runs = _ceil(tiles, _TILES_OF_RUN)
        return (
            filters
            + _site_map(items, in_channels, slots, _reads(window, rows))
            + sum(
                _align(4 * words)
                for words in (
                    items * out_channels * _BINS,
                    items * out_channels * 4,
                    items * blocks,
                    1,
                    1,
                    items * out_channels * runs * 3,
                    items * blocks * runs,
                    items * blocks * tiles,
                    items * out_channels * tiles * 3,
                    items * blocks * tiles * _TILE_WARPS * _BLOCK // 2,
                    items * blocks * tiles * 2,
                    pool,
                    pool * _BLOCK,
                )
            )
        )

    # Half for the maps of as many items as fit, and slabs where one does not; the rest for the pool.
    rows = all_rows
    while rows > 1 and size(1, rows, 0) > most // 2:
        rows = _ceil(rows, 2)
    items = 1
    if rows == all_rows:
        items = max(1, min(batch, most // 2 // size(1, rows, 0)))
        items = _ceil(batch, _ceil(batch, items))  # chunks of one size
    # No site is out of reach of more entries than there are.
    sites = min(window.output_sites, in_channels * slots * window.taps)
    room = (most - size(items, rows, 0) - 256) // (4 + 4 * _BLOCK)
    pool = max(0, min(items * blocks * sites, room, 2**31 - 1))
    attributes = {"chunk_items": items, "slab_rows": rows, "tile": tile, "pool_rows": pool}
    return Plan(size(items, rows, pool), attributes)


def conv_backward(
    window: Window,
    batch: int,
    groups: int,
    in_channels: int,
    slots: int,
    out_channels: int,
    capacity: int,
) -> Plan:
    """Blocks are (item or run of items, input channel, part of its stored entries)."""
    most = budget(window)
    batch = max(batch, groups)
    group_items = batch // groups
    width = _ceil(out_channels, _BLOCK) * _BLOCK
    row_sums = window.taps * width * 4
    copies = 1 if row_sums * _GRADIENT_WARPS <= _MAX_SUMS else _GRADIENT_WARPS
    part_bytes = in_channels * copies * row_sums
    all_rows = window.input_shape[0]
    filters = _filters(window, in_channels, out_channels)
    bias = _align(4 * batch * out_channels * _ceil(capacity, _BIAS_STRIP))
    sums = max(most // 8, part_bytes)

    def size(items: int, rows: int, parts: int) -> int:
        slabs = _ceil(all_rows, rows)
        reach = _reach(window, rows) if slabs > 1 else window.output_shape[0]
        return (
            filters
            + _site_map(items, out_channels, capacity, reach * _row(window.output_shape))
            + _align(slabs * parts * part_bytes)
            + bias
        )

    rows = all_rows
    while rows > 1 and size(1, rows, 1) > most // 2:
        rows = _ceil(rows, 2)
    slabs = _ceil(all_rows, rows)
    # Items share their sums where those of each would not fit; where there are few, each has parts.
    span = 1
    while span < group_items and (
        group_items % span or slabs * (batch // span) * part_bytes > sums
    ):
        span += 1
    parts = 1
    if span == 1:
        wanted = _ceil(2 * _BLOCKS, batch * in_channels)
        parts = max(1, min(wanted, _ceil(slots, _STRIP), sums // (slabs * batch * part_bytes)))
    items = span
    if rows == all_rows:
        fixed = size(0, rows, batch // span * parts)
        each = size(1, rows, 0) - size(0, rows, 0)
        items = max(1, min(batch // span, (most - fixed) // (each * span))) * span
    attributes = {"chunk_items": items, "slab_rows": rows, "span": span, "parts": parts}
    return Plan(size(items, rows, batch // span * parts), attributes)


def _site_map(items: int, channels: int, slots: int, sites: int) -> int:
    slots = min(slots, sites)
    words = items * _ceil(channels, _GROUP) * _ceil(sites, 32)
    return (
        _align(words * 8)
        + _align(items * channels * slots * 8)
        + _align(items * channels * slots * 4)
    )


def _filters(window: Window, in_channels: int, out_channels: int) -> int:
    rows = _ceil(out_channels, _BLOCK) * in_channels * window.taps
    return _align(rows * _BLOCK * 4) + _align(rows)


def _reads(window: Window, rows: int) -> int:
    """Input sites that output rows of the leading axis read at most."""
    extent = (window.window_shape[0] - 1) * window.dilation[0] + 1
    reads = min((rows - 1) * window.strides[0] + extent, window.input_shape[0])
    return reads * _row(window.input_shape)


def _reach(window: Window, rows: int) -> int:
    """Output rows that input rows reach at most."""
    extent = (window.window_shape[0] - 1) * window.dilation[0] + 1
    return min((rows + extent - 2) // window.strides[0] + 1, window.output_shape[0])


def _row(shape: tuple[int, ...]) -> int:
    row = 1
    for size in shape[1:]:
        row *= size
    return row


def _align(size: int) -> int:
    return -(-size // 64) * 64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
