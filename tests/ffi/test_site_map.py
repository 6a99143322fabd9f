"""Site maps: what a window reads, against NumPy loops, and layers that share one."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import samples
from ilajax import ffi
from ilajax.ffi import plans, registry, routes
from ilajax.geometry import Window, conv_transpose_window, conv_window

pytestmark = pytest.mark.skipif(
    samples.platform() != "cpu" or not routes.native_platforms(), reason="are the CPU's"
)

WINDOWS = {
    "1d": conv_window((70,), (3,)),
    "1d-two-groups": conv_window((70,), (5,)),
    "1d-dilated": conv_window((70,), (4,), dilation=3),
    "2d": conv_window((9, 70), (3, 3)),
    "2d-1x1": conv_window((5, 6), (1, 1)),
    "2d-above-the-grid": conv_window((3, 3), (5, 7)),
    "2d-pads": conv_window((5, 6), (3, 4), padding=((2, 0), (-1, 3))),
    "2d-strided": conv_window((9, 10), (3, 3), strides=2),
    "2d-transposed": conv_transpose_window((5, 6), (3, 2), strides=(2, 1)),
    "3d": conv_window((4, 5, 6), (3, 3, 3)),
    "3d-idle-axes": conv_window((1, 40, 1), (1, 3, 1)),
    "4d": conv_window((2, 3, 2, 3), (2, 1, 3, 2)),
}


def groups(window: Window) -> list[list[int]]:
    """The taps of each word: up to three neighbours along the last axis that has more than one site."""
    axis = max([a for a, size in enumerate(window.input_shape) if size > 1], default=0)
    taps = np.arange(window.taps).reshape(window.window_shape)
    lines = np.moveaxis(taps, axis, -1).reshape(-1, window.window_shape[axis])
    size = 1 if window.dilation[axis] > 1 else 3
    return [list(line[i : i + size]) for line in lines for i in range(0, len(line), size)]


@pytest.mark.parametrize("name", WINDOWS)
def test_loops(name):
    """Catches a wrong slot or bit in any dimension, window, stride and dilation, and at padding."""
    window = WINDOWS[name]
    grids = (window.input_shape, window.output_shape)
    keys, out_keys = (
        samples.tensor(seed, 3, 1, grid, capacity=np.prod(grid) // 2 + 1, shared=True).keys
        for seed, grid in enumerate(grids)
    )
    words = groups(window)
    found = jax.jit(lambda *o: ffi.SiteMap(window, 0, 1).find("cpu", o, len(words)))(keys, out_keys)
    assert found.shape == (3, len(words), out_keys.shape[2])
    found, keys = np.asarray(found), np.asarray(keys)
    reads = np.stack([window.input_keys(out_keys[:, 0], tap) for tap in range(window.taps)], 1)
    for item, slot in itertools.product(range(3), range(out_keys.shape[2])):
        slots = {int(key): n for n, key in enumerate(keys[item, 0]) if key < window.input_sites}
        for word, taps in zip(found[item, :, slot], words, strict=True):
            want = [slots.get(int(reads[item, tap, slot])) for tap in taps]
            got = [None] * len(taps)
            for place, tap in enumerate(t for t in range(len(taps)) if word >> t & 1):
                got[tap] = (word >> 3) + place
            assert got == want


def layer(x, kernel, **options):
    return ilajax.conv(x, kernel, **{"support": "input"} | options).features


def network(x, weights, kernel):
    """Three submanifold layers on one support, one of them with another window, and one strided layer."""
    first, second, third, down = (dataclasses.replace(kernel, values=w) for w in weights)
    y = layer(layer(x, first), second).map(jnp.tanh)
    y = layer(y, third, kernel_dilation=2)
    return (
        layer(y, down, support=y, strides=1).values.sum()
        + ilajax.conv(y, down, strides=2, select_by="site", capacity=9).features.values.sum()
    )


def calls(program, *operands):
    """How often each target is called by the compiled program."""
    text = program.lower(*operands).compile().as_text()
    found = re.findall(r'custom_call_target="ilajax_(\w+)"', text)
    return {target: found.count(target) for target in set(found)}


def test_layers_share_it():
    """Catches maps that XLA does not see are the same, forward and in the gradient."""
    x = samples.tensor(0, 2, 16, (9, 10), capacity=40, shared=True)
    kernel = samples.kernel(0, (3, 3), 16, 16)
    weights = [kernel.values * n for n in range(1, 5)]
    both = jax.jit(jax.grad(lambda w, x: network(x, w, kernel)))
    counts = calls(both, weights, x)
    assert counts["submanifold_fwd"] == counts["submanifold_bwd"] == 3
    assert counts["site_map_fwd"] == 2  # one for each dilation


def test_where_a_layer_takes_none():
    """Catches a map between two grids, which is used once, and one larger than the layer's values."""
    x = samples.tensor(0, 2, 16, (4, 4, 4), capacity=40, shared=True)
    wide, narrow = samples.kernel(0, (5, 5, 5), 16, 24), samples.kernel(0, (3, 3, 3), 16, 24)
    strided = functools.partial(layer, strides=2, support=ilajax.max_pool(x, 2))
    for function, kernel, maps in ((layer, narrow, 1), (layer, wide, 0), (strided, narrow, 0)):
        assert calls(jax.jit(function), x, kernel).get("site_map_fwd", 0) == maps


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("window", [(3, 3), (5, 4), (1, 1)])
@pytest.mark.parametrize("support", ["input", "given"])
def test_the_same_bits(support, window, dtype):
    """Catches pairs that come in another order, or get lost, where they are read from a map."""
    x = samples.tensor(1, 3, 17, (30, 40), capacity=700, shared=True, dtype=dtype, exact=False)
    given = samples.tensor(2, 3, 1, (30, 40), capacity=650, shared=True)
    kernel = samples.kernel(1, window, 17, 24, dtype=dtype, exact=False)
    on = "input" if support == "input" else given

    def both(values, weights, site_maps):
        def forward(values, weights):
            filter_ = dataclasses.replace(kernel, values=weights)
            return layer(x.with_values(values), filter_, support=on).values

        with plans.tuned("cpu", site_maps=site_maps):
            y, pull = jax.vjp(forward, values, weights)
            return y, pull(jnp.cos(y))

    without, with_map = (
        jax.jit(functools.partial(both, site_maps=n))(x.values, kernel.values) for n in (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, without, with_map)


def test_vmap_and_scan():
    """Catches a map that does not follow a mapped axis, or a loop's."""
    x = samples.tensor(3, 4, 9, (9, 10), capacity=40, shared=True)
    kernel = samples.kernel(3, (3, 3), 9, 9)
    want = layer(layer(x, kernel), kernel).values
    split = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), x)
    mapped = jax.jit(jax.vmap(lambda x: layer(layer(x, kernel), kernel).values))(split)
    np.testing.assert_array_equal(mapped.reshape(want.shape), want)
    looped, _ = jax.lax.scan(lambda x, _: (layer(x, kernel), None), x, length=2)
    np.testing.assert_array_equal(looped.values, want)


def test_a_support_that_no_map_has_bits_for():
    """Catches slots that run over into the bits of taps."""
    slots, window = 2**29 + 1, conv_window((2**30,), (3,))
    keys, values = ((1, n, slots) for n in (1, 9))
    shapes = (keys, values, (9,), (9,), (9,), (0, 0, 0), values, (1, 9))
    arrays = [ffi.result(shape, jnp.float32) for shape in shapes]
    with pytest.raises(ValueError, match=r"more than 2\^29 slots"):
        plans.plan("cpu", "ilajax_submanifold_fwd", arrays, jnp.float32, 1, 1, window)


def test_another_map_is_refused():
    """Catches a handler that reads a map of other sizes than its plan's."""
    x = samples.tensor(0, 2, 16, (9, 10), capacity=40, shared=True)
    kernel = samples.kernel(0, (3, 3), 16, 16)
    find = ffi.SiteMap.find
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ffi.SiteMap, "find", lambda *a: find(*a)[:, :-1])
        with pytest.raises(jax.errors.JaxRuntimeError, match="the plan does not fit the shapes"):
            jax.block_until_ready(jax.jit(layer)(x, kernel).values)
    assert registry.extensions["cpu"].targets >= {"ilajax_site_map_fwd"}
