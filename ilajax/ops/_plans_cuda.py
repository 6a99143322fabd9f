"""How the CUDA kernels cut their work, chosen from static shapes at trace time.

The workspace is bound by max(8 * sites, 256 MiB), where sites is one grid, whatever the batch. Where the
whole batch does not fit, it goes in chunks of items; where one item does not fit, in slabs of rows of the
leading axis. The sizes below are those that the kernels carve out of it, in the same order.

Some shapes are beyond a kernel on a device: the functions named `_limit` say so beforehand, by the conditions
under which its handler returns an error. Of the other ops (`_plans_cuda_ops`) none has such a limit.
"""

from ilajax.geometry import Window
from ilajax.ops._plans import Plan, is_known, planned

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
_MAP_CHUNK = 8192  # sites of a block that builds a site map
_ZEROS = 4096  # words of a block that zeroes
_STATIC_SHARED = 2 << 10  # bytes that a kernel of dynamic shared memory has besides, at most
_SHARED_ANYWHERE = 99 << 10  # what a block may have on every device
_MOST = 2**31 - 1


def budget(window: Window) -> int:
    """Bytes that a workspace may take."""
    return max(8 * max(window.input_sites, window.output_sites), _BUDGET)


def conv_forward(
    window: Window, batch: int, in_channels: int, slots: int, out_channels: int, capacity: int
) -> Plan:
    """Blocks are (item, block of output channels, tile of output sites)."""
    most = budget(window)
    batch = max(planned(batch), 1)
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
    all_items, open_batch = batch, not (is_known(batch) and is_known(groups))
    if not open_batch:
        all_items = max(batch, groups)
    group_items = planned(all_items // groups)
    batch = planned(groups) * group_items
    width = _ceil(out_channels, _BLOCK) * _BLOCK
    row_sums = window.taps * width * 4
    copies = 1 if _sums_in_shared(window, out_channels) else _GRADIENT_WARPS
    part_bytes = in_channels * copies * row_sums
    all_rows = window.input_shape[0]
    filters = _filters(window, in_channels, out_channels)
    bias_item = 4 * out_channels * _ceil(capacity, _BIAS_STRIP)
    sums = max(most // 8, part_bytes)

    def size(items: int, rows: int, parts: int, batch: int = batch) -> int:
        slabs = _ceil(all_rows, rows)
        reach = _reach(window, rows) if slabs > 1 else window.output_shape[0]
        return (
            filters
            + _align(batch * bias_item)
            + _site_map(items, out_channels, capacity, reach * _row(window.output_shape))
            + _align(slabs * parts * part_bytes)
        )

    rows = all_rows
    while rows > 1 and size(1, rows, 1) > most // 2:
        rows = _ceil(rows, 2)
    slabs = _ceil(all_rows, rows)
    # Items share their sums where those of each would not fit; where there are few, each has parts. Of an
    # open batch each has its own, since no number divides it for certain.
    span = 1
    while (
        not open_batch
        and span < group_items
        and (group_items % span or slabs * (batch // span) * part_bytes > sums)
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
    return Plan(size(items, rows, all_items // span * parts, all_items), attributes)


def conv_forward_limit(
    window: Window,
    batch: int,
    in_channels: int,
    slots: int,
    out_channels: int,
    capacity: int,
    max_shared: int,
) -> str | None:
    """Why the kernel cannot do this where a block may have `max_shared` bytes, or None where it can."""
    plan = conv_forward(window, batch, in_channels, slots, out_channels, capacity)
    items, rows, tile = (plan.attributes[name] for name in ("chunk_items", "slab_rows", "tile"))
    blocks, groups = _ceil(out_channels, _BLOCK), _ceil(in_channels, _GROUP)
    histograms = _BLOCK * (_BINS // 2 + 4) * 4
    tile_bytes = tile // 32 * 8 + tile * 2
    return (
        _count_limit(window, batch, in_channels, slots, out_channels, capacity)
        or _shared_limit(_tap_table(window, groups) + histograms + tile_bytes, max_shared)
        or _grid_limit(items * blocks * _ceil(rows * _row(window.output_shape), tile))
        or _grid_limit(
            items * groups * _ceil(_reads(window, rows), _MAP_CHUNK)
            + blocks * in_channels
            + _ceil(plan.workspace, 4 * _ZEROS)  # no more than all of it is zeroed
        )
    )


def conv_backward_limit(
    window: Window,
    batch: int,
    groups: int,
    in_channels: int,
    slots: int,
    out_channels: int,
    capacity: int,
    max_shared: int,
) -> str | None:
    """Why the gradient's kernel cannot do this, or None where it can; as `conv_forward_limit`."""
    plan = conv_backward(window, batch, groups, in_channels, slots, out_channels, capacity)
    items, span, parts = (plan.attributes[name] for name in ("chunk_items", "span", "parts"))
    blocks = _ceil(out_channels, _BLOCK)
    sums = window.taps * blocks * _BLOCK * _GRADIENT_WARPS
    shared = _tap_table(window, _ceil(blocks, 32))
    if _sums_in_shared(window, out_channels):
        shared += 4 * sums
    return (
        _count_limit(window, batch, in_channels, slots, out_channels, capacity)
        or (f"{sums} sums of weights are 2^31 or more" if sums > _MOST else None)
        or _shared_limit(shared, max_shared)
        or _grid_limit(
            items // span * parts * in_channels
            + items * out_channels * _ceil(capacity, _BIAS_STRIP)
        )
        or _grid_limit(
            items * _ceil(out_channels, _GROUP) * _ceil(window.output_sites, _MAP_CHUNK)
            + blocks * in_channels
        )
    )


def _count_limit(
    window: Window, batch: int, in_channels: int, slots: int, out_channels: int, capacity: int
) -> str | None:
    if _GROUP * max(slots, capacity) > _MOST:
        return f"{max(slots, capacity)} slots of a channel are 2^26 or more"
    if planned(batch) * max(in_channels, out_channels) > _MOST:
        return f"a batch of {batch} has 2^31 channels or more"
    if window.taps > 1 << 24:
        return f"a window of {window.taps} taps has more than 2^24"
    if window.taps * in_channels * out_channels > _MOST:
        return "a kernel has 2^31 weights or more"
    return None


def _shared_limit(dynamic: int, max_shared: int) -> str | None:
    needed = dynamic + _STATIC_SHARED
    if needed <= max_shared:
        return None
    return (
        f"needs {_ceil(needed, 1024)} KB of shared memory, the device has {max_shared // 1024} KB"
    )


def _grid_limit(blocks: int) -> str | None:
    return f"needs {blocks} blocks, a launch has at most 2^31 - 1" if blocks > _MOST else None


def _tap_table(window: Window, groups: int) -> int:
    """Bytes of a block's list of live taps (TapList in axes.cuh): for 3 axes, or for 8."""
    entry = 32 if len(window.input_shape) <= 3 else 48
    return window.taps * entry + _ceil(window.taps * groups, 4) * 16


def _sums_in_shared(window: Window, out_channels: int) -> bool:
    """Whether the sums of the weights' gradient fit beside the taps on every device."""
    blocks = _ceil(out_channels, _BLOCK)
    sums = window.taps * blocks * _BLOCK * _GRADIENT_WARPS * 4
    return _tap_table(window, _ceil(blocks, 32)) + sums <= _SHARED_ANYWHERE - _STATIC_SHARED


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
