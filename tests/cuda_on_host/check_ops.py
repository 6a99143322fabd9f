"""The tests of the ops on the CUDA kernels, by `make sanitize` and `make cuda-on-host`."""

from cuda_on_host import build, run

FILES = sorted((run.TESTS / "ops").glob("test_*.py"))


def test_the_ops(tmp_path):
    """Catches a kernel that is wrong, or depends on the order of threads: all cases, and those of size."""
    files = [build.HERE / "check_kernels.py", build.HERE / "check_sizes.py", *FILES]
    run.run(build.PLAIN, files, tmp_path / "executed", processes=2)


def test_the_ops_sanitized(tmp_path):
    """Catches a kernel that touches memory it must not: every sixth case."""
    files = [build.HERE / "check_kernels.py", *FILES]
    run.run(build.SANITIZED, files, tmp_path / "executed", every=6, processes=2)
