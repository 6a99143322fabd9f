"""The comparison of layers on shared supports, on a small sphere."""

import json

import numpy as np
import pytest

from benchmarks import given_sites, workloads

KERNEL = workloads.kernel(3, 3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("number", range(8))
def test_both_compute_the_same(number, backward):
    """Catches maps that are not those of the layer, or a peer that is given less to do."""
    pytest.importorskip("torch")
    kind = given_sites.kinds(12, 3)[number]
    pairs = given_sites.maps(kind, KERNEL)
    ours = given_sites.ours(kind, KERNEL, backward)()
    theirs = given_sites.theirs(kind, KERNEL, pairs, backward)()
    y, gradients = ours if backward else (ours, None)
    z, others = theirs if backward else (theirs, None)
    z = z.detach().numpy().T
    np.testing.assert_allclose(np.asarray(y)[0, :, : z.shape[1]], z, rtol=1e-4, atol=1e-4)
    if backward and "reached" not in kind.name and "kept" not in kind.name:
        np.testing.assert_allclose(gradients[0][0].T, others[0].numpy(), rtol=1e-4, atol=1e-4)


def test_products_are_counted():
    """Catches a layer whose products are counted for another one."""
    made = {kind.name: given_sites.maps(kind, KERNEL) for kind in given_sites.kinds(12, 3)}
    counts = {name: sum(len(to) for _, to in pairs) for name, pairs in made.items()}
    assert counts["submanifold"] == counts["its sites, given"]
    assert counts["strided, given"] == counts["inverse"] == counts["strided, all reached"]
    assert counts["strided, half kept"] < counts["strided, given"]


def test_the_report(tmp_path):
    records = given_sites.main(
        ["--resolution", "12", "--channels", "2", "--budget", "0.01", "--report", str(tmp_path)]
    )
    assert len(records) == 16
    written = json.loads((tmp_path / "given_sites.json").read_text())
    assert written["records"][0]["of_submanifold"] == 1
    assert "strided, half kept" in (tmp_path / "given_sites.md").read_text()
