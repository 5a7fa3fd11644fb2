# Two commands set up everything: `make train` and `make test`. PYTHON=python3.12 picks another interpreter, and
# TORCH=2.14.1 another torch for the tests, in an environment of its own.
PYTHON ?= python3
TORCH ?=
VENV := .venv$(addprefix -torch-,$(TORCH))
BIN := $(VENV)/bin
ARGS ?=
# .venv holds the packages of one interpreter. What was made is noted under its version, so that another interpreter,
# asked for by name, makes it anew; without a name, the one that made it stays.
ifeq ($(origin PYTHON),file)
VERSION := $(patsubst .made-%,%,$(notdir $(firstword $(wildcard $(VENV)/.made-*))))
endif
VERSION := $(or $(VERSION),$(shell $(PYTHON) -c 'import sys; v = sys.version_info; \
	print("%d.%d.%d" % v[:3] if (3, 11) <= v[:2] <= (3, 13) else "")' 2>/dev/null))
MADE := $(VENV)/.made-$(VERSION)
FOR_TRAINING := $(VENV)/.train-$(VERSION)
FOR_TESTS := $(VENV)/.test-$(VERSION)
# Where a GPU is seen, the main job takes it in bf16 and compiled; by trainer=default it would in fp32, as on a CPU.
ON_GPU = $(shell nvidia-smi -L > /dev/null 2>&1 && echo trainer=auto)
# The peers' pins and ours do not go together, so they get an environment of their own.
BENCH := .venv-bench/bin
FOR_BENCH := .venv-bench/.made-$(VERSION)
BENCHMARKS := compare costs generation evaluation start busy small
PART ?=

.PHONY: help train megablocks check-gpu test test-slow check-newest bench bench-gpu lint types docs format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(FOR_TRAINING)  ## set up the environment and run the main job; ARGS="trainer.max_steps=20" hands overrides on
	@test -z "$(ON_GPU)" || $(BIN)/python -c "import grouped_gemm" 2> /dev/null \
		|| echo "A GPU is here: 'make megablocks' builds MegaBlocks for it, which mixtures then train with in bf16"
	$(BIN)/python train.py experiment=moe_spannorm $(ON_GPU) $(ARGS)

megablocks: $(FOR_TRAINING)  ## build MegaBlocks for this machine's GPU; needs nvcc of torch's CUDA version
	$(BIN)/python -m pip install --quiet -r requirements-build.txt
	$(BIN)/python -m tools.megablocks

# A file at a time, so that what its tests share is made once, and not once in each process.
test: $(FOR_TESTS)  ## lint, types, documentation, and every test that takes no patience
	$(MAKE) --no-print-directory --jobs=3 --output-sync lint types docs
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(FOR_TESTS)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

# In .venv, or else beside the torch that the machine has, which stays; from wheels/ where that is there, and from pip.
check-gpu:  ## what holds on this machine's GPU, in eight minutes: results/gpu-DEVICE.md; ARGS=device=cpu is a dry run
	tools/check_gpu.sh $(PYTHON) $(ARGS)

# The pins are left out, so that pip takes the newest; the tests are those of core/compat.py alone.
check-newest: | $(MADE)  ## which undocumented uses of Lightning and torch still hold with their newest versions
	$(BIN)/python -m venv --clear .venv-newest
	sed -E 's/(==|~=)[^ ;]+//' requirements.txt > .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade -r .venv-newest/requirements.txt pytest pytest-timeout
	.venv-newest/bin/python -m pytest -q tests/core/test_compat.py

bench: $(FOR_BENCH) $(FOR_TESTS)  ## all benchmarks of a CPU; PART="start busy" some of them, ARGS="rounds=3" hands fields on
	@set -e; for part in $(or $(PART),$(BENCHMARKS)); do \
		case $$part in compare|costs) python=$(BENCH)/python ;; *) python=$(BIN)/python ;; esac; \
		echo "$$python -m benchmarks.$$part $(ARGS)"; $$python -m benchmarks.$$part $(ARGS); done

bench-gpu: $(FOR_BENCH)  ## the same on a GPU
	$(BENCH)/python -m benchmarks.compare device=cuda $(ARGS)
	$(BENCH)/python -m benchmarks.costs device=cuda

lint: $(FOR_TESTS)  ## ruff, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(FOR_TESTS)  ## mypy
	$(BIN)/mypy

docs: $(FOR_TESTS)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(FOR_TESTS)  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf .venv .venv-torch-* .venv-bench .venv-gpu .venv-newest site build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(MADE):
	@test -n "$(VERSION)" || { echo "$(PYTHON) is not Python 3.11 to 3.13; choose one: make train PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(FOR_TRAINING): requirements.txt | $(MADE)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(FOR_TESTS): $(wildcard requirements*.txt) | $(MADE)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@$(if $(TORCH),$(BIN)/python -m pip install --quiet torch==$(TORCH))
	@# Without its dependencies: it asks for Optuna 2. See requirements-sweeps.txt.
	$(BIN)/python -m pip install --quiet --no-deps hydra-optuna-sweeper==1.3.0
	@# Its Python files alone, beside any torch and any CUDA toolkit: docs/megablocks.md.
	$(BIN)/python -m tools.megablocks compiled=false
	@touch $@ $(FOR_TRAINING)

$(FOR_BENCH): requirements.txt requirements-bench.txt | $(MADE)
	$(BIN)/python -m venv --clear .venv-bench
	$(BENCH)/python -m pip install --quiet -r requirements-bench.txt
	@# Without their dependencies: they pin other versions than ours. What they import is in requirements-bench.txt.
	$(BENCH)/python -m pip install --quiet --no-deps litgpt==0.5.13 torchtitan==0.3.0
	@touch $@
