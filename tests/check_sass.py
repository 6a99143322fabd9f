"""What the machine code of the CUDA kernels shows, without a GPU; run by `make sanitize`.

Local memory, a product that is rounded before it is added, and lanes that may not meet.

The code is sm_90's; the first run compiles, for a minute or two.
"""

import collections
import functools
from pathlib import Path

import pytest

from benchmarks import sass
from benchmarks.sass import Instruction, Kernel

pytestmark = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing())

# tests/cuda_on_host/grid.cc and xla_kernels/common/cuda.h count so much where there is dynamic shared memory.
STATIC_SHARED = 2048
DYNAMIC_SHARED = ("PrepareKernel", "TileKernel", "GradientKernel")
# Sums of products that are made twice and must come out with the same bits: by the passes of conv (counted,
# refined, written), and for a site's score and its values.
SUMMED_TWICE = ("TileKernel", "ScoreKernel", "ApplyKernel")
# Where the compiler cannot tell that all lanes of a warp are at one place, say at a vote behind a loop whose
# rounds each lane counts, its code says so. Somebody has looked at so many places of each kernel (the most of
# its instantiations): what the branch there depends on is the same in all lanes, or the loop is over.
DOUBTS = {
    "CountDigitsOfChunks": 4,
    "CountKernel": 1,
    "EmitChunks": 5,
    "FinishKernel": 1,
    "GradientKernel": 3,
    "PoolKernel": 2,
    "PrepareKernel": 7,
    "ScoreKernel": 1,
    "TallyChunks": 4,
    "TileKernel": 95,
    "WeightSumsKernel": 6,
    "WholeSegments": 3,
}


@functools.cache
def kernels(*files: str) -> list[Kernel]:
    return sass.kernels(files or None)


def bugs() -> dict[str, Kernel]:
    return {k.name: k for k in kernels(str(Path(__file__).with_name("sass_bugs.cu")))}


def family(kernel: Kernel) -> str:
    return kernel.name.partition("<")[0]


def said(kernel: Kernel, codes: list[Instruction]) -> list[str]:
    return [f"{kernel.file} {kernel.name}: {code.opcode} at {code.source}" for code in codes]


def local(kernel: Kernel) -> list[Instruction]:
    """Where it goes to local memory."""
    return [code for code in kernel.instructions if code.name in ("LDL", "STL")]


def apart(kernel: Kernel) -> list[Instruction]:
    """Where a product is rounded, before anything is added."""
    return [code for code in kernel.instructions if code.name in ("FMUL", "FMUL32I")]


def doubts(kernel: Kernel) -> list[Instruction]:
    """Where lanes may have to wait for each other: WARPSYNC.ALL, or a way for lanes that are apart."""
    return [
        code
        for code in kernel.instructions
        if code.opcode == "WARPSYNC.ALL" or code.opcode.startswith("BRA.DIV")
    ]


def test_memory():
    """Catches an array in local memory, a spilled register, and more static shared memory than counts."""
    assert [line for k in kernels() for line in said(k, local(k))] == []
    assert [k.name for k in kernels() if k.resources["stack"]] == []
    counted = [k for k in kernels() if family(k) in DYNAMIC_SHARED]
    assert {family(k) for k in counted} == set(DYNAMIC_SHARED)
    assert [k.name for k in counted if k.resources["shared"] > STATIC_SHARED] == []


def test_sums_that_are_made_twice():
    """Catches a sum of products that is contracted in one pass and not in another.

    A response would be counted with other bits than it is written with, and too many be kept, or too few.
    """
    twice = [k for k in kernels() if family(k) in SUMMED_TWICE]
    assert {family(k) for k in twice} == set(SUMMED_TWICE)
    assert [line for k in twice for line in said(k, apart(k))] == []
    assert [k.name for k in twice if all(code.name != "FFMA" for code in k.instructions)] == []


def test_lanes_meet():
    """Catches a shuffle, a vote or a barrier under a branch that only some lanes may take."""
    most: dict[str, int] = collections.defaultdict(int)
    new = []
    for kernel in kernels():
        found = doubts(kernel)
        most[family(kernel)] = max(most[family(kernel)], len(found))
        if len(found) > DOUBTS.get(family(kernel), 0):
            new += said(kernel, found)
    assert new == [], f"Look at these places; then DOUBTS is {dict(most)}"
    assert {name: count for name, count in most.items() if count} == DOUBTS


BUGS_OF_LANES = ("ShuffleInBothBranches", "ShuffleBehindContinue", "BallotInLanesLoop")


def test_bugs_are_seen():
    """Catches a test that has gone blind."""
    assert all(doubts(bugs()[name]) for name in BUGS_OF_LANES)
    assert local(bugs()["LocalArray"])
    assert apart(bugs()["ProductRounded"])
    assert bugs()["TooMuchStaticShared"].resources["shared"] > STATIC_SHARED
    right = bugs()["Right"]
    assert local(right) + apart(right) + doubts(right) == []


def test_lines_do_not_change_the_code():
    """Catches a compiler whose -lineinfo is not for free: the code would be another."""
    flags = [flag for flag in sass.FLAGS if flag != "-lineinfo"]
    path = str(Path(__file__).with_name("sass_bugs.cu"))
    without = [code for code, _ in sass.parse(sass.disassemble(path, "90", flags)[1])]
    have = {k.code.name: [code[:4] for code in k.code.instructions] for k in bugs().values()}
    assert {f.name: [code[:4] for code in f.instructions] for f in without} == have
