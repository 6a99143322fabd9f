"""The ceilings, measured for real on small arrays."""

import pytest

from benchmarks import ceilings
from benchmarks.counts import Counts

COUNTS = Counts(
    entries=10,
    weights=27,
    forward_products=200,
    backward_products=100,
    sites=50,
    candidates=40,
    kept=20,
    bytes_read=1000,
    bytes_written=500,
)


def test_every_ceiling_is_measured():
    found = ceilings.measure(large=1, matrix=64, rounds=2)
    assert set(found) == set(ceilings.SHOWN)
    assert all(value > 0 for value in found.values())
    assert len(ceilings.lines(found)) == len(ceilings.SHOWN)


def test_shares_are_of_all_cores():
    limits = {"copy": 6e3, "multiply_adds": 1e3}
    assert ceilings.reached(COUNTS, 0.5, limits) == {
        "products_per_s": 600,
        "multiply_add_share": pytest.approx(0.6),
        "bytes_per_s": 3000,
        "copy_share": pytest.approx(0.5),
        "ns_per_product": pytest.approx(0.5e9 / 300),
        "ns_per_candidate": pytest.approx(0.5e9 / 40),
    }
