"""Prints a hash of the bits of several results; test_ffi.py compares them across thread counts."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
import samples


def digest(tree):
    """A hash of all bits in a tree of arrays."""
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        bits.update(np.asarray(leaf).tobytes())
    return bits.hexdigest()


def convolution(x, kernel, bias, **options):
    def f(values, weights, bias):
        kernel_ = ilajax.SparseKernel(kernel.keys, weights, kernel.shape)
        features, responses = ilajax.conv(x.with_values(values), kernel_, bias, **options)
        return features.values, (features.keys, responses)

    values, pull, aux = jax.vjp(f, x.values, kernel.values, bias, has_aux=True)
    return values, aux, pull(values)


def pooling(pool, x):
    def f(values):
        y = pool(x.with_values(values))
        return y.values, y.keys

    values, pull, keys = jax.vjp(f, x.values, has_aux=True)
    return values, keys, pull(values)


def main():
    grid = (40, 50, 30)
    x = samples.tensor(0, 3, 4, grid, capacity=4000, density=0.05, exact=False)
    shared = samples.tensor(1, 3, 4, grid, capacity=4000, density=0.05, exact=False, shared=True)
    kernel = samples.kernel(0, (3, 3, 3), 4, 20, exact=False)
    bias = jnp.linspace(-1, 1, 20)
    results = {
        select: jax.jit(lambda x, s=select: convolution(x, kernel, bias, capacity=3000, select=s))(
            x
        )
        for select in ("value", "positive", "magnitude")
    }
    results["one-sample"] = jax.jit(
        lambda x: convolution(x, kernel, bias, capacity=3000, strides=2)
    )(jax.tree.map(lambda a: a[:1], x))
    results["shared"] = jax.jit(lambda x: convolution(x, kernel, bias, capacity=3000))(shared)
    results["input"] = jax.jit(lambda x: convolution(x, kernel, bias, support="input"))(shared)
    wide = samples.tensor(2, 3, 16, grid, capacity=4000, density=0.05, exact=False, shared=True)
    square = samples.kernel(1, (3, 3, 3), 16, 20, exact=False)
    results["input-wide"] = jax.jit(lambda x: convolution(x, square, bias, support="input"))(wide)
    results["max_pool"] = jax.jit(lambda x: pooling(lambda x: ilajax.max_pool(x, 2), x))(x)
    results["avg_pool"] = jax.jit(
        lambda x: pooling(lambda x: ilajax.avg_pool(x, 4, capacity=500), x)
    )(x)
    results["k_select"] = jax.jit(lambda x: pooling(lambda x: ilajax.k_select(x, 900), x))(x)
    results["dense"] = jax.jit(lambda x: ilajax.from_dense(ilajax.to_dense(x), 1000))(x)
    print(json.dumps({name: digest(result) for name, result in results.items()}))


if __name__ == "__main__":
    main()
