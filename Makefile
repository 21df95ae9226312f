PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')
CUDA := $(shell find csrc -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-slow models check bench sanitize lint types docs notebook clang-check cuda-compile gpu-report clean
export OMP_NUM_THREADS ?= 1

# Where there is a compiler, a kernel that does not compile is an error; elsewhere the installation is pure PyTorch.
$(STAMP): export FUSED_OPS_BUILD ?= $(if $(shell command -v $${CXX:-c++}),1)
$(STAMP): setup.py pyproject.toml constraints.txt $(NATIVE) $(CUDA)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

# The walk-through: every gradient by hand, checked, fused and used to train. DEMO="--names FILE --steps N ..." for more.
demo: $(STAMP)
	env -u OMP_NUM_THREADS OMP_WAIT_POLICY=passive $(BIN)/python -m fused_ops demo $(DEMO)

# TESTS="tests/batch_norm -k relu" for some of them.
test: $(STAMP)
	$(BIN)/python -m pytest $(TESTS)

# The half of the matrix of PyTorch's systems that compiles something in every cell (tests/contracts/test_seams.py).
test-slow: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow $(TESTS)

# What the tests of other people's models and of the examples need besides; without it they are skipped, with the reason.
models:
	$(MAKE) EXTRAS=dev,models,examples $(STAMP)
	$(BIN)/python -c "import sklearn, transformers" 2>/dev/null || \
	  $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[models,examples]'
	$(MAKE) $(LIBRARIES)/.installed

# torchvision is built for one torch, and transformers cannot be imported where it is installed beside another. Its models
# and those that need it run beside any (benchmarks/torchvision_without_ops.py), so they have a folder of their own.
LIBRARIES := $(VENV)/model_libraries
$(LIBRARIES)/.installed: constraints.txt
	rm -rf $(LIBRARIES)
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --target $(LIBRARIES) \
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
