"""Networks on shared supports, against the same networks written with gather, matmul and index-add."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ilajax
import oracles
import samples

GRID, COARSE = (9, 8), (5, 4)
STRIDED = oracles.Geometry(GRID, (3, 3), 2)
# By layer: the geometry, and which of the supports it reads and writes.
LAYERS = {
    "stem": (oracles.Geometry(GRID, (3, 3)), "fine", "fine"),
    "down": (STRIDED, "fine", "coarse"),
    "middle": (oracles.Geometry(COARSE, (3, 3)), "coarse", "coarse"),
    "up": (oracles.Transposed(STRIDED), "coarse", "fine"),
    "head": (oracles.Geometry(GRID, (1, 1)), "fine", "fine"),
}


def ours(x, kernels, capacity):
    """The network, and the keys that its strided layer has kept."""
    k = kernels
    fine = ilajax.conv(x, k["stem"], support="input").features.map(jax.nn.relu)
    coarse, responses = ilajax.conv(
        fine, k["down"], strides=2, capacity=capacity, select_by="site", select="magnitude"
    )
    y = ilajax.conv(coarse, k["middle"], support="input").features.map(jax.nn.relu)
    y = ilajax.add(y, coarse)
    y = ilajax.conv_transpose(y, k["up"], strides=2, support=fine).features
    y = ilajax.concatenate([y, fine], same_support=True)
    return ilajax.conv(y, k["head"], support="input").features, coarse.keys, responses


def theirs(x, weights, coarse_keys):
    """The same values, where the maps are given: of each sample for each tap what reads what."""
    supports = {"fine": np.asarray(x.keys)[:, 0], "coarse": np.asarray(coarse_keys)[:, 0]}

    def layer(name, values):
        geometry, read, written = LAYERS[name]
        # To rows of sites and one more, for what a padding slot would have.
        result = [jnp.zeros((supports[written].shape[1], weights[name].shape[2]))] * len(values)
        for b, tap in itertools.product(range(len(values)), range(len(weights[name]))):
            slots = {key: slot for slot, key in enumerate(supports[written][b].tolist())}
            pairs = [
                (slot, slots[geometry.update_id(key, tap)])
                for slot, key in enumerate(supports[read][b].tolist())
                if key < np.prod(geometry.grid) and geometry.update_id(key, tap) in slots
            ]
            if pairs:
                sources, targets = np.array(pairs).T
                products = values[b][sources] @ weights[name][tap]
                result[b] = result[b].at[targets].add(products)
        return result

    fine = [jax.nn.relu(v) for v in layer("stem", list(jnp.moveaxis(x.values, 1, 2)))]
    coarse = layer("down", fine)
    y = [jax.nn.relu(v) + skip for v, skip in zip(layer("middle", coarse), coarse, strict=True)]
    y = [jnp.concatenate(pair, axis=1) for pair in zip(layer("up", y), fine, strict=True)]
    return jnp.moveaxis(jnp.stack(layer("head", y)), 2, 1)


@pytest.mark.parametrize("capacity", [20, 7], ids=["all kept", "cut"])
def test_values_and_gradients(backend, capacity):
    """Catches a layer that reads other maps than its neighbour writes, and gradients to what was cut."""
    x = samples.tensor(3, 2, 2, GRID, capacity=25, density=0.3, shared=True, exact=False)
    channels = {"stem": (2, 5), "down": (5, 6), "middle": (6, 6), "up": (6, 4), "head": (9, 3)}
    shapes = {name: (*LAYERS[name][0].window, *ends) for name, ends in channels.items()}
    dense = {
        name: jax.random.normal(jax.random.key(n), shape) / 3
        for n, (name, shape) in enumerate(shapes.items())
    }

    def loss(values, dense):
        kernels = {name: ilajax.SparseKernel.from_dense(w) for name, w in dense.items()}
        y, keys, responses = ours(x.with_values(values), kernels, capacity)
        return jnp.sum(y.values * cotangent), (y.values, keys, responses)

    cotangent = jax.random.normal(jax.random.key(9), (2, 3, 25))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    got, (values, keys, responses) = gradient(x.values, dense)
    assert (np.asarray(responses) > capacity).any() == (capacity == 7)

    def same_loss(values, dense):
        taps = {name: w.reshape(-1, *w.shape[-2:]) for name, w in dense.items()}
        y = theirs(x.with_values(values), taps, keys)
        stored = x.keys < x.sites
        return jnp.sum(jnp.where(stored, y, 0) * cotangent), y

    gradient = jax.jit(jax.grad(same_loss, argnums=(0, 1), has_aux=True))
    want, expected = gradient(x.values, dense)
    oracles.assert_close(values, expected, 1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracles.assert_close(a, b, 1e-5)
