"""How many instructions the CUDA kernels take for each row of the GPU benchmark. Needs nvcc, and no GPU.

    PYTHONPATH=tests python -m cuda_on_host.instructions                  # all rows, many minutes
    PYTHONPATH=tests python -m cuda_on_host.instructions --rows "r256 1->8 random, rho_f=1" --lines 20
    PYTHONPATH=tests python -m cuda_on_host.instructions --report

--report writes benchmarks/results/instructions.{json,md} too. Runs the machine code of sm_90 itself (see
README.md) on the rows' own inputs, with the plans of an H100, and counts what each warp executes: whole
calls, without the launches' gaps. Of 512^3 one sample is counted, and stands for its batch; 1024^3 takes
too long.

--lines says which lines of the source take most, with all that is inlined there.
"""

import argparse
import collections
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "ILAJAX_BACKEND": "native"}
# Its handlers would take the names that the CUDA handlers get here.
sys.modules["ilajax._cpu"] = None  # type: ignore[assignment]

import jax

from benchmarks import RESULTS, sass, timing
from benchmarks.gpu_check.tasks import rows as gpu_rows
from benchmarks.rows import Problem, Row
from cuda_on_host import build, machine_code, plugin
from experiments import frame

STEM = "instructions"
# Kernel, by its number in the module -> how many warps came to each of its instructions.
Counts = dict[int, list[int]]

SHARED_MEMORY = 227 << 10  # of an H100's block
MOST_SITES = 1 << 26  # of a batch, or one sample is counted
LARGEST = 1 << 27  # grid


class Counter:
    """Runs calls on the machine code, and counts. One for a process."""

    def __init__(self) -> None:
        build.PLAIN.make("_cuda_on_host")
        self.module = plugin.use(build.PLAIN, SHARED_MEMORY)
        self.kernels = machine_code.load(self.module)

    def count(self, function: Callable[..., Any], *operands: Any) -> Counts:
        """What one call of a function executes."""
        call = jax.jit(function).lower(*operands).compile()
        jax.block_until_ready(operands)  # what makes them does not count
        self._take()
        jax.block_until_ready(call(*operands))
        return self._take()

    def count_row(self, row: Row) -> Counts:
        """What the layer of a row executes, with all of its batch."""
        problem, times = counted_part(row)
        layer = problem.layer()
        counts = self.count(layer.function, *layer.operands)
        return {kernel: [times * n for n in each] for kernel, each in counts.items()}

    def by_kernel(self, counts: Counts) -> dict[str, int]:
        """Name -> instructions, those that take most first."""
        totals: collections.Counter[str] = collections.Counter()
        for kernel, each in counts.items():
            totals[self.kernels[kernel].name] += sum(each)
        return dict(totals.most_common())

    def by_line(self, counts: Counts) -> collections.Counter[str]:
        """Kernel and line of the source -> instructions."""
        lines: collections.Counter[str] = collections.Counter()
        for kernel, each in counts.items():
            of = self.kernels[kernel]
            for code in of.instructions:
                lines[f"{of.name} {code.source}"] += each[code.address // 16]
        return lines

    def _take(self) -> Counts:
        counts = {kernel: self.module.take_counts(kernel) for kernel in self.kernels}
        return {kernel: each for kernel, each in counts.items() if any(each)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    if sass.missing():
        sys.exit(sass.missing())
    counter = Counter()
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(["python", "-m", "cuda_on_host.instructions", *given]),
        "commit": timing.commit(),
        "compiler": sass.compiler(),
        "code": digests(counter.kernels.values()),
        "rows": {},
    }
    for row in rows(options.rows):
        counts = counter.count_row(row)
        kernels = record["rows"][row.name] = counter.by_kernel(counts)
        print(f"{row.name}: {_millions(sum(kernels.values()))} M", flush=True)
        for line, count in counter.by_line(counts).most_common(options.lines):
            print(f"  {_millions(count)} M {line}", flush=True)
    if options.report:
        frame.write_json(options.report / f"{STEM}.json", record)
        frame.write_text(options.report / f"{STEM}.md", page(record))
    return record


def rows(names: Sequence[str] | None = None) -> list[Row]:
    """The rows of the GPU benchmark that are counted, or those of some names."""
    return [
        row
        for row in gpu_rows(small=False)
        if row.problems["ilajax"].resolution ** 3 <= LARGEST
        and (names is None or row.name in names)
    ]


def counted_part(row: Row) -> tuple[Problem, int]:
    """The row's layer on as much of its batch as is counted, and how many times that is the batch.

    Plans cut small batches into smaller tiles, so that only a sample with tiles enough may stand for all.
    """
    problem = row.problems["ilajax"]
    if problem.resolution**3 * problem.batch <= MOST_SITES:
        return problem, 1
    return dataclasses.replace(problem, batch=1), problem.batch


def digests(kernels: Iterable[sass.Kernel]) -> dict[str, str]:
    """File and name of each kernel -> a hash of its instructions."""
    return dict(sorted((f"{kernel.file} {kernel.name}", kernel.digest) for kernel in kernels))


def page(record: Mapping[str, Any]) -> str:
    """The record as a page to read."""
    lines = [
        "# Instructions of the CUDA kernels",
        "",
        f"`PYTHONPATH=tests {record['command']}` at commit {record['commit']}, {record['compiler']}: "
        "millions of instructions that the warps of a whole call execute, counted on the machine code of "
        "sm_90. Nothing was timed: no GPU was there.",
        "",
        *frame.markdown_table(_cells(record["rows"])),
    ]
    return "\n".join(lines) + "\n"


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
