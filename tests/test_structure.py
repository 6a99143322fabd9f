"""The rules of the source tree, read off the files: one stem for each op, imports one way, docstrings."""

import ast
import functools
import graphlib
import inspect
import pathlib
import re
import types

import pytest

import ilajax
from ilajax.ffi import registry

ROOT = pathlib.Path(__file__).parent.parent
KERNELS = ROOT / "xla_kernels"
MODULES = sorted((ROOT / "ilajax").rglob("*.py"))
PROGRAMS = sorted(p for name in ("benchmarks", "experiments") for p in (ROOT / name).rglob("*.py"))
LISTED = re.findall(
    r"^((?:CPU_)?TARGET)\((\w+), (\w+)\)",
    (KERNELS / "targets.def").read_text(),
    re.MULTILINE,
)
TARGETS = [(target, handler) for kind, target, handler in LISTED if kind == "TARGET"]
CPU_TARGETS = [(target, handler) for kind, target, handler in LISTED if kind == "CPU_TARGET"]

# What a module may import, of the project, stands before it in this list. Data types and ffi know the
# geometry only; the package's own __init__ exports all.
LAYERS = (
    ("ilajax.geometry", "ilajax.display"),
    ("ilajax.sparse_tensor", "ilajax.sparse_kernel", "ilajax.ffi"),
    ("ilajax.ops", "ilajax.plotting"),
    ("ilajax.data", "ilajax.nn"),
    ("ilajax.export",),
    ("ilajax.optim",),
    ("ilajax.models",),
    ("ilajax.check",),
    ("ilajax.__main__",),
    ("benchmarks", "experiments"),
)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module):
    """The index of a module's layer; `ilajax` itself has none."""
    for index, prefixes in enumerate(LAYERS):
        if any(module == p or module.startswith(p + ".") for p in prefixes):
            return index
    return None


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def imported(path):
    """Full names of what a file imports."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used(path):
    """Dotted names in a file's expressions, such as jax.ffi.ffi_call."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


relative = functools.partial(
    pytest.mark.parametrize, "path", ids=lambda p: str(p.relative_to(ROOT))
)


@relative([p for p in MODULES if p != ROOT / "ilajax" / "__init__.py"])
def test_imports_go_one_way(path):
    """Catches a cycle, or a lower layer that knows a higher one."""
    own = layer(name_of(path))
    assert own is not None, f"{path} belongs to no layer: add it to LAYERS"
    for name in imported(path):
        if name.split(".")[0] in ("ilajax", "benchmarks", "experiments"):
            other = layer(name)
            assert other is not None, f"{path} imports {name}: import the module that defines it"
            assert other <= own, f"{path} imports {name}, which stands above it"


def test_experiments_stand_on_top():
    """Catches a library that imports an experiment or a test."""
    for path in MODULES:
        for name in imported(path):
            assert name.split(".")[0] not in (
                "benchmarks",
                "experiments",
                "tests",
                "oracles",
                "samples",
            )


def test_programs_import_each_other_without_a_cycle():
    """Catches a benchmark that needs an experiment which needs the benchmark."""
    modules = {name_of(path): path for path in PROGRAMS}
    needed = {}
    for name, path in modules.items():
        froms = {n for full in imported(path) for n in (full, full.rpartition(".")[0])}
        # A package is not its modules: its own __init__ imports none of them.
        needed[name] = (froms & set(modules)) - {name, "benchmarks", "experiments"}
    list(graphlib.TopologicalSorter(needed).static_order())  # raises a CycleError


@relative(MODULES)
def test_only_ffi_touches_jax_ffi(path):
    """Catches a custom call that goes past the rules for vmap, sharding and platforms in ilajax/ffi."""
    if path.parent.name != "ffi":
        names = [*imported(path), *used(path)]
        assert not [n for n in names if n.startswith("jax.ffi") or n.endswith("ffi_call")]
        assert not [n for n in names if "custom_vmap" in n or "custom_partitioning" in n]


@relative(MODULES + PROGRAMS)
def test_public_jax_only(path):
    """Catches a private part of JAX, which the next release moves."""
    assert not [n for n in [*imported(path), *used(path)] if n.startswith("jax._src")]


