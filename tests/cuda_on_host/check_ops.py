"""The tests of the ops on the CUDA kernels, under AddressSanitizer and UBSan: run by `make cuda-on-host`.

Not part of `make test`, since it takes minutes: that runs check_kernels.py.
"""

from cuda_on_host import build, run

# Every n-th case of these files.
EVERY = 6
FILES = sorted((run.TESTS / "ops").glob("test_*.py"))


def test_the_ops_on_cuda_kernels(tmp_path):
    """Catches a kernel that is wrong, touches memory it must not, or depends on the order of threads."""
    files = [build.HERE / "check_kernels.py", *FILES]
    run.run(build.SANITIZED, files, tmp_path / "executed", every=EVERY, processes=2)
