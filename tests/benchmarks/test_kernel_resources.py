"""The report of the kernels' resources: read off a log, written, and up to date with the sources."""

import json
import shutil

import pytest

from benchmarks import RESULTS, kernel_resources
from cuda_on_host import kernels

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6ilajax1fIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN6ilajax1fIfEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1328 bytes smem
ptxas info    : Compiling entry function '_ZN6ilajax12_GLOBAL__N_11gEi' for 'sm_120'
ptxas info    : Function properties for _ZN6ilajax12_GLOBAL__N_11gEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_a_log_is_read():
    first, second = kernel_resources.parse(LOG, "a.cu")
    assert (first["kernel"], first["architecture"]) == ("f<float>", "90")
    assert [first[k] for k in ("registers", "spills", "shared", "stack")] == [40, 20, 1328, 16]
    assert (second["kernel"], second["registers"], second["shared"]) == ("g", 8, 0)
    page = kernel_resources.page({"compiler": "nvcc", "kernels": [first, second]})
    assert "| a.cu `f<float>` | 40 / 20 / 1328 |  |" in page


def test_the_report_has_all_kernels_and_no_spills():
    """Catches a kernel that was added, and the report not written again; or registers that do not suffice."""
    record = json.loads((RESULTS / "kernel_resources.json").read_text())
    assert {row["kernel"].partition("<")[0] for row in record["kernels"]} == kernels.names()
    assert {row["architecture"] for row in record["kernels"]} >= {"80", "90", "120"}
    assert not [row for row in record["kernels"] if row["spills"]]
    page = (RESULTS / "kernel_resources.md").read_text()
    assert page == kernel_resources.page(record)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_file_compiles_without_warnings(tmp_path, monkeypatch):
    (file,) = (name for name in kernel_resources.sources() if "to_dense" in name)
    monkeypatch.setattr(kernel_resources, "sources", lambda: [file])
    monkeypatch.setattr(kernel_resources, "ARCHITECTURES", ["90"])
    rows = kernel_resources.main(["--report", str(tmp_path)])
    assert {row["kernel"] for row in rows} >= {"FwdKernel<float>", "BwdKernel<BFloat16>"}
    assert (tmp_path / "kernel_resources.md").exists()
