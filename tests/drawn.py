"""Random numbers from NumPy: jax.random compiles for each shape, and tests have many shapes."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, shape, *, density=1.0):
    """A float32 array of which a share `density` is not zero."""
    rng = np.random.default_rng(seed)
    stored = rng.random(shape) < density
    return jnp.asarray(np.where(stored, rng.normal(size=shape), 0), jnp.float32)


def kernel_init(key, shape, dtype=jnp.float32):
    """An initialiser for layers that are made outside of transformations."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(0, 0.5, shape), dtype)
