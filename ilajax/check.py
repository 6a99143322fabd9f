"""The check of the kernels on a user's device: each operation and its gradient against the reference.

    python -m ilajax check

Inputs, weights and cotangents are small integers, so all sums are exact and both must give the same bits.
The sizes make every loop of a kernel run more than once: several chunks of a batch, slabs of a grid, more
than 64 tiles, selections that cut and that do not, in three dtypes. The check runs in a process of its own,
which is stopped at a time limit, so it also finds a kernel that hangs. A GPU that passes gets a stamp
(`ilajax.ffi.stamp`), which enables its kernels from then on.
"""

import contextlib
import datetime
import functools
import os
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ilajax.ffi import plans, routes, stamp
from ilajax.geometry import sites
from ilajax.ops.conv import conv
from ilajax.ops.conv_transpose import conv_transpose
from ilajax.ops.convert import from_dense, to_dense
from ilajax.ops.k_select import k_select
from ilajax.ops.pool import avg_pool, max_pool, sum_pool
from ilajax.sparse_kernel import SparseKernel
from ilajax.sparse_tensor import SparseTensor

LIMIT = 300.0  # seconds; the check itself takes less than one minute

_COMMAND = "from ilajax import check; check.run()"


class Case(NamedTuple):
    """One comparison: outputs and gradients of a function, by the kernels and by the reference."""

    operation: str  # whose kernels run, one of routes.OPERATIONS
    what: str  # its sizes, in words
    function: Callable[[Any, Any], Any]  # of a SparseTensor or an array, and a SparseKernel or None
    operands: tuple[Any, Any]
    exact: bool = True  # whether both must give the same bits, or agree to one part in a million
    workspace: int | None = None  # bytes that a GPU's workspace may take; None: as usual


def supervise(limit: float = LIMIT) -> int:
    """Runs the check in a process of its own and prints its output; returns the exit status."""
    # The programs are small: XLA's optimizer would take longer than it saves.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} {os.environ.get('XLA_FLAGS', '')}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-c", _COMMAND]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    deadline, said = time.monotonic() + limit, ""
    with (
        subprocess.Popen(command, env=environment, **pipes) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            # What there is, not a whole line: a kernel that hangs leaves its line unfinished.
            new = os.read(process.stdout.fileno(), 1 << 16).decode(errors="replace")
            if not new:
                return process.wait()
            print(new, end="", flush=True)
            said += new
        process.kill()
    *_, last = ["the beginning", *said.split("\n")]
    print(f"\nFAILED: stopped after {limit:g} s, in: {' '.join(last.split())}")
    return 1


def run() -> None:
    """Runs all cases on the default device, prints a line for each, and exits with 1 if one fails."""
    platform = routes.default_platform()
    with _backend("native"):
        found = [(name, routes.route(name, platform)) for name in routes.OPERATIONS]
    missing = {name: route.why for name, route in found if route.runs != "kernel"}
    device = jax.devices()[0].device_kind
    print(f"ilajax's kernels on {device} ({platform}), JAX {jax.__version__}")
    for why in dict.fromkeys(missing.values()):
        names = ", ".join(name for name in missing if missing[name] == why)
        print(f"FAILED: nothing to check of {names}: {why}")
    if missing:
        sys.exit(1)
    start = time.monotonic()
    failed = 0
    for case in cases():
        dtype = jax.tree.leaves(case.operands[0])[-1].dtype
        print(f"  {case.operation:11}  {case.what:24}  {dtype!s:8}", end="  ", flush=True)
        try:
            difference = compare(case)
        except Exception:
            difference = traceback.format_exc(limit=-2)
        failed += bool(difference)
        print(f"FAILED: {difference}" if difference else "ok")
    seconds = time.monotonic() - start
    if failed:
        print(f"FAILED: {failed} of {len(cases())} cases, in {seconds:.0f} s. Please report it.")
        sys.exit(1)
    print(f"All {len(cases())} cases agree with the reference, in {seconds:.0f} s.")
    if platform == "cuda":
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"device": device, "jax": jax.__version__, "cases": len(cases()), "date": now}
        for path in stamp.write(facts):
            print(f"The kernels are on for this GPU from now on: {path}")


def compare(case: Case) -> str:
    """How the kernel's results differ from the reference's; "" if they do not."""
    for kernel, reference in zip(results(case, "native"), results(case, "reference"), strict=True):
        one, other = kernel.astype(np.float64), reference.astype(np.float64)
        tolerance = 0.0 if case.exact else 1e-6
        wrong = ~np.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            return (
                f"{wrong.sum()} of {wrong.size} numbers of a {kernel.dtype}{list(kernel.shape)} differ; at "
                f"{at} the kernel has {kernel[at]}, the reference {reference[at]}."
            )
    return ""


