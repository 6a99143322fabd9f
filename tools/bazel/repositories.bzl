"""What the build needs from outside, made from what is on the machine, so that nothing is downloaded."""

def _stub(ctx):
    ctx.file("WORKSPACE")
    for path, content in ctx.attr.files.items():
        ctx.file(path, content)

_stub_repository = repository_rule(
    implementation = _stub,
    attrs = {"files": attr.string_dict()},
)

def _native_rules(prefix):
    names = [name for name in dir(native) if name.startswith(prefix)]
    return "\n".join(["%s = native.%s" % (name, name) for name in names])

def offline_repositories():
    """Stands in for what Bazel would download: rules that it has built in, and a coverage tool."""
    _stub_repository(
        name = "rules_cc",
        files = {"BUILD": "", "cc/BUILD": "", "cc/defs.bzl": _native_rules("cc_")},
    )
    _stub_repository(
        name = "rules_java",
        files = {"BUILD": "", "java/BUILD": "", "java/defs.bzl": _native_rules("java_")},
    )
    _stub_repository(
        name = "remote_coverage_tools",
        files = {"BUILD": "filegroup(name = 'coverage_report_generator', visibility = ['//visibility:public'])"},
    )

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(name = "xla_ffi", hdrs = glob(["xla_ffi/**/*.h"]), includes = ["xla_ffi"])

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"] + glob(["python/**/*.h", "nanobind/ext/robin_map/include/**"]),
    hdrs = glob(["nanobind/include/**/*.h"]),
    copts = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing"],
    includes = ["nanobind/include", "nanobind/ext/robin_map/include", "python"],
    local_defines = ["NB_BUILD"],
    textual_hdrs = glob(["nanobind/src/*"]),
    alwayslink = True,
)
"""

_FIND = """
import jaxlib, nanobind, os, sysconfig
for package in jaxlib, nanobind:
    print(list(package.__path__)[0])
print(sysconfig.get_path("include"))
"""

def _python_packages(ctx):
    python = ctx.os.environ.get("ILAJAX_PYTHON", "python3")
    found = ctx.execute([python, "-c", _FIND])
    if found.return_code:
        fail("%s does not find jaxlib and nanobind (see ILAJAX_PYTHON): %s" % (python, found.stderr))
    jaxlib, nanobind, include = found.stdout.splitlines()
    ctx.symlink(jaxlib + "/include", "xla_ffi")
    ctx.symlink(nanobind, "nanobind")
    ctx.symlink(include, "python")
    ctx.file("BUILD", _BUILD)

python_packages = repository_rule(
    doc = "The headers of XLA's FFI, nanobind and Python that the interpreter ILAJAX_PYTHON sees.",
    implementation = _python_packages,
    environ = ["ILAJAX_PYTHON"],
    local = True,
)
