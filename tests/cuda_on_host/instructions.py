"""How many instructions the CUDA kernels take for each row of the GPU benchmark. Needs nvcc, and no GPU.

    PYTHONPATH=tests python -m cuda_on_host.instructions                  # all rows, many minutes
    PYTHONPATH=tests python -m cuda_on_host.instructions --rows "r256 1->8 random, rho_f=1" --lines 20
    PYTHONPATH=tests python -m cuda_on_host.instructions --report

--report writes benchmarks/results/instructions.{json,md} too. Runs the machine code of sm_90 itself (see
README.md) on the rows' own inputs, with the plans of an H100, and counts what each warp executes: whole
calls, without the launches' gaps. Of grids beyond 128^3 one sample is counted, and stands for its batch.

--lines says which lines of the source take most, with all that is inlined there.
"""

import argparse
import collections
import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Its handlers would take the names that the CUDA handlers get here.
sys.modules["ilajax._cpu"] = None  # type: ignore[assignment]

import jax

from benchmarks import RESULTS, sass, timing
from benchmarks.gpu_check.tasks import rows as gpu_rows
from benchmarks.rows import Problem, Row
from cuda_on_host import build, machine_code, plugin
from experiments import frame

STEM = "instructions"
SHARED_MEMORY = 227 << 10  # of an H100's block
MOST_SITES = 1 << 26  # of a batch


class Counter:
    """Runs calls on the machine code, and counts. One for a process."""

    def __init__(self) -> None:
        build.MACHINE.make("_cuda_on_host")
        self.module = plugin.use(build.MACHINE, SHARED_MEMORY)
        self.kernels = machine_code.load(self.module)

    def count(self, problem: Problem) -> dict[int, list[int]]:
        """Kernel -> warps that came to each of its instructions, in one call."""
        layer = problem.layer()
        call = jax.jit(layer.function).lower(*layer.operands).compile()
        self._take()
        jax.block_until_ready(call(*layer.operands))
        return self._take()

    def _take(self) -> dict[int, list[int]]:
        counts = {kernel: self.module.take_counts(kernel) for kernel in self.kernels}
        return {kernel: each for kernel, each in counts.items() if any(each)}

    def by_kernel(self, counts: Mapping[int, Sequence[int]], scale: int) -> dict[str, int]:
        """Name -> instructions, those that take most first."""
        totals: collections.Counter[str] = collections.Counter()
        for kernel, each in counts.items():
            totals[self.kernels[kernel].name] += scale * sum(each)
        return dict(totals.most_common())

    def by_line(self, counts: Mapping[int, Sequence[int]], scale: int) -> collections.Counter[str]:
        """Line of the source, behind the kernel -> instructions."""
        lines: collections.Counter[str] = collections.Counter()
        for kernel, each in counts.items():
            of = self.kernels[kernel]
            for code in of.instructions:
                lines[f"{of.name} {code.source}"] += scale * each[code.address // 16]
        return lines


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    if sass.missing():
        sys.exit(sass.missing())
    record = timing.provenance("cuda_on_host.instructions", arguments)
    counter = Counter()
    record["code"] = digests(list(counter.kernels.values()))
    record["rows"] = {}
    for row in rows(options.rows):
        problem, scale = counted_part(row)
        counts = counter.count(problem)
        kernels = counter.by_kernel(counts, scale)
        record["rows"][row.name] = kernels
        print(f"{row.name}: {_millions(sum(kernels.values()))} M", flush=True)
        for line, count in counter.by_line(counts, scale).most_common(options.lines):
            print(f"  {_millions(count)} M {line}", flush=True)
    if options.report:
        frame.write_json(options.report / f"{STEM}.json", record)
        frame.write_page(
            options.report / f"{STEM}.md",
            "# Instructions of the CUDA kernels",
            f"`{record['command']}` at commit {record['commit']}: millions of instructions that the "
            "warps of a whole call execute, counted on the machine code of sm_90. No GPU was there, and "
            "this is no time.",
            _cells(record["rows"]),
        )
    return record


def rows(names: Sequence[str] | None = None) -> list[Row]:
    """The rows of the GPU benchmark, or those of some names."""
    return [row for row in gpu_rows(small=False) if names is None or row.name in names]


def counted_part(row: Row) -> tuple[Problem, int]:
    """The row's layer on as much of its batch as is counted, and how many times that is the batch.

    Plans cut small batches into smaller tiles, so that only a sample with tiles enough may stand for all.
    """
    problem = row.problems["ilajax"]
    if problem.resolution**3 * problem.batch <= MOST_SITES:
        return problem, 1
    return dataclasses.replace(problem, batch=1), problem.batch


def digests(kernels: Sequence[sass.Kernel]) -> dict[str, str]:
    """File and name of each kernel -> a hash of its instructions."""
    found = {}
    for kernel in kernels:
        codes = "\n".join(f"{c.predicate} {c.opcode} {c.operands}" for c in kernel.instructions)
        codes = re.sub(r"\.L_x_\d+", "", codes)
        found[f"{kernel.file} {kernel.name}"] = hashlib.sha256(codes.encode()).hexdigest()[:16]
    return dict(sorted(found.items()))


def _cells(counted: Mapping[str, Mapping[str, int]]) -> list[frame.Cells]:
    families: collections.Counter[str] = collections.Counter()
    for kernels in counted.values():
        families.update(kernels)
    names = [name for name, _ in families.most_common()]
    cells: list[frame.Cells] = [("row", "all", *names)]
    for row, kernels in counted.items():
        shown = (_millions(kernels[name]) if name in kernels else "" for name in names)
        cells.append((row, _millions(sum(kernels.values())), *shown))
    return cells


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("cuda_on_host.instructions", __doc__)
    add = parser.add_argument
    names = [row.name for row in rows()]
    add(
        "--rows", nargs="+", choices=names, metavar="ROW", help="of these only: " + "; ".join(names)
    )
    add("--lines", type=frame.whole, default=0, metavar="N", help="costliest lines to print")
    frame.add_report(parser, f"{STEM}.{{json,md}}", RESULTS)
    return parser


if __name__ == "__main__":
    frame.run(main)
