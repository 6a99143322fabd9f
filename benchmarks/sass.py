"""The machine code of the CUDA kernels, as functions, basic blocks and instructions. Needs nvcc, and no GPU.

    python -m benchmarks.sass                   # a line for each kernel: blocks, instructions, registers
    python -m benchmarks.sass conv/cuda.cu      # of this file only

nvcc makes a cubin of each .cu file and nvdisasm its text, which is read here. Both stay in build/sass/ under
a hash of all that went in. -lineinfo only adds the source's lines: the code is the same without.

nvdisasm comes with the CUDA toolkit, or by `pip install nvidia-cuda-nvdisasm`.
"""

import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jaxlib

from benchmarks import kernel_resources
from benchmarks.kernel_resources import KERNELS, Row

ROOT = KERNELS.parent
CACHE = ROOT / "build" / "sass"
# Two compilers at a time: what the smallest machines have cores for.
JOBS = 2
FLAGS = [*kernel_resources.FLAGS, "-lineinfo"]

# Instructions after which comes the next one, another, or none.
JUMPS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")


class Instruction(NamedTuple):
    """One instruction: `/*0260*/ @!P0 BRA `(.L_x_0) ;` has predicate "!P0", opcode "BRA"."""

    address: int
    predicate: str  # "" where it is always executed
    opcode: str  # with what modifies it: "LDG.E.64"
    operands: tuple[str, ...]
    source: str  # "xla_kernels/conv/cuda.cu:12", the innermost line that is not CUDA's own; or ""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def target(self) -> str:
        """The label or function that the last operand names."""
        found = re.search(r"`\((.+?)\)", self.operands[-1]) if self.operands else None
        return found[1] if found else ""

    @property
    def conditional(self) -> bool:
        """Whether it may be passed over, or a jump not be taken, by a predicate."""
        jumps = self.name in JUMPS and re.search(r"\bU?P\d", " ".join(self.operands))
        return bool(self.predicate or jumps)


@dataclass
class Block:
    """Instructions that are executed one after another, all or none, if each has its turn."""

    index: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # indices; none behind EXIT and RET


@dataclass
class Function:
    """A kernel, or a routine of the compiler's that a kernel calls (a division of int64).

    Control enters at the first block. A call is no end of a block: control comes back.
    """

    name: str  # mangled
    blocks: list[Block]
    routines: dict[str, "Function"]  # of a kernel, by name

    @property
    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions


@dataclass
class Kernel:
    file: str  # below xla_kernels, or any path
    name: str  # without namespaces and parameters
    code: Function
    text: str  # as nvdisasm prints it
    resources: Row  # of kernel_resources

    @property
    def digest(self) -> str:
        """A hash of its instructions."""
        codes = "\n".join(f"{c.predicate} {c.opcode} {c.operands}" for c in self.instructions)
        # Targets have names that depend on where the source lies.
        return hashlib.sha256(re.sub(r"`\(.*?\)", "", codes).encode()).hexdigest()[:16]

    @property
    def functions(self) -> list[Function]:
        return [self.code, *self.code.routines.values()]

    @property
    def instructions(self) -> Iterator[Instruction]:
        for function in self.functions:
            yield from function.instructions


def missing() -> str:
    """What is not installed, "" if all is."""
    if shutil.which("nvcc") is None:
        return "needs nvcc, of the CUDA toolkit, in PATH"
    if nvdisasm() is None:
        return "needs nvdisasm: pip install nvidia-cuda-nvdisasm"
    return ""


@functools.cache
def nvdisasm() -> str | None:
    """The disassembler: in PATH, beside nvcc, or of the Python package."""
    folders = [Path(found).parent for found in [shutil.which("nvcc")] if found]
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(Path(place).glob("cu*/bin"))
    places = [str(folder / "nvdisasm") for folder in folders]
    return next(filter(None, map(shutil.which, ["nvdisasm", *places])), None)


def kernels(files: Sequence[str] | None = None, architecture: str = "90") -> list[Kernel]:
    """The kernels of .cu files, by default all of xla_kernels; compiles what is not in the cache."""
    with ThreadPoolExecutor(JOBS) as pool:
        names = kernel_resources.sources() if files is None else list(files)
        texts = list(pool.map(lambda file: disassemble(file, architecture), names))
    return [
        kernel
        for file, (log, sass) in zip(names, texts, strict=True)
        for kernel in _kernels(file, log, sass)
    ]


def disassemble(file: str, architecture: str, flags: Sequence[str] = FLAGS) -> tuple[str, str]:
    """What ptxas says under -v, and nvdisasm's text; from the cache if nothing has changed."""
    source = KERNELS / file  # an absolute path stays as it is
    compiler, disassembler = _tools()
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    state = [str(ROOT), file, target, *flags, compiler, disassembler, jaxlib.__version__]
    digest = hashlib.sha256("\n".join(state).encode() + source.read_bytes() + _headers())
    front = re.sub(r"\W+", "_", file).strip("_") + f"-sm_{architecture}"
    stem = CACHE / f"{front}-{digest.hexdigest()[:20]}"
    log, sass = stem.with_suffix(".log"), stem.with_suffix(".sass")
    if not sass.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        cubin = stem.with_suffix(".cubin")
        includes = [f"-I{ROOT}", "-isystem", str(Path(jaxlib.__path__[0]) / "include")]
        command = ["nvcc", *flags, target, *includes, "-cubin", str(source), "-o", str(cubin)]
        log.write_text(_run(command).stderr)
        text = _run([nvdisasm() or "nvdisasm", "-gi", "-c", str(cubin)]).stdout
        # The text comes last and whole: where it is, so is the rest.
        sass.with_suffix(".part").write_text(text)
        sass.with_suffix(".part").replace(sass)
    return log.read_text(), sass.read_text()


