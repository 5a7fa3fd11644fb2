# Two commands set up everything: `make train` and `make test`. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
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

.PHONY: help train test test-slow lint types docs format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(FOR_TRAINING)  ## set up the environment and run the main job; ARGS="trainer.max_steps=20" hands overrides on
	$(BIN)/python train.py experiment=moe_spannorm $(ARGS)

test: $(FOR_TESTS) lint types docs  ## lint, types, documentation, and every test that takes no patience
	$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(FOR_TESTS)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(FOR_TESTS)  ## ruff, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(FOR_TESTS)  ## mypy
	$(BIN)/mypy

docs: $(FOR_TESTS)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(FOR_TESTS)  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(MADE):
	@test -n "$(VERSION)" || { echo "$(PYTHON) is not Python 3.11 to 3.13; choose one: make train PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(FOR_TRAINING): requirements.txt | $(MADE)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(FOR_TESTS): $(wildcard requirements*.txt) | $(MADE)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@# Without its dependencies: it asks for older versions than ours. Its build needs torch. See docs/megablocks.md.
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1
	@touch $@ $(FOR_TRAINING)
