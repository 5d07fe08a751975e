# SPDX-License-Identifier: Apache-2.0
# Each target makes the environment it needs and is quick when nothing changed.
#   PYTHON  interpreter that makes the environment (3.11 to 3.13)
#   VENV    the environment; one that already holds a torch keeps it

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
CPP := $(sort $(shell find csrc -name '*.cpp' -o -name '*.h'))

.DEFAULT_GOAL := help
.PHONY: help demo test check lint bench golden matrix sanitize gpu-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.built ## Run the main job on the bundled SD3 pipeline; pictures and traces go to demo/
	$(BIN)/python -m rapid3rt.cli demo --out demo $(DEMO_ARGS)

test: lint ## Lint, types and all tests
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(VENV)/.built ## Quick inner loop: lint and the tests that are not slow
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not slow and not cuda" -x -q $(TEST_ARGS)

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
	cmake --build build/asan --target attention_test queue_test rows_test; \
	cmake --build build/tsan --target queue_test; \
	ASAN_OPTIONS=malloc_fill_byte=255:max_malloc_fill_size=1073741824 build/asan/csrc/tests/attention_test; \
	build/asan/csrc/tests/queue_test; \
	build/asan/csrc/tests/rows_test; \
	build/tsan/csrc/tests/queue_test

gpu-check: $(VENV)/.built ## On a machine with a CUDA GPU: the GPU tests
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'gpu-check: this machine has no CUDA GPU that torch can use')"
	$(BIN)/python -m pytest -m cuda $(TEST_ARGS)

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
$(VENV)/.built: $(VENV)/.tools CMakeLists.txt $(CPP)
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation --config-settings=build-dir=$(abspath $(VENV))/build -e '.[cli,plot,train,dev]'
	touch $@
