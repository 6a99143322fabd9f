"""The layers that are timed: sparse convolutions, pooling, and the dense layers behind them.

`Peer` is what others make of one: a call to be timed, and what it computes in a common form, so that who is
timed is first seen to compute the same.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import ilajax
from benchmarks.timing import Candidate
from ilajax.models._dense import conv_general_dilated

Features: TypeAlias = ilajax.SparseTensor | jax.Array
# Input, filters and bias if there are any, and the cotangent if the layer is differentiated; channels last.
Dense: TypeAlias = tuple[jax.Array, ...]

LAYOUTS = {
    "channels last": ("NDHWC", "DHWIO", "NDHWC"),
    "channels first": ("NCDHW", "OIDHW", "NCDHW"),
}


class Program(NamedTuple):
    """What JAX compiles: a function of operands, of which `to_input` makes the first from another input."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    to_input: Callable[[ilajax.SparseTensor], Any] = lambda x: x


class Peer(NamedTuple):
    """Another way to compute a layer: `call`, which runs `program` if it is JAX's.

    `read` turns what `call` returns into (features, a gradient or None), channels last. Features are
    [B, *S, Cout], or a SparseTensor with the layer's own keys; the gradient is a convolution's filters', or
    the input's of pooling.
    """

    call: Candidate
    read: Callable[[Any], tuple[Any, Any]]
    program: Program | None = None


class Timed(abc.ABC):
    """A layer by ilajax: `function` of `operands`, with gradients if `backward`."""

    x: Features
    backward: bool
    first: bool = False
    function: Callable[..., Any]
    operands: tuple[Any, ...]

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        return jax.jit(self.function).lower(*self.operands).compile()

    def call(self) -> Any:
        return self.compiled(*self.operands)

    @abc.abstractmethod
    def read(self, result: Any) -> tuple[Features, jax.Array | None]:
        """As `Peer.read`, of what `call` returns."""

    @abc.abstractmethod
    def dense(self) -> Dense:
        """What a dense network is given."""


