# SPDX-License-Identifier: Apache-2.0
# Each target makes the environment it needs and is quick when nothing changed.
#   PYTHON  interpreter that makes the environment (3.11 to 3.13)
#   VENV    the environment; one that already holds a torch keeps it
#   PART    parts of gpu-check to run, by name; empty: those that have not passed yet
#   TOTAL   minutes that all parts of gpu-check may take together; empty: eight each
#   OUT     folder that gpu-check writes to, and goes on from where the machine has forgotten

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
PART ?=
TOTAL ?=
OUT ?= gpu-check

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
CPP := $(sort $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'))
# Tests wait for disks, other processes and locks as much as they compute. A worker takes up to a gigabyte.
WORKERS := -n auto --maxprocesses 4
QUIETLY := OMP_WAIT_POLICY=PASSIVE
RULES := CMakeLists.txt $(wildcard cmake/*.cmake)

.DEFAULT_GOAL := help
.PHONY: help demo test check lint bench golden matrix sanitize gpu-check wheels-offline cutlass clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.built ## Run the main job on the bundled SD3 pipeline; pictures and traces go to demo/
	$(BIN)/python -m rapid3rt.cli demo --out demo $(DEMO_ARGS)

test: lint ## Lint, types and all tests
	$(QUIETLY) $(BIN)/python -m pytest $(WORKERS) --dist loadfile $(TEST_ARGS)

check: $(VENV)/.built ## Quick inner loop: lint and the tests that are not slow
	$(BIN)/ruff check .
	$(QUIETLY) $(BIN)/python -m pytest -m "not slow and not cuda" $(WORKERS) --dist worksteal -x -q $(TEST_ARGS)

lint: $(VENV)/.built ## Ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: $(VENV)/.built ## Time every op against its named rival
	$(BIN)/python benches/bench_ops.py

golden: $(VENV)/.built ## Write the golden files anew and show what changed
	$(BIN)/python -m pytest tests -m "not cuda" -k golden -q --write-golden
	git --no-pager diff --stat -- tests/golden

matrix: $(VENV)/.built ## Run the identity matrix; write docs/matrix.md and the README's table anew
	$(BIN)/python tests/matrix/table.py
	git --no-pager diff --stat -- docs README.md

# AMX tiles are emulated: a sanitizer cannot see what tile instructions read. New memory is filled with NaN, so that
# scratch that is read before it is written shows.
SANITIZE := cmake -S . -G Ninja -DRAPID3RT_TESTS=ON -DRAPID3RT_AMX_EMULATED=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
sanitize: $(VENV)/.tools ## C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	PATH=$(abspath $(BIN)):$$PATH; export PATH; set -e; \
	pybind11_DIR=$$(python -m pybind11 --cmakedir); export pybind11_DIR; \
	$(SANITIZE) -B build/asan -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all"; \
	$(SANITIZE) -B build/tsan -DCMAKE_CXX_FLAGS="-fsanitize=thread"; \
	cmake --build build/asan --target attention_test cuda_lists_test cuda_rows_test queue_test rows_test; \
	cmake --build build/tsan --target cuda_lists_test cuda_rows_test queue_test; \
	for test in cuda_lists cuda_rows; do build/asan/csrc/tests/$${test}_test; build/tsan/csrc/tests/$${test}_test; done; \
	ASAN_OPTIONS=malloc_fill_byte=255:max_malloc_fill_size=1073741824 build/asan/csrc/tests/attention_test; \
	build/asan/csrc/tests/queue_test; \
	build/asan/csrc/tests/rows_test; \
	build/tsan/csrc/tests/queue_test

# The environment's Python where there is one, else the machine's own: nothing is installed into either.
gpu-check: ## On a machine with a CUDA GPU: prove the kernels, offline (docs/cuda.md)
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benches/gpu_check.py --out '$(OUT)' $(addprefix --part ,$(PART)) $(addprefix --total ,$(TOTAL))

# What a machine with torch and nvcc, but without a network, may lack: for its Python and Linux on x86-64.
TARGET_PYTHON ?= 3.12
OFFLINE := diffusers importlib-metadata zipp ninja pybind11 scikit-build-core packaging pathspec \
	pytest iniconfig pluggy pygments hypothesis sortedcontainers tyro docstring-parser typeguard
PLATFORMS := $(foreach n,28 17 12 5,manylinux_2_$(n)_x86_64) manylinux2014_x86_64 manylinux2010_x86_64 manylinux1_x86_64
wheels-offline: cutlass ## Collect in wheels-offline/ what gpu-check needs on a machine without a network
	rm -rf wheels-offline
	$(PYTHON) -m pip download -q --no-deps --only-binary :all: -d wheels-offline -c constraints.txt \
		--python-version $(TARGET_PYTHON) $(addprefix --platform ,$(PLATFORMS)) $(OFFLINE)
	cp .cutlass/*.whl wheels-offline
	@du -sh wheels-offline

# The sm_80 kernels include nothing of CUTLASS; those for sm_90a will.
CUTLASS := nvidia-cutlass==4.2.0.0 --hash=sha256:f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6
cutlass: .cutlass/include ## Unpack the headers of CUTLASS into .cutlass/include/
.cutlass/include:
	rm -rf .cutlass && mkdir .cutlass
	echo '$(CUTLASS)' > .cutlass/requirements.txt
	$(PYTHON) -m pip download -q --no-deps --require-hashes -d .cutlass -r .cutlass/requirements.txt
	$(PYTHON) -m zipfile -e .cutlass/*.whl .cutlass/wheel
	mv .cutlass/wheel/cutlass_library/source/include $@
	rm -r .cutlass/wheel

clean: ## Remove the environment and everything that was built
	rm -rf .venv build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone. A torch that is already there stays, and the constraints follow it.
$(VENV)/.tools: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'rapid3rt needs Python 3.11 or newer (diffusers 0.42 does): set PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install torch==2.13.0
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt cmake ninja pybind11 scikit-build-core
	touch $@

# No build isolation: the tools above build, and only what changed is compiled again.
$(VENV)/.built: $(VENV)/.tools $(RULES) $(CPP)
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation --config-settings=build-dir=$(abspath $(VENV))/build -e '.[cli,plot,train,dev]'
	touch $@
