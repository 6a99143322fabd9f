"""Runs tasks of the benchmark in one process until one fails: it may have broken the device.

    python -m benchmarks.gpu_check.tasks [--small] TASK...

Prints a line of JSON for each task.
"""

import argparse
import sys

from benchmarks import measure
from benchmarks.gpu_check.process import to_line
from benchmarks.rows import ROWS, Row


def rows(*, small: bool) -> list[Row]:
    """The rows about layers on a GPU; of a dry run the first of each kind, on small grids."""
    found = [row for row in ROWS if "gpu" in row.targets and row.problems]
    if not small:
        return found
    kinds = {}
    for row in found:
        problem = row.problems["ilajax"]
        kind = (problem.subset is None, problem.support, problem.backward, problem.dtype)
        kinds.setdefault(kind, row.small())
    return list(kinds.values())


def batches(*, small: bool) -> dict[str, dict[str, measure.Task]]:
    """Batch -> name -> task."""
    effort = measure.SMALL if small else measure.Effort()
    return measure.tasks(rows(small=small), "gpu", effort)


def main(arguments: list[str] | None = None) -> int:
    """Runs the tasks that are named; returns 1 if one failed, behind which none is run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.tasks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--small", action="store_true", help="small layers, for a dry run")
    options = parser.parse_args(arguments)
    named = {
        n: task for batch in batches(small=options.small).values() for n, task in batch.items()
    }
    for name in options.tasks:
        record = measure.attempt(named[name])
        print(to_line({"task": name, **record}), flush=True)
        if "error" in record:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