def results(case: Case, backend: str) -> list[np.ndarray]:
    """Outputs and gradients on a backend, "native" or "reference"."""

    def both(x: Any, kernel: Any) -> Any:
        out, pull = jax.vjp(case.function, x, kernel)
        gradients = jax.tree.leaves(pull(jax.tree.map(_cotangent, out)))
        return out, [g for g in gradients if g.dtype != jax.dtypes.float0]

    with _backend(backend), plans.tuned("cuda", workspace=case.workspace or 0):
        return [np.asarray(a) for a in jax.tree.leaves(jax.jit(both)(*case.operands))]


def cases() -> list[Case]:
    """All comparisons."""
    return [
        *_conv_cases(),
        *_conv_at_cases(),
        *_conv_by_site_cases(),
        *_submanifold_cases(),
        *_selection_cases(),
        *_pool_cases(),
        *_dense_cases(),
    ]


def _conv_cases() -> Iterator[Case]:
    big, small = (33, 33, 33), (9, 8, 10)
    f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16

    def case(
        what: str,
        grid: tuple[int, ...],
        channels: tuple[int, int],
        dtype: Any,
        *,
        batch: int = 2,
        slots: int | None = None,
        shared: bool = False,
        live: float = 1.0,
        workspace: int | None = None,
        **options: Any,
    ) -> Case:
        cin, cout = channels
        x = _tensor(batch, cin, grid, slots or sites(grid) // 8, dtype, shared=shared)
        bias = _integers(7, (cout,), f32)

        def function(x: SparseTensor, kernel: SparseKernel) -> Any:
            return conv(x, kernel, bias, **options)

        operands = (x, _kernel((3,) * len(grid), cin, cout, live))
        return Case("conv", what, function, operands, workspace=workspace)

    everything = sites(big)
    yield case("33^3, cut", big, (1, 8), f32, capacity=900)
    yield case("33^3, all kept, pruned", big, (1, 8), f32, slots=600, live=0.1, capacity=everything)
    yield case("33^3, cut", big, (3, 9), bf16, capacity=1500, select="magnitude")
    yield case("shared", small, (40, 5), f16, shared=True, capacity=60, select="value")
    moved: dict[str, Any] = {"strides": (2, 1, 2), "kernel_dilation": (1, 2, 1), "padding": "VALID"}
    yield case("strides, dilation", (17, 18, 19), (4, 4), f32, capacity=50, **moved)
    yield case("one axis", (3000,), (5, 3), bf16, capacity=200)
    yield case("two axes", (70, 65), (2, 12), f16, batch=5, capacity=300)
    yield case("four axes", (7, 6, 8, 9), (2, 3), f32, capacity=100)
    yield case("chunks, slabs", small, (2, 9), f32, batch=5, capacity=40, workspace=1 << 17)
    yield case("row by row", small, (3, 3), f32, batch=3, capacity=400, workspace=1)


def _conv_at_cases() -> Iterator[Case]:
    fine, coarse = (21, 20, 19), (11, 10, 10)
    for what, operation, (reads, writes), (cin, cout), dtype, workspace in (
        ("strided", conv, (fine, coarse), (2, 3), jnp.float32, None),
        ("strided, wide", conv, (fine, coarse), (9, 17), jnp.bfloat16, None),
        ("transposed", conv_transpose, (coarse, fine), (5, 9), jnp.float16, None),
        ("transposed, in parts", conv_transpose, (coarse, fine), (3, 34), jnp.float32, 1),
    ):
        x = _tensor(3, cin, reads, 900, dtype, shared=True)
        support = _tensor(3, 1, writes, 700, dtype, shared=True)
        function = functools.partial(_onto, operation, support)
        operands = (x, _kernel((3, 3, 3), cin, cout, 0.7))
        yield Case("conv_at", what, function, operands, workspace=workspace)


def _onto(
    operation: Callable[..., Any], support: SparseTensor, x: SparseTensor, kernel: SparseKernel
) -> Any:
    return operation(x, kernel, strides=2, support=support)


def _conv_by_site_cases() -> Iterator[Case]:
    grid, some = (21, 20, 19), {"capacity": 300}
    up: dict[str, Any] = {"capacity": 900, "select": "magnitude"}
    for what, operation, reads, (cin, cout), dtype, options in (
        ("cut", conv, grid, (2, 3), jnp.float32, some),
        ("strided, wide", conv, grid, (9, 34), jnp.bfloat16, some | {"strides": 2}),
        ("all kept", conv, (90, 80), (3, 5), jnp.float16, {"capacity": 7200}),
        ("transposed", conv_transpose, (11, 10, 10), (5, 9), jnp.float32, up | {"strides": 2}),
    ):
        x = _tensor(3, cin, reads, sites(reads) // 16, dtype, shared=True)
        function: Any = functools.partial(operation, select_by="site", **options)
        yield Case("conv_by_site", what, function, (x, _kernel((3,) * len(reads), cin, cout, 0.7)))


def _submanifold_cases() -> Iterator[Case]:
    def function(x: SparseTensor, kernel: SparseKernel) -> Any:
        return conv(x, kernel, support="input")

    for what, (cin, cout), dtype, workspace in (
        ("narrow", (2, 3), jnp.float32, None),
        ("wide", (9, 17), jnp.bfloat16, None),
        ("wider", (33, 40), jnp.float16, None),
        ("in parts", (3, 34), jnp.float32, 1),
    ):
        x = _tensor(3, cin, (21, 20, 19), 900, dtype, shared=True)
        operands = (x, _kernel((3, 3, 3), cin, cout, 0.7))
        yield Case("submanifold", what, function, operands, workspace=workspace)


def _selection_cases() -> Iterator[Case]:
    for what, slots, capacity, dtype, select in (
        ("by one block", 2000, 300, jnp.float32, "value"),
        ("by several", 40_000, 3000, jnp.bfloat16, "magnitude"),
        ("all kept", 40_000, 50_000, jnp.float16, "magnitude"),
    ):
        options = {"capacity": capacity, "select": select}
        sparse, dense = _tensor(2, 2, (300, 400), slots, dtype), _integers(3, (2, slots, 3), dtype)
        yield Case("k_select", what, _without_filter(k_select, **options), (sparse, None))
        yield Case("from_dense", what, _without_filter(from_dense, **options), (dense, None))


def _pool_cases() -> Iterator[Case]:
    for pool, grid, capacity, strides, dtype in (
        (max_pool, (66, 66, 66), None, None, jnp.float32),
        (max_pool, (66, 66, 66), 2000, None, jnp.bfloat16),
        (avg_pool, (66, 66, 66), 2000, None, jnp.float32),
        (avg_pool, (31, 33), None, None, jnp.float16),
        (max_pool, (35, 36, 37), None, 1, jnp.float32),
        (sum_pool, (310, 33), 900, 1, jnp.float32),
    ):
        x = _tensor(2, 3, grid, sites(grid) // 16, dtype, shared=len(grid) == 2 and not capacity)
        what = pool.__name__ + (", overlapping" if strides else "") + (", cut" if capacity else "")
        function = _without_filter(pool, window=2, strides=strides, capacity=capacity)
        yield Case("pool", what, function, (x, None), exact=pool is not avg_pool)


def _dense_cases() -> Iterator[Case]:
    for shared, dtype in ((False, jnp.float32), (True, jnp.bfloat16)):
        x = _tensor(3, 5, (40, 41), 700, dtype, shared=shared)
        what = "one support" if shared else "own supports"
        yield Case("to_dense", what, _without_filter(to_dense), (x, None))


def _without_filter(operation: Callable[..., Any], **options: Any) -> Callable[[Any, Any], Any]:
    return lambda x, _: operation(x, **options)


def _tensor(
    batch: int, channels: int, grid: tuple[int, ...], slots: int, dtype: Any, shared: bool = False
) -> SparseTensor:
    """Random sites, a tenth of the slots empty, values of small integers."""
    rng = np.random.default_rng(slots)
    keys = np.full((batch, 1 if shared else channels, slots), sites(grid), np.int32)
    for segment in keys.reshape(-1, slots):
        count = min(slots - slots // 10, sites(grid))
        segment[:count] = np.sort(rng.choice(sites(grid), count, replace=False))
    shape = (batch, channels, slots)
    values = rng.integers(1, 5, shape) * rng.choice([-1, 1], shape)
    values = np.where(keys < sites(grid), values, 0)
    return SparseTensor(jnp.asarray(keys), jnp.asarray(values, dtype), grid)


def _kernel(window: tuple[int, ...], cin: int, cout: int, density: float) -> SparseKernel:
    rng = np.random.default_rng(cin * cout)
    size = sites(window) * cin * cout
    keys = np.sort(rng.choice(size, max(1, round(density * size)), replace=False))
    values = jnp.asarray(rng.integers(-3, 4, keys.size), jnp.float32)
    return SparseKernel(jnp.asarray(keys, jnp.int32), values, (*window, cin, cout))


def _integers(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), dtype)


def _cotangent(out: jax.Array) -> Any:
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return np.zeros(out.shape, jax.dtypes.float0)
    return (jnp.arange(out.size) % 5 - 2).reshape(out.shape).astype(out.dtype)


@contextlib.contextmanager
def _backend(choice: str) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in ("ILAJAX_BACKEND", "ILAJAX_REFERENCE")}
    os.environ["ILAJAX_BACKEND"] = choice
    try:
        yield
    finally:
        del os.environ["ILAJAX_BACKEND"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