def parse(sass: str) -> Iterator[tuple[Function, str]]:
    """The kernels in what `nvdisasm -gi -c` prints, and the text of each."""
    sections = re.split(r"^//-+ \.text\.(\S+) -+$", sass, flags=re.MULTILINE)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        routines = _functions(text)
        yield Function(name, routines.pop(name).blocks, routines), text


def main(argv: Sequence[str] | None = None) -> None:
    files = list(sys.argv[1:] if argv is None else argv)
    if missing():
        sys.exit(missing())
    for kernel in kernels(files or None):
        blocks = sum(len(f.blocks) for f in kernel.functions)
        count = sum(1 for f in kernel.functions for _ in f.instructions)
        registers = kernel.resources["registers"]
        name = f"{kernel.file} {kernel.name}"
        print(f"{name}: {blocks} blocks, {count} instructions, {registers} registers")


def _kernels(file: str, log: str, sass: str) -> list[Kernel]:
    resources = {row["kernel"]: row for row in kernel_resources.parse(log, file)}
    found = []
    for code, text in parse(sass):
        name = kernel_resources.demangle(code.name)
        found.append(Kernel(file, name, code, text, resources.pop(name)))
    assert not resources, f"{file}: no code of {', '.join(resources)}"
    return sorted(found, key=lambda kernel: kernel.name)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done


@functools.cache
def _tools() -> tuple[str, str]:
    """The versions."""
    return _run(["nvcc", "--version"]).stdout, _run([nvdisasm() or "nvdisasm", "--version"]).stdout


def compiler() -> str:
    """The version of nvcc."""
    return f"nvcc, {re.findall('release .*', _tools()[0])[0]}"


@functools.cache
def _headers() -> bytes:
    """A hash of all that a .cu file may include."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*")):
        if path.suffix in (".h", ".cuh", ".inc", ".def"):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.digest()


def _functions(section: str) -> dict[str, Function]:
    """The functions of a section: the kernel, and what it calls."""
    found: dict[str, Function] = {}
    names = set(re.findall(r"^\s+\.type\s+(\S+),@function", section, flags=re.MULTILINE))
    name, source, ends = "", "", True
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}  # to the number of the instruction behind it

    def finish() -> None:
        if name:
            found[name] = Function(name, _blocks(instructions, labels), {})

    for line in section.splitlines():
        if match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            instructions.append(_instruction(int(match[1], 16), match[2], source))
            ends = True
        elif match := re.match(r"\s*//## File \"(.*?)\", line (\d+)", line):
            # The innermost line comes first, then where it is inlined.
            if ends or source.startswith("/"):
                source = f"{_relative(match[1])}:{match[2]}"
            ends = False
        elif match := re.match(r"(\S+):$", line):
            if match[1] in names:
                finish()
                name, instructions, labels, source = match[1], [], {}, ""
            else:
                labels[match[1]] = len(instructions)
    finish()
    return found


@functools.cache
def _relative(path: str) -> str:
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else resolved)


def _instruction(address: int, text: str, source: str) -> Instruction:
    predicate, opcode, rest = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", text).groups()  # type: ignore[union-attr]
    operands = tuple(part.strip() for part in re.split(r",(?![^(]*\*\))", rest) if part.strip())
    return Instruction(address, predicate or "", opcode, operands, source)


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[Block]:
    """Cuts behind jumps and in front of their targets.

    BSYNC waits for lanes and goes on at a label, which stands behind it; BRA.DIV goes to a copy of what
    follows, for a warp whose lanes are apart, and comes back.
    """
    starts = {0}
    for i, instruction in enumerate(instructions):
        if instruction.name in JUMPS:
            starts |= {i + 1, *(labels[label] for label in _targets(instruction, labels))}
    # What fills up the end of the section is no code.
    while instructions and instructions[-1].name == "NOP":
        instructions = instructions[:-1]
    cuts = sorted(start for start in starts if start < len(instructions))
    numbers = {start: index for index, start in enumerate(cuts)}
    blocks = []
    for index, (begin, end) in enumerate(zip(cuts, [*cuts[1:], len(instructions)], strict=True)):
        last = instructions[end - 1]
        next_ones = [labels[label] for label in _targets(last, labels)]
        sure = not last.conditional or (last.name == "BRX" and not last.predicate)
        if last.name not in JUMPS or not sure or "DIV" in last.modifiers:
            next_ones.append(end)
        # Behind a last jump to itself stands nothing.
        successors = [numbers[i] for i in dict.fromkeys(next_ones) if i in numbers]
        blocks.append(Block(index, instructions[begin:end], successors))
    return blocks


def _targets(instruction: Instruction, labels: dict[str, int]) -> list[str]:
    if instruction.name not in JUMPS or instruction.name in ("EXIT", "RET", "KILL"):
        return []
    found = re.findall(r"\.L_x_\d+", " ".join(instruction.operands))
    if not found:
        raise ValueError(f"a jump to nobody knows where: {instruction}")
    return [label for label in found if label in labels]


if __name__ == "__main__":
    main()
