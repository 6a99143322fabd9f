"""The ceilings, measured for real on small arrays."""

import json

import pytest

from experiments import ceilings
from experiments.counts import Counts

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("ceilings") / "c.json"
    sizes = ["--large", "1", "--matrix", "64", "--rounds", "2"]
    return ceilings.main([*sizes, "--json", str(path)]), path


def test_every_ceiling_is_measured_and_written(finished):
    found, path = finished
    assert set(found) == {"cores", *ceilings.SHOWN}
    assert all(value > 0 for value in found.values())
    assert len(ceilings.lines(found)) == len(ceilings.SHOWN)
    record = json.loads(path.read_text())
    assert record["ceilings"] == found
    assert record["machine"]


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
