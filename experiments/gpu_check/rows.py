"""The rows of the check's tables: which layers are timed, and what is asked of them."""

import dataclasses

import jax.numpy as jnp

import ilajax
from experiments import workloads
from experiments.peers import Layer

OUT_CHANNELS = 8
MOST_LAUNCHES = 4  # of one layer, forward


@dataclasses.dataclass(frozen=True)
class Row:
    """A convolution of 3^3 taps to 8 channels, on a cubic grid.

    Attributes:
      name: unique.
      resolution: of the grid.
      batch: number of samples.
      in_channels: number of input channels.
      bound: the output's density bound, and that of the input.
      shell: whether entries lie on a sphere's shell, on random three quarters of it in each channel; else
        anywhere.
      shared: all channels on the whole shell.
      support: of the output, see `ilajax.conv`.
      kernel_density: share of live weights.
      cut: False: at most as many candidates as slots, so that nothing is selected.
      backward: with the gradients.
      dtype: of the features.
      bar: how many times as fast as the quickest dense convolution it shall be.
      bar_us: microseconds that it may take.
      against: "XLA dense", "spconv", or neither.
    """

    name: str
    resolution: int
    batch: int
    in_channels: int
    bound: float
    shell: bool = True
    shared: bool = False
    support: str = "dilate"
    kernel_density: float = 1.0
    cut: bool = True
    backward: bool = False
    dtype: str = "float32"
    bar: float | None = None
    bar_us: float | None = None
    against: str | None = "XLA dense"

    @property
    def slots(self) -> int:
        return ilajax.capacity(self.bound, (self.resolution,) * 3)

    @property
    def problem(self) -> str:
        """What a dense convolution sees of it: it is the same for several rows."""
        what = "f + b" if self.backward else "forward"
        return f"r{self.resolution} {self.in_channels}->{OUT_CHANNELS} b{self.batch} {what}"

    def features(self, seed: int) -> ilajax.SparseTensor:
        """An input, another one for each seed."""
        common = {"batch": self.batch, "capacity": self.slots, "dtype": self.dtype, "seed": seed}
        if not self.shell:
            return workloads.random_sites(
                self.resolution, self.in_channels, density=self.bound, **common
            )
        return workloads.shell(
            *(self.resolution, self.in_channels),
            subset=None if self.shared else 0.75,
            radius=workloads.fitting_radius(self.resolution, self.slots),
            **common,
        )

    def layer(self) -> Layer:
        """The layer, with the first input."""
        kernel = workloads.kernel(
            self.in_channels, OUT_CHANNELS, density=self.kernel_density, cut=self.cut, seed=100
        )
        return Layer(
            self.features(0),
            kernel,
            jnp.zeros(OUT_CHANNELS),
            self.slots if self.support == "dilate" else None,
            self.backward,
            self.support,
        )

    def small(self) -> "Row":
        """The same for a dry run."""
        resolution = {1024: 16, 512: 14, 256: 12}.get(self.resolution, 10)
        return dataclasses.replace(
            self, resolution=resolution, batch=min(self.batch, 2), bound=max(self.bound, 0.15)
        )


# Data and bounds of three problems: the paper's random grids, and thin surfaces at two resolutions.
RANDOM = {"resolution": 256, "batch": 1, "in_channels": 1, "bound": 1 / 256, "shell": False}
SHELL = {"resolution": 128, "batch": 32, "in_channels": 8, "bound": 1 / 64}
SMALL_SHELL = {"resolution": 64, "batch": 32, "in_channels": 8, "bound": 1 / 32}
TENTH = {"kernel_density": 0.1}

ROWS = [
    Row("r256 1->8 rho_f=0.1, no selection", **RANDOM, **TENTH, cut=False, bar=14, bar_us=100),
    Row("r256 1->8 rho_f=1, selection", **RANDOM, bar=7, bar_us=150),
    Row("r128 shell 8->8 b32", **SHELL, bar=6),
    Row("r128 shell 8->8 b32, f + b", **SHELL, backward=True),
    Row("r512 shell 8->8 b32", 512, 32, 8, 1 / 512, against=None),
    Row("r1024 shell 8->8 b8", 1024, 8, 8, 1 / 1024, against=None),
    Row("r256 1->8 rho_f=0.1, selection", **RANDOM, **TENTH),
    Row("r64 shell 8->8 b32", **SMALL_SHELL),
    Row("r64 shell 8->8 b32, f + b", **SMALL_SHELL, backward=True),
    Row("r128 shell 8->8 b32, bfloat16", **SHELL, dtype="bfloat16", against=None),
    Row("r128 shared shell 8->8 b32", **SHELL, shared=True, against="spconv"),
    Row(
        "r128 shared shell 8->8 b32, submanifold",
        **(SHELL | {"shared": True, "support": "input", "against": "spconv"}),
    ),
]

# The first row of each kind.
DRY_ROWS = list(
    {
        (row.shared, row.support, row.backward, row.dtype): row.small() for row in reversed(ROWS)
    }.values()
)[::-1]
