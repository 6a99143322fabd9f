"""Other libraries compute what ilajax does, and one that does not is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ilajax
from benchmarks import peers, pytorch, rows, workloads
from benchmarks.layers import Layer, Peer
from benchmarks.peers import PEERS, checked_difference, comparison
from benchmarks.rows import GATHER, TORCH, Dense, OverlappingPool, Pool, Problem, but

SMALL = Problem(8, 2)
SHARED = Problem(12, 8, sites="shell", subset=None)
BACKWARD = Problem(12, 8, batch=2, sites="shell", bound=0.1, kernel_density=0.5, backward=True)
SUBMANIFOLD = but(SHARED, support="input", batch=2)
POOL_3 = OverlappingPool(11, 3, batch=2, sites="near shell", density=0.2)
POOL = Pool(11, 3, batch=2, sites="near shell", density=0.2)  # an odd grid
DENSE = Dense(4, 3, 5, batch=2)
HIDDEN = Dense(0, 12, 5, batch=2)
# Made once, so that each compiles once.
CONVOLUTIONS = {
    "random": but(SMALL, kernel_density=0.5).layer(),
    "disjoint": but(SMALL, sites="disjoint").layer(),
    "shell, backward": BACKWARD.layer(),
    "first, backward": but(BACKWARD, first=True).layer(),
    "shared": SHARED.layer(),
    "dense": DENSE.layer(),
    "dense, backward": but(DENSE, backward=True).layer(),
}
LAYERS = CONVOLUTIONS | {
    "submanifold": SUBMANIFOLD.layer(),
    "submanifold, backward": but(SUBMANIFOLD, backward=True).layer(),
    "pool": POOL.layer(),
    "pool, backward": but(POOL, backward=True).layer(),
    "overlapping pool, backward": but(POOL_3, backward=True).layer(),
    "hidden": HIDDEN.layer(),
    "hidden, backward": but(HIDDEN, backward=True).layer(),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_xla_computes_the_same(layer):
    calls, differences = comparison(LAYERS[layer], ["XLA dense"])
    assert list(calls) == ["ilajax", "XLA dense"]
    assert differences["XLA dense"] < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", LAYERS)
def test_torch_computes_the_same(layer):
    pytest.importorskip("torch")
    assert comparison(LAYERS[layer], [TORCH])[1][TORCH] < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backward", [False, True])
def test_gathers_compute_the_same(backward):
    pytest.importorskip("torch")
    layer = but(SUBMANIFOLD, backward=backward).layer()
    assert comparison(layer, [GATHER])[1][GATHER] < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("support", ["dilate", "input"])
def test_spconv_computes_the_same(support):
    """On one thread; on several its CPU path returns wrong rows."""
    pytest.importorskip("spconv")
    assert comparison(but(SHARED, support=support).layer(), ["spconv"])[1]["spconv"] < 1e-5


@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_that_computes_something_else_is_seen(backward):
    """Also where it is in a gradient alone."""
    x = workloads.shell(12, 2)
    layer, other = (
        Layer(x, workloads.kernel(2, 4, seed=seed), jnp.zeros(4), 100, backward) for seed in (0, 1)
    )
    peer, wrong = (peers.quickest(PEERS["XLA dense"](one)) for one in (layer, other))
    assert checked_difference(layer, peer, peer.call(), "it") < 1e-5
    with pytest.raises(RuntimeError, match="it differs from ilajax"):
        checked_difference(layer, wrong, wrong.call(), "it")
    if backward:
        features, gradient = peer.read(peer.call())
        wrong = Peer(lambda: None, lambda _: (features, 2 * gradient))
        with pytest.raises(RuntimeError):
            checked_difference(layer, wrong, None, "it")


@pytest.mark.parametrize("kind", ["pool, backward", "dense", "submanifold"])
def test_all_kinds_are_compared(kind):
    """Catches a layer whose own result passes for another's whatever that is."""
    layer = SUBMANIFOLD.layer() if kind == "submanifold" else LAYERS[kind]
    features, gradient = layer.read(layer.call())
    same = Peer(lambda: None, lambda _: (features, gradient))
    assert checked_difference(layer, same, None, "it") == 0
    double = jax.tree.map(lambda a: a if a.dtype == jnp.int32 else 2 * a, features)
    with pytest.raises(RuntimeError, match="it differs"):
        checked_difference(layer, Peer(lambda: None, lambda _: (double, gradient)), None, "it")


def test_pairs_are_those_of_a_search():
    layer = SUBMANIFOLD.layer()
    keys = np.asarray(layer.x.keys[:, 0])
    sample, slot = np.nonzero(keys < layer.x.sites)
    place = np.stack([sample, *np.unravel_index(keys[sample, slot], layer.x.spatial_shape)], axis=1)
    rows_of = {tuple(p): row for row, p in enumerate(place.tolist())}
    for tap, (read, added) in zip(np.ndindex(3, 3, 3), layer.pairs(), strict=True):
        moved = place + [0, *(np.array(tap) - 1)]  # noqa: RUF005
        met = [(rows_of[tuple(p)], n) for n, p in enumerate(moved.tolist()) if tuple(p) in rows_of]
        assert list(zip(read.tolist(), added.tolist(), strict=True)) == met


@pytest.mark.filterwarnings("ignore")
def test_the_network_in_pytorch_learns_and_is_the_same(monkeypatch):
    """It would catch weights in another order, a layer that is missing, and a twin that is none."""
    pytest.importorskip("torch")
    step = rows.solids_torch_step(resolution=16, batch=2)
    first, *others = (step() for _ in range(8))
    assert min(others) < first
    network, options = pytorch.network, {"num_classes": 5, "dense": True}
    other = ilajax.models.OctNet3(16, rngs=nnx.Rngs(1), **options)
    monkeypatch.setattr(pytorch, "network", lambda _: network(other))
    with pytest.raises(RuntimeError, match="its twin"):
        rows.solids_torch_step(resolution=16, batch=2)


@pytest.mark.filterwarnings("ignore")
def test_adagrad_is_the_same():
    """Where a gradient is close to 0, their epsilons count."""
    pytest.importorskip("torch")
    ours, others = (rows.adagrad_update(library, (30, 20)) for library in ("optax", TORCH))
    for _ in range(3):
        difference = np.abs(ours() - others().numpy())
        assert np.quantile(difference, 0.95) < 1e-5
        assert difference.max() < 1e-2
