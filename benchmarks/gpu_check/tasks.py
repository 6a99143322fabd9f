"""Runs tasks of the benchmark in one process until one fails: it may have broken the device.

Prints a line of JSON for each task.
"""

import dataclasses
import sys

from benchmarks import measure
from benchmarks.gpu_check.process import to_line
from benchmarks.rows import ROWS, Row
from experiments import frame


def rows(*, small: bool) -> list[Row]:
    """The rows about layers on a GPU; of a dry run the first of each kind, on small grids."""
    found = [row for row in ROWS if "gpu" in row.targets and row.problems]
    if not small:
        return found
    kinds = {}
    for row in found:
        problem = row.problems["ilajax"]
        kind = (problem.subset is None, problem.support, problem.backward, problem.dtype)
        little = dataclasses.replace(row, candidates={"ilajax": problem.small()})
        kinds.setdefault(kind, little)
    return list(kinds.values())


def batches(*, small: bool) -> dict[str, dict[str, measure.Task]]:
    """Batch -> name -> task."""
    return measure.tasks(rows(small=small), "gpu", measure.SMALL if small else measure.Effort())


def main(arguments: list[str] | None = None) -> int:
    """Runs the tasks that are named; returns 1 if one failed, behind which none is run."""
    parser = frame.parser("benchmarks.gpu_check.tasks", __doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="what to run")
    parser.add_argument("--small", action="store_true", help="small layers, for a dry run")
    options = parser.parse_args(arguments)
    found = batches(small=options.small).values()
    named = {name: task for batch in found for name, task in batch.items()}
    for name in options.tasks:
        record = measure.attempt(named[name])
        print(to_line({"task": name, **record}), flush=True)
        if "error" in record:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
