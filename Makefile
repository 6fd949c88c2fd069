# The commands of the README. Each is complete on a fresh machine with python3 >= 3.10, g++ and make: the virtual
# environment, the pinned packages and the build are made on the way, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
export MAX_JOBS := $(JOBS)
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint format bench build wheel compat test-libraries sanitize gpu-check clean
.DEFAULT_GOAL := demo

demo: build
	$(BIN)/python -m tokencomp demo

test: build test-libraries
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' | xargs $(BIN)/clang-format -i

bench: build
	$(BIN)/python bench/run.py
	$(BIN)/python bench/targets.py

# A wheel for this machine and every Python from 3.10 on in dist/, with the CUDA library where nvcc is (TOKENCOMP_CUDA=0: without), then a
# check of it, installed alone into an empty folder.
wheel: build
	rm -rf build/lib.* build/bdist* dist
	$(BIN)/python setup.py -q bdist_wheel
	$(BIN)/python tests/wheel_check.py $(BIN)/python dist/*.whl

# The tests that depend on versions, under several: make compat PYTHONS="old/bin/python new/bin/python", interpreters with
# pytest, and torch or transformers of another version. See docs/development.md.
compat:
	@test -n "$(PYTHONS)" || { echo 'compat: say which: make compat PYTHONS="old/bin/python new/bin/python"'; exit 2; }
	python3 tests/compat.py $(PYTHONS)

# ---- environment and build -----------------------------------------------------------------------------------------

# PyTorch first and alone: otherwise another package may pull in a different one.
$(VENV)/installed: requirements/dev.txt requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c requirements/constraints.txt torch
	$(BIN)/python -m pip install -q -c requirements/constraints.txt -r requirements/dev.txt
	touch $@

$(VENV)/tokencomp: pyproject.toml setup.py $(VENV)/installed
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/tokencomp
	$(BIN)/python setup.py -q build_ext --inplace
	@test -f python/tokencomp/lib/libtokencomp_cuda.so || \
	  echo "CUDA library: not built (no nvcc found, or TOKENCOMP_CUDA=0); the CPU library is complete"

test-libraries: build
	$(BIN)/cmake --build build/cmake --target test_libraries -j $(JOBS)

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/tokencomp
	PYTHON=$(BIN)/python JOBS=$(JOBS) bash tests/sanitize_cpu.sh

# ---- on a machine with a GPU ---------------------------------------------------------------------------------------
# No network and no virtual environment: the Python given by PYTHON= brings PyTorch (CUDA), cmake, ninja, pytest.
gpu-check:
	PYTHON=$(PYTHON) OUT=$(OUT) bash bench/gpu_check.sh

clean:
	rm -rf build out python/tokencomp/lib python/tokencomp/_*.so
