"""The GPU check, as far as a machine without a GPU can tell: `make gpu-check ARGS=--dry-run` runs it all."""

import copy
import json
import os
import sys
import time

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import stages, tasks
from benchmarks.gpu_check.process import ROOT, Ended, from_line, run, to_line, together

PYTHON = sys.executable
FIRST = next(iter(tasks.batches(small=False)["ilajax"]))
RECORD = {
    "gpu": "A GPU",
    "driver": "1",
    "nvcc": "13",
    "dry_run": False,
    "command": "python -m benchmarks.gpu_check",
    "commit": "abc",
    "date": "today",
    "stages": {},
}


def with_stages(**facts):
    return RECORD | {"stages": facts}


# --- Processes -------------------------------------------------------------------------------------


def test_a_process_reports_line_by_line(tmp_path):
    program = f"print('. {to_line([1])}'); print('noise'); raise SystemExit(3)"
    lines = []
    ended = run([PYTHON, "-c", program], log=tmp_path / "log", limit=60, each=lines.append)
    assert [from_line(line) for line in lines] == [[1], None]
    assert (ended.code, ended.status, ended.tail(1)) == (3, "failed", ["noise"])
    assert "noise" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("limits", [{"limit": 2.0}, {"limit": 60.0, "patience": 2.0}])
def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path, limits):
    """A process that ignores signals, and whose child holds its output open."""
    child = "import time; time.sleep(100)"
    program = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid)\n"
        "child.wait()"
    )
    ended = run([PYTHON, "-c", program], log=tmp_path / "log", **limits)
    assert ended.status == "stopped at its limit"
    assert ended.seconds < 30
    for _ in range(100):
        if not running(int(ended.output)):
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_run_together(tmp_path):
    program = "import sys; print(sys.argv[1])"
    commands = {name: [PYTHON, "-c", program, name] for name in "ab"}
    ended = together(commands, folder=tmp_path, limit=60)
    assert {name: one.output for name, one in ended.items()} == {"a": "a\n", "b": "b\n"}


# --- The pytest plugin -----------------------------------------------------------------------------

SUITE = """
import os
import pytest

@pytest.mark.parametrize("backend", ["reference", "native"])
def test_order(backend):
    pass

def test_breaks_the_context():
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

def test_behind():
    pass

def test_fails():
    assert os.getpid() < 0, "an ordinary failure"
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_the_plugin_tells_outcomes_and_replaces_a_broken_worker(tmp_path, workers):
    """Without workers there is none to replace."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    command += ["-p", "xdist.plugin", "-n", str(workers)] if workers else []
    command += ["-p", "benchmarks.gpu_check.plugin", tmp_path / "test_suite.py"]
    ended = run(command, log=tmp_path / "log", limit=120, env=stages.NO_PLUGINS)
    reports = [r for r in map(from_line, ended.output.splitlines()) if r]
    counts = [r["tests"] for r in reports if "tests" in r]
    assert set(counts) == {5}
    tests = [r for r in reports if "test" in r]
    assert tests[0]["test"].endswith("test_order[native]")
    outcomes = {r["test"].partition("::")[2]: r["outcome"] for r in tests}
    assert outcomes["test_order[reference]"] == "passed"
    assert outcomes["test_behind"] == "passed"
    assert outcomes["test_fails"] == "failed"
    blamed = [r["message"] for r in tests if r["test"].endswith("test_breaks_the_context")]
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in blamed[0]
    assert any("crashed" in message for message in blamed) == bool(workers)


# --- The stages ------------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path):
    return stages.Check(tmp_path, True, lambda: None)


def test_a_task_that_hangs_or_dies_leaves_the_others(check, monkeypatch):
    """The program stands in for the benchmark: each task does what its name says."""
    program = (
        "import os, sys, time\n"
        "from benchmarks.gpu_check.process import to_line\n"
        "for task in sys.argv[1:]:\n"
        "    if task == 'die': os._exit(9)\n"
        "    if task == 'hang': time.sleep(100)\n"
        "    record = {'task': task, 'median_s': 1.0}\n"
        "    if task == 'fail': record = {'task': task, 'error': 'wrong'}\n"
        "    print(to_line(record), flush=True)\n"
        "    if task == 'fail': sys.exit(1)\n"
    )
    names = ["first", "fail", "second", "die", "hang", "third"]
    monkeypatch.setattr(stages, "batches", lambda small: {"batch": dict.fromkeys(names)})
    monkeypatch.setattr(stages, "TASK_LIMIT", 3)
    real = stages.run

    def instead(command, **options):
        tasks = [part for part in command if part in names]
        return real([PYTHON, "-c", program, *tasks], **options)

    monkeypatch.setattr(stages, "run", instead)
    facts = {}
    assert stages.bench(check, facts, 100.0) == "failed"
    assert list(facts["tasks"]) == names
    errors = {name: task["error"] for name, task in facts["tasks"].items() if "error" in task}
    assert list(errors) == ["fail", "die", "hang"]
    assert errors["fail"] == "wrong"
    assert "failed after" in errors["die"]
    assert "stopped at its limit" in errors["hang"]

    facts = {}
    assert stages.bench(check, facts, 0.0) == "failed"
    assert all("no time" in task["error"] for task in facts["tasks"].values())


def test_a_build_without_the_gpu_fails(check, monkeypatch):
    """JAX takes the CPU where its CUDA plugin is not installed, and all else would test the wrong device."""
    for dry, platform, status in (
        (True, "cpu", "passed"),
        (False, "gpu", "passed"),
        (False, "cpu", "failed"),
    ):
        probed = json.dumps({"platform": platform, "targets": []})
        ended = Ended(0, 1.0, f"a warning\n{probed}\nanother\n")
        monkeypatch.setattr(stages, "run", lambda *args, ended=ended, **options: ended)
        check.dry = dry
        assert stages.build(check, {}, 60.0) == status