@relative([p for p in MODULES if p.name == "__init__.py"])
def test_init_holds_exports_only(path):
    """Catches code in an __init__.py, and a star import."""
    for node in tree(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and node.targets[0].id in ("__all__", "__version__")
        assert docstring or names or isinstance(node, ast.ImportFrom), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


# --- One stem for each op --------------------------------------------------------------------------


def defines(source, platform, handler):
    """Whether a file is there and defines a handler."""
    assert source.exists(), f"{source} is missing"
    return re.search(rf"ILAJAX_{platform}_TARGET\({handler}\b", source.read_text())


def camel_case(stem):
    return "".join(part.capitalize() for part in stem.split("_"))


def test_targets_are_listed():
    """Catches a targets.def that this file does not read, with which all checks below are empty."""
    assert len(TARGETS) >= 2
    names = [target for _, target, _ in LISTED]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("target", "handler"), TARGETS)
def test_a_target_has_its_files(target, handler):
    """Catches a name that breaks the chain op <-> target <-> handler <-> kernel <-> test."""
    match = re.fullmatch(r"ilajax_(\w+)_(fwd|bwd)", target)
    assert match, f"{target} is not ilajax_<stem>_fwd or ilajax_<stem>_bwd"
    stem, direction = match.groups()
    assert handler == camel_case(stem) + direction.capitalize()

    assert defines(KERNELS / stem / "cpu.cc", "CPU", handler)
    assert f"ILAJAX_CALL({handler}, " in (KERNELS / stem / "spec.h").read_text()

    declaration = f'ffi.declare("{stem}")'
    ops = [p for p in (ROOT / "ilajax" / "ops").glob("*.py") if declaration in p.read_text()]
    assert len(ops) == 1, f"{stem} must be declared by one file in ops/, got {ops}"
    assert (ROOT / "tests" / "ops" / f"test_{ops[0].stem}.py").exists()


@pytest.mark.parametrize(("target", "handler"), CPU_TARGETS)
def test_a_target_of_the_cpu(target, handler):
    """Catches one that is no operation by itself, without its handler or its test."""
    stem = target.removeprefix("ilajax_").removesuffix("_fwd")
    assert defines(KERNELS / stem / "cpu.cc", "CPU", handler)
    assert not (KERNELS / stem / "cuda.cu").exists()
    assert (ROOT / "tests" / "ffi" / f"test_{stem}.py").exists()


@pytest.mark.parametrize(("target", "handler"), TARGETS)
def test_a_target_has_its_cuda_twin(target, handler):
    """Catches an operation that runs on the CPU only."""
    stem = re.sub(r"^ilajax_|_(fwd|bwd)$", "", target)
    assert defines(KERNELS / stem / "cuda.cu", "CUDA", handler)


def test_a_folder_is_an_op():
    """Catches an op whose two handlers ended up in different folders, or a kernel that nothing lists."""
    stems = {re.sub(r"^ilajax_|_(fwd|bwd)$", "", target) for _, target, _ in LISTED}
    assert {p.parent.name for p in KERNELS.glob("*/spec.h")} == stems


@relative(sorted([*KERNELS.rglob("*.h"), *KERNELS.rglob("*.cuh"), *KERNELS.rglob("*.c[cu]")]))
def test_kernels_include_one_way(path):
    """Catches an op that includes another, and what several share including an op."""
    may = {"common": {"common"}, "lines": {"common", "lines"}}
    may["products"] = may["lines"] | {"products"}
    own = path.parent.name
    if own == KERNELS.name:
        return
    included = re.findall(r'#include "xla_kernels/(\w+)/', path.read_text())
    assert set(included) <= may.get(own, may["products"] | {own})


def test_bazel_takes_what_cmake_takes():
    """Catches a build that leaves a source out."""
    pattern = "*/*.cc"
    assert f'"${{KERNELS}}/{pattern}"' in (KERNELS / "kernels.cmake").read_text()
    assert f'glob(["xla_kernels/{pattern}"])' in (ROOT / "BUILD").read_text()


@pytest.mark.parametrize("name", [n for n in ilajax.__all__ if callable(getattr(ilajax, n))])
def test_a_public_operation_has_its_test(name):
    """Catches an op without a test file of its name."""
    package, _, stem = getattr(ilajax, name).__module__.rpartition(".")
    folder = ROOT / "tests" / package.removeprefix("ilajax").lstrip(".")
    assert (folder / f"test_{stem}.py").exists()


