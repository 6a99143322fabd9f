"""What the CUDA kernels can do on which device. That handlers agree, tests/cuda_on_host sees."""

import json

import pytest

from experiments import frame
from ilajax.geometry import conv_window
from ilajax.ops import _plans_cuda
from ilajax.ops._plans_cuda import conv_backward_limit, conv_forward_limit

# Bytes of shared memory that a block may have: of compute capability 8.6, 8.9 and 12.0; of 8.0; of 9.0.
GAMING, A100, H100 = 99 << 10, 163 << 10, 227 << 10


def forward(shape, grid=(256,) * 3, batch=1, cin=1, slots=1 << 20, cout=8, capacity=1 << 20):
    """The limit as a function of the device's shared memory."""
    window = conv_window(grid, shape)
    return lambda shared: conv_forward_limit(window, batch, cin, slots, cout, capacity, shared)


def backward(
    shape, grid=(256,) * 3, batch=1, groups=1, cin=1, slots=1 << 20, cout=8, capacity=1 << 20
):
    window = conv_window(grid, shape)
    sizes = (batch, groups, cin, slots, cout, capacity)
    return lambda shared: conv_backward_limit(window, *sizes, shared)


@pytest.mark.parametrize("limit", [forward, backward])
@pytest.mark.parametrize("channels", [1, 8, 64, 256])
@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 5, 5), (7, 7, 7), (9, 9, 9)])
def test_usual_windows_run_on_every_device(limit, shape, channels):
    """Catches a limit that sends usual work to the reference."""
    assert limit(shape, cin=channels, cout=channels)(GAMING) is None


def test_large_windows_need_a_large_device():
    """Catches a limit that does not ask the device, and a reason that does not say what is missing."""
    large = forward((13, 13, 13))
    assert large(GAMING) == "needs 130 KB of shared memory, the device has 99 KB"
    assert large(A100) is None
    assert large(H100) is None
    assert backward((13, 13, 13))(GAMING) is None
    assert backward((17, 17, 17))(GAMING) == "needs 175 KB of shared memory, the device has 99 KB"
    assert "shared memory" in forward((19, 19, 19))(H100)
    assert "shared memory" in backward((23, 19, 19))(H100)
    # Lists of taps are wider above three axes.
    assert forward((1500,), (1 << 16,))(GAMING) != forward((1500, 1, 1, 1), (1 << 16, 1, 1, 1))(
        GAMING
    )


@pytest.mark.parametrize("limit", [forward, backward])
def test_counts(limit):
    """Catches a number that does not fit into the kernels' 32 bits."""
    most = (1 << 26) - 1
    grid = (1 << 27,)
    assert limit((3,), grid, slots=most)(H100) is None
    assert "2^26" in limit((3,), grid, slots=most + 1)(H100)
    assert "2^26" in limit((3,), grid, capacity=most + 1)(H100)
    assert "2^31 channels" in limit((1,), (8,), batch=1 << 28, slots=1, capacity=1)(H100)
    assert "2^31 weights" in limit((1,), (8,), cin=1 << 16, cout=1 << 15, slots=1)(H100)
    assert "taps" in limit(((1 << 24) + 1,), ((1 << 24) + 1,), slots=1, cout=1)(H100)


def test_grids():
    """Catches a launch of more blocks than CUDA takes."""
    assert _plans_cuda._grid_limit((1 << 31) - 1) is None
    assert "blocks" in _plans_cuda._grid_limit(1 << 31)


def test_static_shared_memory_is_allowed_for():
    """Catches a kernel whose static shared memory outgrows what the limits take it to have."""
    record = json.loads((frame.RESULTS / "kernel_resources.json").read_text())
    dynamic = [
        row["shared"]
        for row in record["kernels"]
        if row["kernel"].startswith(("PrepareKernel", "TileKernel", "GradientKernel"))
    ]
    assert dynamic
    assert max(dynamic) <= _plans_cuda._STATIC_SHARED
