PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
DEMO_STAMP := $(or $(wildcard $(STAMP)),$(VENV)/.installed-demo)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')
CUDA := $(shell find csrc -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all test-torch models check bench sanitize lint types docs notebook clang-check cuda-compile arm sdist wheel gpu-report clean
export OMP_NUM_THREADS ?= 1
# Wherever it is set, every new process would compile all of torch's Python again.
unexport PYTHONDONTWRITEBYTECODE

# The package with one set of extras, or those of EXTRAS. Where there is a compiler, a kernel that does not compile is an
# error; elsewhere the installation is pure PyTorch. Python compiles what is imported, so pip need not compile all of it.
$(VENV)/.installed-%: export FUSED_OPS_BUILD ?= $(if $(shell command -v $${CXX:-c++}),1)
$(VENV)/.installed-%: setup.py pyproject.toml constraints.txt $(NATIVE) $(CUDA)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e '.[$(or $(EXTRAS),$*)]'
	touch $@

# The walk-through: every gradient by hand, checked, fused and used to train. DEMO="--names FILE --steps N ..." for more.
demo: $(DEMO_STAMP)
	env -u OMP_NUM_THREADS OMP_WAIT_POLICY=passive $(BIN)/python -m fused_ops demo $(DEMO)

# All contracts, on every core. TESTS="tests/batch_norm -k relu" for some of them.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
test: $(STAMP)
	$(PYTEST) $(TESTS)

# Besides, what is marked slow: the rest of the grids, of the matrix of PyTorch's systems, builds of the whole library.
test-all: test
	$(PYTEST) -m slow $(TESTS)

# What the tests of other people's models, of the examples and of the recipes need besides; without it they are skipped, with the reason.
models:
	$(MAKE) EXTRAS=dev,recipes,examples $(STAMP)
	$(BIN)/python -c "import lightning, onnxscript, peft, sklearn" 2>/dev/null || \
	  $(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e '.[recipes,examples]'
	$(MAKE) $(LIBRARIES)/.installed

# torchvision is built for one torch, and transformers cannot be imported where it is installed beside another. Its models
# and those that need it run beside any (benchmarks/torchvision_without_ops.py), so they have a folder of their own.
LIBRARIES := $(VENV)/model_libraries
$(LIBRARIES)/.installed: constraints.txt
	rm -rf $(LIBRARIES)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-deps --target $(LIBRARIES) \
	  timm torchvision segmentation_models_pytorch
	touch $@

check: $(STAMP)
	$(BIN)/python -m fused_ops check

# Every kernel and the fuzzed raw ops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(STAMP)
	.ci/sanitize $(BIN)/python

# Small faults seeded into a copy of the tree: which test notices each? (about half an hour)
mutants: $(STAMP)
	$(BIN)/python -m tests.mutation --write $(MUTANTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(CUDA)

types: $(STAMP)
	$(BIN)/mypy

# The site, in build/site: every page that links nowhere is an error. npm gives the one file that draws mathematics.
MATHJAX := build/mathjax/package/es5/tex-svg.js
docs: $(STAMP) $(MATHJAX)
	$(BIN)/python -c "import mkdocstrings, nbconvert" 2>/dev/null || \
	  $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(MATHJAX):
	mkdir -p build/mathjax
	cd build/mathjax && npm pack --silent mathjax@3.2.2 && tar xzf mathjax-3.2.2.tgz

# examples/backprop_by_hand.ipynb, written anew from the walk-through's code and run.
notebook: docs
	$(BIN)/python -m fused_ops.examples.backprop_by_hand.notebook examples/backprop_by_hand.ipynb

# Every C++ source must be correct, and without a warning, to clang as well; says so where there is none.
clang-check: $(STAMP)
	$(BIN)/python .ci/clang_check

# Every CUDA source must compile for sm_80, sm_90 and sm_100, without spilling; needs nvcc but no GPU and no torch. On a
# machine without nvcc there is nothing to compile with, and that is said. Prints registers and spills of each kernel.
cuda-compile:
	$(PYTHON) .ci/cuda_compile

# The aarch64 library by a cross compiler, and every kernel of it under an emulator; says so where there is neither.
arm: $(STAMP)
	.ci/arm $(BIN)/python

# What an index takes, in dist/, made and checked in an environment of its own: the sdist needs neither compiler nor torch.
# ARM=1 makes the aarch64 wheel too, PYTHONS="python3.10 python3.13" installs and tries the wheel in each.
sdist:
	$(PYTHON) -c "import build" 2>/dev/null || { echo "make sdist: needs python -m pip install build"; exit 1; }
	FUSED_OPS_BUILD=0 $(PYTHON) -m build -q --sdist --outdir dist
wheel:
	PYTHONS="$(PYTHONS)" ARM="$(ARM)" .ci/wheel $(PYTHON)

# The tests beside another torch, in an environment of its own: TORCH=oldest, nightly (from the index that
# TORCH_NIGHTLY_INDEX names) or a version.
TORCH ?= oldest
test-torch:
	.ci/test_torch $(TORCH) $(PYTHON)

# What a machine with a GPU still has to confirm, step by step, with that machine's own torch: build, tests, sanitizers,
# benchmarks. GPU_PYTHON chooses the interpreter, STEPS="build tests" some of the steps.
GPU_PYTHON ?= python3
gpu-report:
	$(GPU_PYTHON) .ci/gpu_report $(STEPS)

# The quick suite (a few minutes), written with its plots to benchmarks/results/<machine>.
bench: $(STAMP)
	$(BIN)/python -m benchmarks --suite quick

clean:
	rm -rf $(VENV) build *.egg-info fused_ops/*.so