def test_registrations_match_the_list():
    """Catches an extension built from another list of targets than the one in the tree."""
    everything = {target for target, _ in TARGETS}
    alone = {target for target, _ in CPU_TARGETS}
    for platform, extension in registry.extensions.items():
        expected = everything | alone if platform == "cpu" else everything
        assert extension.missing or extension.targets == expected, (
            f"rebuild the {platform} extension"
        )


# --- Rules for kernels -----------------------------------------------------------------------------


def code(path):
    """A C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@relative(sorted(p for p in KERNELS.rglob("*") if p.suffix in (".cu", ".cuh")))
def test_cuda_neither_waits_nor_allocates(path):
    """Catches host synchronisation, allocation, or a launch that nobody checks."""
    text = code(path)
    for forbidden in (
        r"cuda\w*Synchronize",
        r"cudaMalloc",
        r"cudaFree",
        r"cudaMemcpy\(",
        r"<<<",
        r"\bprintf\b",
        r"\bnew\b",
        r"std::vector",
    ):
        assert not re.search(forbidden, text), f"{forbidden} in {path}"


def test_cuda_handlers_fit_into_command_buffers():
    """Catches a handler that keeps XLA from capturing a CUDA graph."""
    text = (KERNELS / "common" / "target.h").read_text()
    macro = text[text.index("#define ILAJAX_CUDA_TARGET") :].partition("#define ILAJAX_TARGET")[0]
    assert "kCmdBufferCompatible" in macro
    for path in KERNELS.rglob("*.cu*"):
        assert "XLA_FFI_DEFINE_HANDLER" not in code(path), f"{path} defines a handler by itself"


@relative(sorted(p for p in KERNELS.rglob("*") if p.suffix in (".cc", ".h")))
def test_cpu_kernels_use_xlas_threads_and_memory(path):
    """Catches a second thread pool, memory that XLA does not see, and prints in place of errors."""
    text = code(path)
    for forbidden in (r"std::thread\b", r"#pragma omp", r"\bmalloc\b", r"\bnew\b", r"\bprintf\b"):
        assert not re.search(forbidden, text), f"{forbidden} in {path}"
    if path.name not in ("bind.h", "planner.h"):  # what Python asks when it traces
        assert not re.search(r"std::vector|std::string\b|std::(unordered_)?map", text), (
            f"{path} allocates"
        )


def test_what_is_shipped_runs_on_any_machine():
    """Catches code built for the machine that built it."""
    for name in ("CMakeLists.txt", "pyproject.toml", "BUILD"):
        if (ROOT / name).exists():
            assert "-march=native" not in (ROOT / name).read_text()


# --- Documentation ---------------------------------------------------------------------------------


def public_objects():
    for module in (ilajax, ilajax.data, ilajax.nn, ilajax.optim, ilajax.models):
        assert module.__doc__
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", list(public_objects()))
def test_public_names_have_docstrings(value):
    """Catches a public name without documentation, a public method included."""
    documented = inspect.getdoc(value)
    assert documented
    # What a dataclass or a NamedTuple writes by itself is no documentation.
    assert not documented.startswith(f"{value.__name__}(")
    if inspect.isclass(value):
        for name, method in vars(value).items():
            function = getattr(method, "__func__", method)
            if not name.startswith("_") and inspect.isfunction(function):
                if name.startswith("tree_"):
                    continue  # JAX's protocol
                assert inspect.getdoc(function), f"{value.__name__}.{name} has no docstring"


@relative(MODULES)
def test_modules_have_docstrings(path):
    """Catches a file that does not say what it is for."""
    assert ast.get_docstring(tree(path))


@relative(MODULES + sorted((ROOT / "tests").rglob("test_*.py")))
def test_annotations_are_real(path):
    """Catches postponed annotations, which tools that read them at run time stumble over."""
    assert "__future__.annotations" not in set(imported(path))


@relative(sorted((ROOT / "tests" / "ops").rglob("test_*.py")))
def test_tests_say_what_they_catch(path):
    """Catches a test without the line that says what it is for."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert ast.get_docstring(node), f"{path.name}::{node.name} has no docstring"
