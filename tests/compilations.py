"""Keeps compiled programs, for the processes that tests start and for the next run: for a conftest."""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

CACHE = Path(__file__).parents[1] / ".cache" / "jax"


@pytest.fixture(scope="module", autouse=True)
def keep_compiled_programs():
    settings = {
        "jax_compilation_cache_dir": str(CACHE),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
    compilation_cache.reset_cache()
