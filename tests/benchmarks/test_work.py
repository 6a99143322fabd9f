"""Counts of a layer's work, against loops over all pairs of an entry and a weight; small ceilings."""

import dataclasses
import itertools
from collections import defaultdict
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import work, workloads
from benchmarks.layers import Layer

BIAS = [0.1, -0.2, 0.3]
LAYERS = {
    "one channel": Layer(
        workloads.random_sites(4), workloads.kernel(1, 3), jnp.asarray(BIAS), capacity=20
    ),
    "pruned, padded, a batch": Layer(
        workloads.random_sites(4, 2, batch=2, density=0.3, capacity=25),
        workloads.kernel(2, 3, density=0.3),
        jnp.asarray(BIAS),
        capacity=15,
    ),
    "another window": Layer(
        workloads.random_sites(5, 2, batch=2),
        workloads.kernel(2, 3, density=0.5, window=(2, 1, 3)),
        jnp.asarray(BIAS),
        capacity=100,
    ),
    "shared": Layer(
        workloads.shell(6, 2, subset=None, batch=2),
        workloads.kernel(2, 3, density=0.5),
        jnp.asarray(BIAS),
        capacity=60,
    ),
    "submanifold": Layer(
        workloads.shell(6, 2, subset=None, batch=2),
        workloads.kernel(2, 3, density=0.5),
        jnp.asarray(BIAS),
        None,
        support="input",
    ),
    "half precision": Layer(
        workloads.random_sites(4, dtype="bfloat16"), workloads.kernel(1, 3), jnp.zeros(3), 20
    ),
}


def count(layer):
    return SimpleNamespace(**work.count(layer))


def entries(keys, values, sites):
    """{(sample, channel, key): value} of what is stored."""
    keys = np.broadcast_to(np.asarray(keys), values.shape)
    values = np.asarray(values, np.float64)
    return {
        (b, c, int(keys[b, c, k])): values[b, c, k]
        for b, c, k in np.ndindex(keys.shape)
        if keys[b, c, k] < sites
    }


def pairs(layer):
    """(sample, output site, output channel, product) of every pair that meets inside the grid."""
    shape, window = layer.x.spatial_shape, layer.kernel.window_shape
    live, w = set(np.asarray(layer.kernel.keys).tolist()), np.asarray(layer.kernel.to_dense())
    stored = entries(layer.x.keys, layer.x.values, layer.x.sites)
    cin, cout = w.shape[-2:]
    own = {(b, key) for b, _, key in stored}
    for (b, channel, key), value in stored.items():
        place = np.unravel_index(key, shape)
        for number, tap in enumerate(itertools.product(*map(range, window))):
            # "SAME" has the odd site of padding behind the grid.
            site = [p - t + (s - 1) // 2 for p, t, s in zip(place, tap, window, strict=True)]
            if not all(0 <= s < size for s, size in zip(site, shape, strict=True)):
                continue
            site = int(np.ravel_multi_index(site, shape))
            if layer.support == "input" and (b, site) not in own:
                continue
            for oc in range(cout):
                if (oc * cin + channel) * layer.kernel.taps + number in live:
                    yield b, site, oc, value * w[(*tap, channel, oc)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_counts_are_those_of_loops(name, backward):
    layer = dataclasses.replace(LAYERS[name], backward=backward)
    counts = count(layer)
    met = list(pairs(layer))
    kept = entries(
        layer.output.features.keys, layer.output.features.values, layer.output.features.sites
    )
    assert counts.entries == len(entries(layer.x.keys, layer.x.values, layer.x.sites))
    assert counts.weights == np.count_nonzero(layer.kernel.to_dense())
    assert counts.forward_products == len(met)
    in_kept = sum((b, oc, site) in kept for b, site, oc, _ in met)
    assert counts.backward_products == (2 * in_kept if backward else 0)
    assert counts.products == counts.forward_products + counts.backward_products
    assert counts.sites == len({(b, site) for b, site, _, _ in met})
    assert counts.kept == len(kept)
    responses = defaultdict(float)
    for b, site, oc, product in met:
        responses[b, site, oc] += product
    candidates = sum(
        layer.support == "input" or response + float(layer.bias[oc]) > 0
        for (_, _, oc), response in responses.items()
    )
    assert counts.candidates == candidates
    assert counts.bytes == counts.bytes_read + counts.bytes_written


def test_a_first_layer_has_no_gradient_of_its_input():
    layer = dataclasses.replace(LAYERS["shared"], backward=True)
    both, first = count(layer), count(dataclasses.replace(layer, first=True))
    assert first.backward_products == both.backward_products / 2
    assert both.bytes_written - first.bytes_written == layer.x.values.nbytes


@pytest.mark.parametrize("backward", [False, True])
def test_bytes_of_own_supports(backward):
    """8 bytes an entry and a weight, 8 a slot of the output, 4 a number of candidates."""
    layer = dataclasses.replace(LAYERS["pruned, padded, a batch"], backward=backward)
    counts = count(layer)
    read = 8 * counts.entries + 8 * counts.weights
    written = 8 * 2 * 3 * 15 + 4 * 2 * 3
    if backward:
        read += 8 * counts.entries + 8 * counts.weights + 8 * counts.kept
        written += 4 * 2 * 2 * 25 + 4 * counts.weights + 4 * 3
    assert counts.bytes_read == read + 4 * 3
    assert counts.bytes_written == written


def test_bytes_of_a_shared_support():
    """Its keys count once for all channels, and a submanifold convolution writes none."""
    shared, own = count(LAYERS["shared"]), count(LAYERS["submanifold"])
    assert shared.bytes_read == own.bytes_read
    assert own.bytes_read == (4 + 2 * 4) * own.entries // 2 + 8 * own.weights + 4 * 3
    slots = LAYERS["submanifold"].x.capacity
    assert own.bytes_written == 4 * 2 * 3 * slots + 4 * 2 * 3
    assert shared.bytes_written == 8 * 2 * 3 * 60 + 4 * 2 * 3


def test_values_of_16_bits_move_half_of_the_bytes():
    counts = count(LAYERS["half precision"])
    assert counts.bytes_read == (4 + 2) * 16 + 8 * 81 + 4 * 3
    assert counts.bytes_written == (4 + 2) * 3 * 20 + 4 * 3


def test_an_input_without_entries():
    x = workloads.random_sites(4, 2)
    x = dataclasses.replace(x, keys=jnp.full_like(x.keys, x.sites), values=0 * x.values)
    layer = Layer(x, workloads.kernel(2, 3), jnp.asarray(BIAS), capacity=20, backward=True)
    counts = count(layer)
    assert (counts.products, counts.sites, counts.candidates, counts.kept) == (0, 0, 0, 0)
    assert counts.bytes_written > 0


def test_every_ceiling_is_measured():
    found = work.ceilings(large=1, matrix=64, rounds=2)
    assert set(found) == {"copy", "multiply_adds"}
    assert all(value > 0 for value in found.values())


def test_shares_are_of_all_cores():
    counts = {"products": 300, "bytes": 1500, "candidates": 40}
    assert work.reached(counts, 0.5, {"copy": 6e3, "multiply_adds": 1e3}) == {
        "products_per_s": 600,
        "multiply_add_share": pytest.approx(0.6),
        "bytes_per_s": 3000,
        "copy_share": pytest.approx(0.5),
        "ns_per_product": pytest.approx(0.5e9 / 300),
        "ns_per_candidate": pytest.approx(0.5e9 / 40),
    }
