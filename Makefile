# Two commands set up everything: `make train` and `make test`. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# .venv holds the versions of one interpreter; another one, asked for by name, replaces it.
ifneq ($(origin PYTHON),file)
WANTED := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
FOUND := $(shell $(BIN)/python -c 'import platform; print(platform.python_version())' 2>/dev/null)
ifneq ($(WANTED),$(FOUND))
$(shell rm -rf $(VENV))
endif
endif

.PHONY: help train test test-slow lint types format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.train  ## set up the environment and run the main job; ARGS="trainer.max_steps=20" hands overrides on
	$(BIN)/python train.py experiment=moe_spannorm $(ARGS)

test: $(VENV)/.test lint types  ## lint, types, and every test that takes no patience
	$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(VENV)/.test  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.test  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## mypy
	$(BIN)/mypy

format: $(VENV)/.test  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13; choose one: make train PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.test: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@# Without its dependencies: it asks for older versions than ours. Its build needs torch. See docs/megablocks.md.
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1
	@touch $@ $(VENV)/.train
