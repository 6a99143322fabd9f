"""Compiled programs are kept, and nets are small."""

import pytest

from compilations import keep_compiled_programs
from ilajax.models import octnet3

__all__ = ["keep_compiled_programs"]


@pytest.fixture(scope="module")
def small_nets():
    """Of a net with 1024 hidden features they hold nearly all weights: too many to train and to save here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(octnet3, "HIDDEN_FEATURES", 32)
        yield