def test_same_bits_in_all_processes(check, monkeypatch):
    """A digest that differs from process to process is seen."""
    script = check.folder / "digest.py"
    monkeypatch.setattr(stages, "DIGEST", script)
    for program, status in (
        ("print('{\"a\": 1}')", "passed"),
        ("import json, os; print(json.dumps({'a': os.getpid(), 'b': 1}))", "failed"),
        ("raise SystemExit(1)", "failed"),
    ):
        script.write_text(program)
        facts = {}
        assert stages.bits(check, facts, 60.0) == status
    assert facts["output"] == []


def test_every_stage_stops_within_its_part_of_the_time(monkeypatch, tmp_path, capsys):
    """What a stage leaves is for those behind it; one that raises is noted, and the next one runs."""
    limits = {}

    def stage(check, facts, limit):
        limits[len(limits)] = limit
        if len(limits) == 1:
            raise RuntimeError("broken")
        return "passed"

    monkeypatch.setattr(gpu_check, "STAGES", {"tests": (stage, 1), "bits": (stage, 3)})
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    arguments = ["--dry-run", "--budget", "100", "--stages", "tests", "bits"]
    assert gpu_check.main(arguments) == 1
    assert limits[0] == pytest.approx(25, abs=1)
    assert limits[1] == pytest.approx(100, abs=2)
    assert "RuntimeError: broken" in (tmp_path / "dry-run.md").read_text()
    assert "A dry run" in capsys.readouterr().out


def test_nothing_runs_on_what_was_not_built(monkeypatch, tmp_path):
    def stage(check, facts, limit):
        return "failed"

    monkeypatch.setattr(gpu_check, "STAGES", {"build": (stage, 1), "tests": (None, 1)})
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    assert gpu_check.main(["--dry-run", "--stages", "build", "tests"]) == 1
    assert "| tests | not run |" in (tmp_path / "dry-run.md").read_text()


def test_a_machine_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert gpu_check.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


# --- The benchmark ---------------------------------------------------------------------------------


def test_a_process_ends_at_the_first_task_that_fails(monkeypatch, capsys):
    def wrong():
        raise ValueError("wrong")

    done = []
    batch = {"fine": lambda: {"median_s": 1.0}, "wrong": wrong, "behind": lambda: done.append(1)}
    monkeypatch.setattr(tasks, "batches", lambda small: {"batch": batch})
    assert tasks.main(["fine", "wrong", "behind"]) == 1
    first, second = map(from_line, capsys.readouterr().out.splitlines())
    assert first["median_s"] == 1.0
    assert "ValueError: wrong" in second["error"]
    assert not done


def test_a_dry_run_has_each_kind_of_row():
    small = {row.name: row.problems["ilajax"] for row in tasks.rows(small=True)}
    assert 4 < len(small) < len(tasks.rows(small=False))
    assert {problem.support for problem in small.values()} == {"dilate", "input"}
    assert {problem.dtype for problem in small.values()} == {"float32", "bfloat16"}
    assert {problem.backward for problem in small.values()} == {False, True}
    assert max(problem.resolution for problem in small.values()) <= 16


# --- The page --------------------------------------------------------------------------------------

TARGETS = {"targets": ["a", "b"], "versions": {"jax": "1", "spconv": None}}
RAN = {"status": "passed", "seconds": 1.0}


def test_a_page_at_every_moment():
    """It is written after each step: whatever is missing, it must not fail."""
    sanitized = {"status": "failed", "seconds": 1.0, "summary": ["ERROR SUMMARY: 1 error"]}
    task = {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0}
    for facts in (
        {},
        {"build": {"status": "running"}},
        {"build": RAN | TARGETS},
        {
            "build": {"status": "failed", "output": ["conv.cu: error"]},
            "tests": {"status": "not run"},
        },
        {"tests": {"status": "running", "tests": 3}},
        {"tests": RAN | {"failures": {"test_x": "1 != 2"}, "outcomes": {"failed": 1}}},
        {"sanitizer": {"status": "skipped", "seconds": 0.0}},
        {"sanitizer": RAN | {"memcheck": sanitized | {"output": ["===== bad"]}}},
        {"bits": {"status": "running"}},
        {"bits": RAN | {"compared": ["a"], "different": ["a"]}},
        {"bench": RAN | {"tasks": {}}},
        {"bench": RAN | {"tasks": {FIRST: {"error": "hung"}}}},
        {"bench": RAN | {"tasks": {FIRST: task}}},
        {"bench": RAN | {"tasks": {f"{FIRST}, profile": {"launches": 3.0, "busy_s": 9.0}}}},
    ):
        text = gpu_check.render(with_stages(**copy.deepcopy(facts)))
        assert text.startswith("# GPU check: A GPU")
        for name in ("conv.cu: error", "1 != 2", "===== bad", "hung"):
            assert (name in text) == (name in str(facts))
    assert "tested: a, b." in gpu_check.render(with_stages(build=RAN | TARGETS))


def test_stages_that_count():
    assert gpu_check.passed(with_stages(tests=RAN, sanitizer={"status": "skipped"}))
    for status in ("failed", "stopped at its limit", "not run", "running"):
        assert not gpu_check.passed(with_stages(tests=RAN, bench={"status": status}))


def test_the_check_is_at_home_in_the_root():
    assert (ROOT / "pyproject.toml").exists()
    assert os.path.samefile(ROOT / stages.DIGEST, ROOT / "tests" / "digest.py")
