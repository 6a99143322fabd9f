"""Which lines of the CUDA kernels no case runs, and which loops may never go round twice.

    PYTHONPATH=tests python -m cuda_on_host.coverage    # minutes

Runs check_kernels.py and check_sizes.py on a build that counts, by gcov. That knows sums over all threads:
where the rounds of a loop are no more than its exits, somebody has to look.
"""

import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cuda_on_host import build, run

Lines = dict[tuple[str, int], list[dict[str, Any]]]


def counted(files: list[Path]) -> Lines:
    """What gcov says of each line of the kernels, once for each instantiation that has it."""
    for old in build.COVERED.folder.rglob("*.gcda"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        run.run(build.COVERED, files, Path(folder) / "executed")
    lines: Lines = collections.defaultdict(list)
    for data in build.COVERED.folder.rglob("*.cu.gcda"):
        command = ["gcov", "--json-format", "--stdout", "--branch-probabilities", str(data)]
        said = subprocess.run(command, capture_output=True, check=True, cwd=data.parent).stdout
        for report in said.splitlines():
            for file in json.loads(report)["files"]:
                path = Path(data.parent, file["file"]).resolve()
                if path.is_relative_to(build.KERNELS) and path.suffix in (".cu", ".cuh"):
                    name = str(path.relative_to(build.KERNELS))
                    for line in file["lines"]:
                        lines[name, line["line_number"]].append(line)
    return lines


def not_run(lines: Lines) -> Iterator[tuple[str, int]]:
    """The lines that run in no instantiation."""
    for place, found in sorted(lines.items()):
        if not any(line["count"] for line in found):
            yield place


def hardly_twice(lines: Lines) -> Iterator[tuple[str, int]]:
    """The loops whose condition holds no more often than it ends them."""
    for (name, number), found in sorted(lines.items()):
        text = (build.KERNELS / name).read_text().splitlines()[number - 1]
        if not re.search(r"\b(for|while) \(", text):
            continue
        rounds = exits = 0
        for line in found:
            branches = [branch for branch in line["branches"] if not branch["throw"]]
            # The last jump of a condition leads back into the loop.
            if len(branches) > 1:
                rounds += max(
                    (b["count"] for b in branches[-2:] if not b["fallthrough"]), default=0
                )
                exits += max((b["count"] for b in branches[-2:] if b["fallthrough"]), default=0)
        if exits and rounds <= exits:
            yield name, number


def show(title: str, places: Iterator[tuple[str, int]]) -> None:
    print(title)
    for name, number in places:
        text = (build.KERNELS / name).read_text().splitlines()[number - 1]
        print(f"  {name}:{number}: {text.strip()}")


if __name__ == "__main__":
    found = counted([build.HERE / "check_kernels.py", build.HERE / "check_sizes.py"])
    show("Lines that no case runs:", not_run(found))
    show("Loops that go round once at most, in the mean:", hardly_twice(found))
