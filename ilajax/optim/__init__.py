"""Training that favours sparsity: Optax transformations, and the removal of pruned weights."""

from ilajax.optim.compact import compact
from ilajax.optim.density_biased_l2 import DensityBiasedL2State, density_biased_l2
from ilajax.optim.excess_density import excess_density
from ilajax.optim.filters import filters
from ilajax.optim.one_warning_shot_pruning import (
    OneWarningShotPruningState,
    one_warning_shot_pruning,
)
from ilajax.optim.sparse_training import sparse_training

__all__ = [
    "DensityBiasedL2State",
    "OneWarningShotPruningState",
    "compact",
    "density_biased_l2",
    "excess_density",
    "filters",
    "one_warning_shot_pruning",
    "sparse_training",
]
