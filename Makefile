# `make` lists what there is. Every target sets up a virtual environment first, if it is not there yet.
# PYTHON: which Python to set it up with. VENV: where. ARGS: more arguments for the command behind a target.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/set-up-complete
UNFINISHED := $(VENV)/set-up-unfinished
REQUIREMENTS := pyproject.toml requirements/cpu.txt requirements/fbgemm-gpu-on-cpu/pyproject.toml

.PHONY: help setup demo test bench lint types check clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## install everything into .venv, for a machine without a GPU

demo: $(STAMP) ## search, compact and report on generated data: make demo ARGS="--out runs/mine train.epochs=1"
	$(BIN)/embsearch run recipes/demo.yaml $(ARGS)

test: $(STAMP) ## run the tests: make test ARGS="-x tests/test_stack.py"
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP) ## what a search costs: make bench ARGS="--rows 1000000"
	$(BIN)/embsearch bench $(ARGS)

lint: $(STAMP) ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## static types
	$(BIN)/mypy

check: lint types test ## all three

clean: ## delete the virtual environment in .venv and every cache
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

# The stamp is written last. A folder that was begun here and never finished is deleted, because pip does not repair
# packages that it was killed in the middle of; an environment that was there before is only added to.
$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d. Try: make PYTHON=python3.11" % sys.version_info[:2])'
	@test ! -e $(UNFINISHED) || rm -rf $(VENV)
	@test -e $(VENV) || { mkdir -p $(VENV) && touch $(UNFINISHED); }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements/cpu.txt
	@rm -f $(UNFINISHED)
	@touch $@
