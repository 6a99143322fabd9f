"""The comparison of layers on shared supports, on a small sphere."""

import json

import jax
import numpy as np
import pytest

import samples
from benchmarks import given_sites, workloads
from ilajax.ffi import routes

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


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_stack_is_the_same_with_one_map(backward):
    """Catches layers that are not those of the other column, or that have no map to share."""
    kernel = workloads.kernel(16, 16)
    kind = given_sites.kinds(12, 16)[0]
    one, each = (given_sites.stack(kind, kernel, backward, shared) for shared in (True, False))
    jax.tree.map(np.testing.assert_array_equal, one(), each())
    native = routes.route("submanifold", samples.platform()).runs == "kernel"
    for stack, maps in ((one, 1), (each, 0)):
        found = stack.func.as_text().count('custom_call_target="ilajax_site_map_fwd"')
        assert found == (maps if native and samples.platform() == "cpu" else 0)


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
    assert [record["direction"] for record in written["sharing"]] == ["forward", "f + b"]
    assert "strided, half kept" in (tmp_path / "given_sites.md").read_text()
