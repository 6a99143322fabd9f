"""The machine code of the CUDA kernels, run on the host by `make sanitize`, where there is nvcc.

Goes with the plugin and CUDA_ON_HOST_MACHINE=1; see README.md.
"""

import json
import os
import subprocess
import sys

import jax
import pytest

import ilajax
import samples
from benchmarks import RESULTS, sass
from cuda_on_host import build, instructions, machine_code, run
from ilajax.ffi import registry

pytestmark = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing())

# What is written in place of a kernel, and what the report of a call says.
WRONG = {
    "an instruction that is not known": "FOO R0, R1",
    "beyond the end of shared memory": "STS [RZ+0x100000], RZ",
    "an address that is not aligned": "IMAD.MOV.U32 R2, RZ, RZ, 0x10001; IMAD.MOV.U32 R3, RZ, RZ, 0x1; "
    "STG.E desc[UR4][R2.64], RZ",
    "exchange values, but are not together": "S2R R0, SR_LANEID; ISETP.GT.AND P0, PT, R0, 0x3, PT; "
    "@P0 BRA `(B); UMOV UR4, 0xffffffff; BRA.DIV UR4, `(B); B: NOP",
    "wait at two places": "S2R R0, SR_LANEID; ISETP.GT.AND P0, PT, R0, 0x3, PT; @P0 BRA `(B); "
    "WARPSYNC.ALL; EXIT; B: WARPSYNC.ALL",
    "wait for others that do not come": "S2R R0, SR_LANEID; ISETP.GT.AND P0, PT, R0, 0x3, PT; "
    "BSSY B0, `(B); @P0 BRA `(A); BAR.SYNC.DEFER_BLOCKING 0x0; A: BSYNC B0; B: NOP",
}
# A row that takes seconds.
QUICK = "r256 1->8 rho_f=0.1, no selection"
# Lane l goes round max(1, l) times; then each leaves when it is done, or all wait for the last.
LOOP = (
    "S2R R0, SR_LANEID; MOV R1, RZ; {}"
    "A: VIADD R1, R1, 0x1; ISETP.GT.AND P0, PT, R0, R1, PT; @P0 BRA `(A){}"
)


@pytest.fixture
def call(monkeypatch):
    """A function that runs instructions in place of to_dense's kernels, and returns the counts of each."""
    monkeypatch.setenv("ILAJAX_BACKEND", "native")
    module = registry.extensions["cuda"].module
    kernels = machine_code.kernels()
    chosen = [number for number, kernel in kernels.items() if kernel.file.startswith("to_dense")]
    x = samples.tensor(0, 1, 1, (4, 4, 4), capacity=8)

    def run_code(codes):
        text = ""
        for at, code in enumerate(f"{codes}; EXIT".split("; ")):
            label, _, code = code.rpartition(": ")
            text += f"{label}:\n" if label else ""
            text += f"        /*{16 * at:04x}*/  {code} ;\n"
        for number in chosen:
            module.add_code(number, text, 0)
        jax.block_until_ready(ilajax.to_dense(x))
        (counts,) = filter(any, map(module.take_counts, chosen))
        return counts

    yield run_code
    for number in chosen:
        machine_code.add(module, number, kernels[number])


@pytest.mark.parametrize("report", WRONG)
def test_wrong_code(call, report):
    """Catches a machine that goes on where a GPU would fault, hang, or read what nobody has written."""
    with pytest.raises(Exception, match=report):
        call(WRONG[report])


def test_counts(call):
    """Catches lanes that are counted one by one, and lanes that meet where the code does not say so."""
    apart, together = (
        call(LOOP.format("", "")),
        call(LOOP.format("BSSY B0, `(B); ", "; BSYNC B0; B: NOP")),
    )
    warps = apart[0]
    assert [n / warps for n in apart] == [1, 1, 31, 31, 31, 31]
    assert [n / warps for n in together] == [1, 1, 1, 31, 31, 31, 31, 1, 1]


def test_kernels(tmp_path):
    """Catches machine code that is wrong where the source is right, and a kernel that no case runs."""
    files = [*run.cases(), build.HERE / "check_sizes.py"]
    run.run(build.PLAIN, files, tmp_path / "executed", processes=2)


def test_results_are_up_to_date(tmp_path):
    """Catches a change of the code whose counts nobody has looked at.

    The remedy: PYTHONPATH=tests python -m cuda_on_host.instructions --report
    """
    path = build.REPOSITORY / RESULTS / f"{instructions.STEM}.json"
    record = json.loads(path.read_text())
    assert list(record["rows"]) == [row.name for row in instructions.rows()]
    assert path.with_suffix(".md").read_text() == instructions.page(record)
    if record["compiler"] != sass.compiler():
        pytest.skip(f"counted of the code that {record['compiler']} makes")
    arguments = ["--rows", QUICK, "--report", str(tmp_path)]
    command = [sys.executable, "-m", "cuda_on_host.instructions", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=environment, check=True)
    fresh = json.loads((tmp_path / path.name).read_text())
    assert fresh["code"] == record["code"]
    assert fresh["rows"][QUICK] == record["rows"][QUICK]
