"""How the CUDA kernels other than convolution's cut their work, from static shapes at trace time.

As `_plans`: the bytes of the workspace, in the order in which the kernels carve it, and the attributes that
they bind. The workspace is bound by max(8 * sites, 256 MiB), where sites is one grid.
"""

from ilajax.geometry import Window
from ilajax.ops._plans import Plan, is_known, planned

_BUDGET = 256 << 20
# What fills the largest GPUs several times over, so that uneven blocks even out.
_BLOCKS = 1024
# A block selects from this many entries faster than several blocks agree on a cut.
_SELECT_WHOLE = 16384
_SELECT_CHUNK = 4096  # and where there are more, no less than these for a block
_SELECT_BYTES = 4 * 256 * 4  # histograms of a segment
_SLAB = 32768  # cells of a pooling block
_TILE = 32  # channels that a thread of a submanifold convolution keeps
_STEP = 32  # sites that a block of its weights' gradient takes at a time


def select(segments: int, count: int) -> Plan:
    """k-selection and from_dense: blocks take whole segments, or chunks of long ones."""
    chunk = _chunk(segments, count)
    return Plan(max(1, _select_bytes(segments, count, chunk)), {"chunk": chunk})


def pool_forward(
    cells: Window, batch: int, channels: int, slots: int, capacity: int, itemsize: int
) -> Plan:
    """Blocks take slabs of cells; where the capacity cuts, for as many segments at a time as fit."""
    segments = planned(batch) * channels
    slabs = _ceil(cells.output_sites, _SLAB)
    most = min(slots, cells.output_sites)
    if capacity >= most:
        workspace = _align(batch * channels * slabs * 4)
        return Plan(workspace, {"segments_at_once": segments, "chunk": most})
    at_once = segments
    while True:
        chunk = _chunk(at_once, most)
        workspace = (
            _align(at_once * slabs * 4)
            + _align(at_once * most * 4)
            + _align(at_once * most * itemsize)
            + _align(_select_bytes(at_once, most, chunk))
        )
        if at_once == 1 or workspace <= budget(cells):
            return Plan(workspace, {"segments_at_once": at_once, "chunk": chunk})
        at_once = _ceil(at_once, 2)


def submanifold_forward(window: Window, cin: int, cout: int) -> Plan:
    """The filter as dense rows, for as many output channels at a time as fit."""
    block = _channel_block(window, cin, cout)
    return Plan(_filter(window, cin, block), {"channel_block": block})


def submanifold_backward(
    window: Window, batch: int, groups: int, cin: int, cout: int, slots: int
) -> Plan:
    """The transposed filter; then sums of the weights over a fixed number of runs of sites."""
    in_block = _channel_block(window, cout, cin)
    row = planned(groups) * window.taps * cin * 4
    out_block = max(1, min(cout, budget(window) // (2 * row)))
    units = planned(batch // groups) * _ceil(slots, _STEP)
    tiles = window.taps * _ceil(cin, 16) * _ceil(out_block, 16)
    parts = max(
        1, min(units, _ceil(_BLOCKS, planned(groups) * tiles), budget(window) // (row * out_block))
    )
    filters, sums = _filter(window, cout, in_block), window.taps * cin * 4 * out_block * parts
    # Which of the two is the larger cannot be said of open groups.
    larger = (
        max(filters, _align(groups * sums)) if is_known(groups) else filters + _align(groups * sums)
    )
    return Plan(larger, {"in_block": in_block, "out_block": out_block, "parts": parts})


def budget(window: Window) -> int:
    """Bytes that a workspace may take."""
    return max(8 * max(window.input_sites, window.output_sites), _BUDGET)


def _chunk(segments: int, count: int) -> int:
    segments = planned(segments)
    if segments * 2 >= _BLOCKS or count <= _SELECT_WHOLE:
        return count
    return _ceil(count, min(_ceil(count, _SELECT_CHUNK), _ceil(_BLOCKS, segments)))


def _select_bytes(segments: int, count: int, chunk: int) -> int:
    if chunk >= count:
        return 0
    return _align(segments * _SELECT_BYTES) + _align(segments * _ceil(count, chunk) * 8)


def _channel_block(window: Window, rows: int, columns: int) -> int:
    block = _ceil(columns, _TILE) * _TILE
    while block > _TILE and _filter(window, rows, block) > budget(window):
        block = _ceil(block, 2 * _TILE) * _TILE
    return block


def _filter(window: Window, rows: int, block: int) -> int:
    count = window.taps * rows
    return _align(count * block * 4) + _align(count * _ceil(block, 8))


def _align(size: int) -> int:
    return -(-size // 64) * 64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
