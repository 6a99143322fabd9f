"""What the compiler gives each CUDA kernel: registers, shared memory, spills. Needs nvcc, and no GPU.

    python -m benchmarks.kernel_resources                   # minutes; ends with 1 if anything spills
    python -m benchmarks.kernel_resources --report          # benchmarks/results/kernel_resources.{json,md}

Compiles every .cu file of xla_kernels, as CMakeLists.txt does, with a warning as an error, and reads what
ptxas says. Shared memory that a launch asks for comes on top of the figures. Of a kernel's instantiations
(dtypes, axes) the table has one row each.
"""

import argparse
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
SHOWN = ("registers", "spills", "shared")

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = _options(argv)
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not in PATH: install the CUDA toolkit, 13 or newer. A GPU is not needed.")
    rows: list[Row] = []
    with frame.Reporter() as reporter:
        files = [KERNELS / name for name in options.files or sources()]
        reporter.begin("files", len(files), 0)
        for path in files:
            reporter.step(path.name)
            new = resources(path, options.architectures)
            rows += new
            for row in new:
                reporter.print(
                    f"{row['file']} sm_{row['architecture']} {row['kernel']}: {figures(row)}"
                )
        if options.report:
            record = {"compiler": compiler(), "kernels": rows}
            json_file, markdown = (
                options.report / f"kernel_resources.{suffix}" for suffix in ("json", "md")
            )
            frame.write_json(json_file, record)
            frame.write_text(markdown, page(record))
            reporter.print(f"wrote {json_file}, {markdown}")
    spilling = [row for row in rows if row["spills"]]
    if spilling:
        names = (f"{row['kernel']} on sm_{row['architecture']}" for row in spilling)
        sys.exit("registers are spilled by " + ", ".join(names))
    return rows


def sources() -> list[str]:
    """The .cu files."""
    return sorted(str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.cu"))


def compiler() -> str:
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release .*", done.stdout)
    return f"nvcc, {release[0]}" if release else "nvcc"


def resources(path: Path, architectures: Sequence[str]) -> list[Row]:
    """Compiles a file and reads what each of its kernels takes."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    includes = [f"-I{KERNELS.parent}", "-isystem", str(Path(jaxlib.__path__[0]) / "include")]
    command = ["nvcc", *FLAGS, *targets, *includes, "-c", str(path), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    rows = parse(done.stderr, str(path.relative_to(KERNELS)))
    return sorted(rows, key=lambda row: (row["kernel"], int(row["architecture"])))


def parse(log: str, file: str) -> Iterator[Row]:
    """The kernels in what ptxas says under -v."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", log)
    for mangled, architecture, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):

        def find(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        yield {
            "file": file,
            "kernel": demangle(mangled),
            "architecture": architecture,
            "registers": find(r"Used (\d+) registers"),
            "spills": find(r"(\d+) bytes spill stores") + find(r"(\d+) bytes spill loads"),
            "shared": find(r"(\d+) bytes smem"),
            "stack": find(r"(\d+) bytes stack frame"),
        }


def demangle(name: str) -> str:
    """A kernel's name and its template arguments, without namespaces and parameters."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    text = re.sub(r"\(anonymous namespace\)::|ilajax::|\bselect_kernels::|^void ", "", done.stdout)
    text = re.sub(r"\((?:int|Pass|ilajax::\w+)\)", "", text)
    return re.sub(r"\(.*", "", text).strip()


def figures(row: Row) -> str:
    return f"{row['registers']} registers, {row['spills']} B spilled, {row['shared']} B shared"


def page(record: dict[str, Any]) -> str:
    """The report: a row for each kernel, columns for the architectures."""
    kernels: dict[tuple[str, str], dict[str, Row]] = {}
    for row in record["kernels"]:
        kernels.setdefault((row["file"], row["kernel"]), {})[row["architecture"]] = row
    architectures = sorted({row["architecture"] for row in record["kernels"]}, key=int)
    cells = [["kernel", *(f"sm_{architecture}" for architecture in architectures)]]
    for (file, kernel), found in kernels.items():
        each = [
            " / ".join(str(found[a][what]) for what in SHOWN) if a in found else ""
            for a in architectures
        ]
        cells.append([f"{file} `{kernel}`", *each])
    head = [
        "# Resources of the CUDA kernels",
        "",
        "`python -m benchmarks.kernel_resources --report`: what the compiler says, without a GPU.",
        f"{record['compiler']}.",
        "Registers of a thread / bytes of spills / bytes of static shared memory of a block.",
        "",
    ]
    return "\n".join([*head, *frame.markdown_table(cells)]) + "\n"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = frame.parser("benchmarks.kernel_resources", __doc__)
    parser.add_argument("files", nargs="*", metavar="FILE.cu", help="of xla_kernels; default: all")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="90")
    frame.add_report(parser, "kernel_resources.{json,md}", RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
