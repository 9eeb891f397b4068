# `make help` lists the targets. PYTHON is the interpreter that the environment is made with.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?= --json benchmarks/results/bench-gpu.json
FORWARD_ARGS ?= --json benchmarks/results/bench-forward.json

BIN := $(VENV)/bin
STAMP := $(VENV)/.lite-compile-installed
TYPES := build/types
SITE := build/site
AT_SITE = PYTHONPATH="$(CURDIR)/$(SITE)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
MYPY = $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
CHECKED := lite_compile passes kernels tests examples benchmarks

.DEFAULT_GOAL := help
# Two jobs at once would share the GPU that they time, and folders that they install into.
.NOTPARALLEL:
.PHONY: help env demo test test-slow test-gpu lint format types bench bench-attention bench-forward bench-cpu bench-doc \
    models-doc build clean has-gpu has-bench-tools site

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make or update the environment in .venv

demo: $(STAMP)  ## compare Inductor alone with backend="liteattention" on a Wan pipeline (DEMO_ARGS="--steps 30")
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: lint types  ## everything that runs without a GPU: ruff, mypy, pytest (PYTEST_ARGS="-k clock")
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests that take minutes: a trained model's results, 2,000 random attentions (a GPU is used if there is one)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff check and ruff format --check
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

format: $(STAMP)  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# The folders are mapped by package-dir, which mypy does not know: it has to see an installed copy.
types: $(STAMP)  ## mypy on an installed copy
	@rm -rf $(TYPES) build/lib
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(TYPES) .
	cd $(TYPES) && $(MYPY) -p lite_compile
	cd $(TYPES) && $(MYPY) --follow-imports=silent $(CURDIR)/examples

# For a machine whose own python has torch with CUDA (and pytest): nothing is downloaded, nothing is installed into it.
GPU_DTYPE ?= bfloat16
GPU_TESTS = tests/gpu tests/test_generations.py tests/test_persistence.py tests/test_lifetime.py tests/test_inductor.py \
    tests/test_regional.py tests/test_identity.py tests/test_threads.py tests/test_history.py tests/test_refresh.py \
    tests/test_root_contents.py

test-gpu: has-gpu site  ## the tests that need a GPU, or run differently on one, with PYTHON's own torch (PYTEST_ARGS="-n 10 --dist worksteal")
	LITE_TEST_DEVICE=cuda LITE_TEST_DTYPE=$(GPU_DTYPE) $(AT_SITE) -m pytest $(GPU_TESTS) $(PYTEST_ARGS)

bench: has-gpu has-bench-tools bench-attention bench-forward  ## both benchmarks below; results in benchmarks/results

bench-attention: has-gpu site  ## time single attention calls against cuDNN, FlashAttention-2 and FlexAttention (BENCH_ARGS="--shape 0")
	$(AT_SITE) benchmarks/bench_gpu.py $(BENCH_ARGS)

bench-forward: has-gpu has-bench-tools site  ## time Wan's transformers against Inductor with cuDNN (FORWARD_ARGS="--model 1.3b")
	$(AT_SITE) benchmarks/bench_forward.py $(FORWARD_ARGS)

has-gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || \
	    { echo "make $(MAKECMDGOALS): $(PYTHON) has no torch that sees a CUDA device; name one with PYTHON=..." >&2; exit 1; }

has-bench-tools:
	@$(PYTHON) -c 'import diffusers, tqdm' || \
	    { echo "make $(MAKECMDGOALS): $(PYTHON) needs diffusers and tqdm; pip install diffusers tqdm" >&2; exit 1; }

site:
	@rm -rf $(SITE) build/lib
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target $(SITE) .

bench-cpu: $(STAMP)  ## time the CPU implementation against dense SDPA
	$(BIN)/python benchmarks/bench_cpu.py

bench-doc:  ## write the tables of the README and of docs/ from benchmarks/results
	$(PYTHON) benchmarks/tables.py

models-doc: $(STAMP)  ## write docs/models.md: what is rewritten in each model of tests/zoo
	$(BIN)/python tests/zoo/models_doc.py

build: $(STAMP)  ## sdist and wheel in dist/
	@rm -rf build/lib
	$(BIN)/python -m build

clean:  ## remove what the targets made, the environment included
	rm -rf $(VENV) build dist demo_output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lite_compile passes kernels tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "$(PYTHON) -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (some minutes the first time; torch is the largest part)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt 'setuptools>=77' -e '.[dev]'
	@touch $@
