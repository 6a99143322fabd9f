"""A pytest plugin for the suite on a GPU, where time is short and a bad kernel takes its process down.

    pytest -p benchmarks.gpu_check.plugin

- What runs on kernels comes first: what a limit on the time cuts off is the reference.
- The outcome of each test is reported at once, so that a run that was stopped has told what it found.
- A worker of pytest-xdist whose CUDA context an error has broken ends, and gets a successor: every later
  test of that process would fail too, and quickly, so that it would take most of the tests.
"""

import os
import re

import pytest

from benchmarks.gpu_check.process import to_line

BROKEN = re.compile(
    r"(CUDA_ERROR_|cudaError)_?(ILLEGAL|MISALIGNED|LAUNCH_(FAILED|TIMEOUT)|HARDWARE_STACK|INVALID_(PC|ADDRESS)"
    r"|ASSERT|LaunchFailure|LaunchTimeout|HardwareStack|Invalid(Pc|AddressSpace)|ECC)",
    re.IGNORECASE,
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    def on_kernels(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("backend") == "native" or item.path.stem.endswith("_cuda")

    items.sort(key=on_kernels, reverse=True)


def pytest_configure(config):
    config.pluginmanager.register(Outcomes(config))


class Outcomes:
    """Tells outcomes in the process that has the terminal, and ends broken workers in the others."""

    def __init__(self, config):
        self._terminal = None if hasattr(config, "workerinput") else config
        self._broken = False

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._broken |= BROKEN.search(report.longreprtext) is not None
        if self._terminal and (report.when == "call" or not report.passed):
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            outcome = report.outcome if report.when == "call" or report.skipped else "error"
            self._tell({"test": report.nodeid, "outcome": outcome, "message": message[:1000]})

    def pytest_collection_finish(self, session):
        if self._terminal and session.items:
            self._tell({"tests": len(session.items)})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self._tell({"tests": len(ids)})

    def pytest_collectreport(self, report):
        if self._terminal and report.failed:
            message = report.longreprtext[-1000:]
            self._tell({"test": report.nodeid, "outcome": "error", "message": message})

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid):
        # The report is out, the test not yet done: this test is blamed for the end, and not the next one.
        if self._broken and not self._terminal:
            os._exit(1)

    def _tell(self, record):
        terminal = self._terminal.pluginmanager.getplugin("terminalreporter")
        terminal.write_line(to_line(record))
