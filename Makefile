# `make serve` is all it takes: it sets up .venv on the first call and serves the bundled checkpoint.
#   ARGS      flags for `motserve serve`, e.g. make serve ARGS="--port 9000 --private force"
#   PYTHON    the interpreter .venv is made with (3.11 or newer)
#   PIP_ARGS  extra flags for pip, e.g. an index that has the torch build you want

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
# A process a core, each with one thread; more than four find too little to do.
PYTEST := $(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-slow check gpu-check wheel

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv with everything in it (quick when it is there)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "motserve needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(BIN)/python -m model.native
	@touch $@

serve: setup  ## serve the bundled checkpoint on port 8000
	$(BIN)/motserve serve $(ARGS)

test: setup  ## the fast tests
	$(PYTEST)

test-slow: setup  ## the slow tests
	$(PYTEST) -m slow

check: setup  ## all that CI checks, but for the slow tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

gpu-check: setup  ## tests and benchmarks on a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "make gpu-check needs a CUDA device and a torch built for CUDA; there is not both here. Nothing was tested." >&2; \
		exit 1; }
	$(BIN)/pytest -q -m cuda
	$(BIN)/motserve bench kernel --device cuda --dtype bfloat16 --shape mot-medium --json
	$(BIN)/motserve bench engine --device cuda --concurrency 1,32,256 --private-share 0,1 --json
	$(BIN)/motserve bench engine --device cuda --shape mot-medium --concurrency 1,32,256 --private-share 0,1 --json

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