@dataclasses.dataclass(frozen=True)
class Layer(Timed):
    """A 3-D convolution with bias, stride 1, padding "SAME" and, but for support="input", a ReLU.

    With `backward` the gradients of input, filters and bias are computed too. The output has `capacity`
    slots; with support="input" that is None. The `first` layer of a network needs no gradient of its input.
    """

    x: ilajax.SparseTensor
    kernel: ilajax.SparseKernel
    bias: jax.Array
    capacity: int | None
    backward: bool = False
    support: str = "dilate"
    first: bool = False

    def forward(
        self, x: ilajax.SparseTensor, kernel: ilajax.SparseKernel, bias: jax.Array
    ) -> ilajax.ops.conv.ConvResult:
        return ilajax.conv(x, kernel, bias, capacity=self.capacity, support=self.support)

    @functools.cached_property
    def output(self) -> ilajax.ops.conv.ConvResult:
        return jax.jit(self.forward)(self.x, self.kernel, self.bias)

    @functools.cached_property
    def cotangent(self) -> ilajax.SparseTensor:
        """1 at the output's stored sites. Dense networks get it scattered: then all gradients agree."""
        return self.output.features.map(jnp.ones_like)

    @property
    def function(self) -> Callable[..., Any]:
        """What is timed, of `operands`."""

        def step(x, kernel, bias, g):
            def respond(values, weights, bias):
                live = dataclasses.replace(kernel, values=weights)
                return self.forward(x.with_values(values), live, bias).features.values

            given = (x.values, kernel.values, bias)
            if self.first:
                values, pull = jax.vjp(functools.partial(respond, x.values), *given[1:])
            else:
                values, pull = jax.vjp(respond, *given)
            return values, pull(g)

        return step if self.backward else self.forward

    @functools.cached_property
    def operands(self) -> tuple[Any, ...]:
        """Input, filters and bias; if it is differentiated, the cotangent too."""
        given = (self.x, self.kernel, self.bias)
        return (*given, self.cotangent.values) if self.backward else given

    def read(self, result: Any) -> tuple[ilajax.SparseTensor, jax.Array | None]:
        if not self.backward:
            return result.features, None
        values, (*_, weights, _) = result
        gradient = dataclasses.replace(self.kernel, values=weights).to_dense()
        return self.output.features.with_values(values), gradient

    def dense(self) -> Dense:
        given = (ilajax.to_dense(self.x), self.kernel.to_dense(), self.bias)
        return (*given, ilajax.to_dense(self.cotangent)) if self.backward else given

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of support="input", for each tap: the stored sites that it reads, and those that it adds them to.

        Sites are numbered through the batch.
        """
        shape, window = self.x.spatial_shape, self.kernel.window_shape
        keys = np.asarray(self.x.keys[:, 0])
        sample, slot = np.nonzero(keys < self.x.sites)
        place = np.stack([sample, *np.unravel_index(keys[sample, slot], shape)], axis=1)
        grid = (self.x.batch_size, *shape)
        own = np.ravel_multi_index(tuple(place.T), grid)
        for tap in itertools.product(*map(range, window)):
            step = [t - (size - 1) // 2 for t, size in zip(tap, window, strict=True)]
            read = place + np.asarray((0, *step))
            inside = np.flatnonzero(((read >= 0) & (read < grid)).all(axis=1))
            wanted = np.ravel_multi_index(tuple(read[inside].T), grid)
            found = np.searchsorted(own, wanted).clip(max=max(0, own.size - 1))
            stored = own[found] == wanted
            yield found[stored], inside[stored]


@dataclasses.dataclass(frozen=True)
class Pooling(Timed):
    """Max pooling by a window of 2, or of 3 in steps of 2; with `backward` the gradient of the input too."""

    x: ilajax.SparseTensor
    backward: bool = False
    overlapping: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """What is timed, of `operands`."""

        forward = self._forward

        def step(x, g):
            values, pull = jax.vjp(lambda values: forward(x.with_values(values)).values, x.values)
            return values, pull(g)

        return step if self.backward else forward

    def _forward(self, x: ilajax.SparseTensor) -> ilajax.SparseTensor:
        if self.overlapping:
            rank = len(x.spatial_shape)
            return ilajax.max_pool(x, 3, strides=2, padding=((1, 1),) * rank)
        return ilajax.max_pool(x, 2)

    @functools.cached_property
    def output(self) -> ilajax.SparseTensor:
        return jax.jit(self._forward)(self.x)

    @property
    def operands(self) -> tuple[Any, ...]:
        """The input; if it is differentiated, the cotangent too."""
        return (self.x, jnp.ones_like(self.output.values)) if self.backward else (self.x,)

    def read(self, result: Any) -> tuple[ilajax.SparseTensor, jax.Array | None]:
        if not self.backward:
            return result, None
        values, (gradient,) = result
        return self.output.with_values(values), ilajax.to_dense(self.x.with_values(gradient))

    def dense(self) -> Dense:
        x = ilajax.to_dense(self.x)
        return (x, ilajax.to_dense(self.output.map(jnp.ones_like))) if self.backward else (x,)


@dataclasses.dataclass(frozen=True)
class DenseLayer(Timed):
    """A dense layer of `ilajax.models`, with bias and ReLU, of x [B, *S, Cin].

    With a grid it is a convolution of 3^3 taps, without one a matrix product; `backward` as in `Layer`.
    """

    x: jax.Array
    kernel: jax.Array
    bias: jax.Array
    backward: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """What is timed, of `operands`."""
        return forward_and_backward(
            dense_layer(conv_general_dilated, "channels last"), self.backward
        )

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.dense()

    def read(self, result: Any) -> tuple[jax.Array, jax.Array | None]:
        return (result[0], result[1][1]) if self.backward else (result, None)

    def dense(self) -> Dense:
        given = (self.x, self.kernel, self.bias)
        ones = jnp.ones((*self.x.shape[:-1], self.kernel.shape[-1]))
        return (*given, ones) if self.backward else given


def dense_layer(
    conv: Callable[..., jax.Array], layout: str, **options: Any
) -> Callable[..., jax.Array]:
    """A dense convolution, or without a grid a matrix product, and a ReLU."""
    per_channel = (-1, 1, 1, 1) if layout == "channels first" else (-1,)

    def forward(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        if x.ndim == 2:
            return jax.nn.relu(x @ w + bias)
        y = conv(x, w, (1, 1, 1), "SAME", dimension_numbers=LAYOUTS[layout], **options)
        return jax.nn.relu(y + bias.reshape(per_channel))

    return forward


def forward_and_backward(
    forward: Callable[..., Any], backward: bool, first: bool = False
) -> Callable[..., Any]:
    """`forward`, or if `backward` also the gradients of its operands, behind which the cotangent stands.

    Of the `first` layer, those of all operands but the input.
    """

    def step(x: Any, *others: Any) -> Any:
        *given, g = others
        if first:
            y, pull = jax.vjp(functools.partial(forward, x), *given)
        else:
            y, pull = jax.vjp(forward, x, *given)
        return y, pull(g)

    return step if backward else forward
