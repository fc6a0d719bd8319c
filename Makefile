# `make compare` runs the main job, `make test` the tests; each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help compare test test-fast lint bench docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

# what `make compare` and `make bench` need: a third of the whole
$(VENV)/.compare-ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) for compare: some 55 packages; a minute or two"
	@echo "this takes 1.4 GB with a CPU build of PyTorch, about 5 GB with pip's default on Linux, a build for CUDA;"
	@echo "(pytorch.org names the index of CPU builds; set PIP_EXTRA_INDEX_URL to it to use them)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[compare]'
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt $(VENV)/.compare-ready
	@echo "adding what the tests need: some 100 packages, 2 GB; a minute or two"
	$(PIP) -e '.[dev]'
	# timm's torchvision does not load beside a CPU torch, and breaks others there: kept apart
	-$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/timm timm==1.0.31 torchvision==0.29.2
	touch $@

compare: $(VENV)/.compare-ready ## train and compare the mixers on moving digits; writes compare/report.html
	$(BIN)/translution compare $(ARGS)

test: $(VENV)/.ready ## the whole test suite
	$(BIN)/python -m pytest -n auto $(ARGS)

test-fast: $(VENV)/.ready ## the tests that take a minute or so in all, of every part
	$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

lint: $(VENV)/.ready ## ruff, mypy, and which part may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.compare-ready ## speed and memory of the operators on this machine
	$(BIN)/translution bench $(ARGS)

docs: $(VENV)/.ready ## this library's site, into site/; it needs no network
	$(BIN)/python -m mkdocs build --strict

clean: ## remove what make made
	rm -rf $(VENV) compare site
