"""What the compiler gives each CUDA kernel: registers, shared memory, spills. Needs nvcc, and no GPU.

    python -m benchmarks.kernel_resources                   # minutes; ends with 1 if anything spills
    python -m benchmarks.kernel_resources --report          # benchmarks/results/kernel_resources.{json,md}

Compiles every .cu file of xla_kernels, as CMakeLists.txt does, with a warning as an error, and reads what
ptxas says. Shared memory that a launch asks for comes on top of the figures. Of a kernel's instantiations
(dtypes, axes) the table has one row each.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxlib

from benchmarks import RESULTS
from experiments import frame

KERNELS = Path(__file__).resolve().parents[1] / "xla_kernels"
# Ampere, Hopper, Blackwell of data centres and of workstations.
ARCHITECTURES = ("80", "90", "100", "120")
# As CMakeLists.txt has them, and warnings as errors.
FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-Xcompiler=-Wall,-Wextra,-Werror", "-Werror=all-warnings", "-Xptxas=-v"),
]

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = frame.parser("benchmarks.kernel_resources", __doc__)
    frame.add_report(parser, "kernel_resources.{json,md}", RESULTS)
    options = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not in PATH: install the CUDA toolkit, 13 or newer. A GPU is not needed.")
    rows: list[Row] = []
    with frame.Reporter() as reporter:
        files = sources()
        reporter.begin("files", len(files), 0)
        for file in files:
            reporter.step(file)
            for row in resources(file, ARCHITECTURES):
                figures = "{registers} registers, {spills} B spilled, {shared} B shared"
                line = "{file} sm_{architecture} {kernel}: " + figures
                reporter.print(line.format(**row))
                rows.append(row)
    if options.report:
        said = subprocess.check_output(["nvcc", "--version"], text=True)
        record = {"compiler": f"nvcc, {re.findall('release .*', said)[0]}", "kernels": rows}
        frame.write_json(options.report / "kernel_resources.json", record)
        frame.write_text(options.report / "kernel_resources.md", page(record))
    spilling = ["{kernel} on sm_{architecture}".format(**row) for row in rows if row["spills"]]
    if spilling:
        sys.exit("registers are spilled by " + ", ".join(spilling))
    return rows


def sources() -> list[str]:
    return sorted(str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.cu"))


def resources(file: str, architectures: Sequence[str]) -> list[Row]:
    """Compiles a file and reads what each of its kernels takes."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    includes = [f"-I{KERNELS.parent}", "-isystem", str(Path(jaxlib.__path__[0]) / "include")]
    command = ["nvcc", *FLAGS, *targets, *includes, "-c", str(KERNELS / file), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    rows = parse(done.stderr, file)
    return sorted(rows, key=lambda row: (row["kernel"], int(row["architecture"])))


def parse(log: str, file: str) -> Iterator[Row]:
    """The kernels in what ptxas says under -v."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", log)
    for mangled, architecture, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):

        def find(pattern: str, text: str = text) -> int:
            return sum(map(int, re.findall(pattern, text)))

        yield {
            "file": file,
            "kernel": demangle(mangled),
            "architecture": architecture,
            "registers": find(r"Used (\d+) registers"),
            "spills": find(r"(\d+) bytes spill (?:stores|loads)"),
            "shared": find(r"(\d+) bytes smem"),
            "stack": find(r"(\d+) bytes stack frame"),
        }


def demangle(name: str) -> str:
    """A kernel's name and its template arguments, without namespaces and parameters."""
    text = subprocess.check_output(["c++filt", name], text=True)
    text = re.sub(r"\(anonymous namespace\)::|ilajax::|\bselect_kernels::|^void ", "", text)
    text = re.sub(r"\((?:int|Pass|ilajax::\w+)\)", "", text)
    return re.sub(r"\(.*", "", text).strip()


def page(record: dict[str, Any]) -> str:
    """The report: a row for each kernel, columns for the architectures."""
    kernels: dict[str, dict[str, str]] = {}
    for row in record["kernels"]:
        figures = "{registers} / {spills} / {shared}".format(**row)
        kernels.setdefault("{file} `{kernel}`".format(**row), {})[row["architecture"]] = figures
    architectures = sorted({a for found in kernels.values() for a in found}, key=int)
    cells = [["kernel", *(f"sm_{a}" for a in architectures)]]
    cells += [[name, *(found.get(a, "") for a in architectures)] for name, found in kernels.items()]
    head = [
        "# Resources of the CUDA kernels",
        "",
        "`python -m benchmarks.kernel_resources --report`: what the compiler says, without a GPU.",
        f"{record['compiler']}.",
        "Registers of a thread / bytes of spills / bytes of static shared memory of a block.",
        "",
    ]
    return "\n".join([*head, *frame.markdown_table(cells)]) + "\n"


if __name__ == "__main__":
    main()
