"""The convolutions that are timed, described by their data: from a description to operands."""

import dataclasses
from pathlib import Path
from typing import Self

import jax.numpy as jnp

import ilajax
from benchmarks import workloads
from benchmarks.peers import Layer


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution of 3^3 taps on a cubic grid.

    Attributes:
      resolution: of the grid.
      in_channels: number of input channels.
      out_channels: number of output channels.
      batch: number of samples.
      sites: where the entries are: "random", other sites in each channel; "disjoint", random sites that no
        two channels share; "shell", a sphere's surface; "solids", generated meshes; or a folder with parts.
      subset: share of a shell that each channel stores; None: all of it, as a support that channels share.
      density: share of the sites that each channel has slots for. By default 1 / resolution for random
        sites; as many slots as are stored for all others.
      bound: the output's density bound. By default that of random sites; for all others twice the input's
        slots.
      kernel_density: share of live weights.
      cut: False: at most as many candidates as slots, so that nothing is selected.
      backward: with the gradients.
      support: of the output, see `ilajax.conv`.
      dtype: of the features.
    """

    resolution: int
    in_channels: int
    out_channels: int = 8
    batch: int = 1
    sites: str | Path = "random"
    subset: float | None = 0.6
    density: float | None = None
    bound: float | None = None
    kernel_density: float = 1.0
    cut: bool = True
    backward: bool = False
    support: str = "dilate"
    dtype: str = "float32"

    @property
    def dense(self) -> str:
        """What a dense convolution computes of it, which is the same for several problems."""
        channels = f"{self.in_channels}->{self.out_channels}"
        what = "f + b" if self.backward else "forward"
        return f"r{self.resolution} {channels} b{self.batch} {what}"

    def features(self, seed: int) -> ilajax.SparseTensor:
        """An input, another one for each seed."""
        size, common = self.resolution, {"batch": self.batch, "dtype": self.dtype, "seed": seed}
        if self.sites in ("random", "disjoint"):
            return workloads.random_sites(
                *(size, self.in_channels),
                density=self.density,
                disjoint=self.sites == "disjoint",
                **common,
            )
        if self.sites == "shell":
            if self.density is not None:
                slots = self._slots(self.density)
                radius = workloads.fitting_radius(size, slots)
                common |= {"capacity": slots, "radius": radius}
            return workloads.shell(size, self.in_channels, subset=self.subset, **common)
        if self.sites == "solids":
            return workloads.solids(size, **common)[0]
        return workloads.parts(size, Path(self.sites), **common)[0]

    def layer(self) -> Layer:
        """The layer, with the first input."""
        x = self.features(0)
        channels = (self.in_channels, self.out_channels)
        kernel = workloads.kernel(*channels, density=self.kernel_density, cut=self.cut)
        bias = jnp.zeros(self.out_channels)
        capacity = self._capacity(x) if self.support == "dilate" else None
        return Layer(x, kernel, bias, capacity, self.backward, self.support)

    def small(self) -> Self:
        """The same kind of problem in a small grid, to try a benchmark itself."""
        size = {1024: 16, 512: 14, 256: 12}.get(self.resolution, 10)
        random = self.sites in ("random", "disjoint")
        least = {
            name: None if value is None and not random else max(value or 0, 0.15)
            for name, value in (("density", self.density), ("bound", self.bound))
        }
        return dataclasses.replace(self, resolution=size, batch=min(self.batch, 2), **least)

    def _slots(self, bound: float) -> int:
        return ilajax.capacity(bound, (self.resolution,) * 3)

    def _capacity(self, x: ilajax.SparseTensor) -> int:
        if self.bound is not None:
            return self._slots(self.bound)
        return x.capacity if self.sites in ("random", "disjoint") else 2 * x.capacity
