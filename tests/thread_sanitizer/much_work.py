"""Calls of the operations that share out their work only where there is much of it, to be recorded."""

import jax
import pytest

import ilajax
import samples


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_many_entries(backend, dtype):
    x = samples.tensor(0, 2, 4, (90, 100), capacity=9000, density=0.9, dtype=dtype)

    @jax.jit
    def run(values):
        y = x.with_values(values)
        return ilajax.k_select(y, 700).values, ilajax.to_dense(y)

    out, pull = jax.vjp(run, x.values)
    jax.block_until_ready(pull(out))
