"""The bugs that the harness for CUDA kernels plants can be planted; `make sanitize-cuda` runs the kernels."""

import pytest

from cuda_on_host import build, mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_can_be_planted(mutant):
    """Catches a bug of mutants.py whose place in the kernels has changed."""
    assert (build.KERNELS / mutant.file).read_text().count(mutant.old) == 1
