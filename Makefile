# `make compare` runs the main job, `make test` the tests; each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help compare test lint bench docs clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	# timm's torchvision does not load beside a CPU torch, and breaks others there: kept apart
	-$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/timm timm==1.0.31 torchvision==0.29.2
	touch $@

compare: $(VENV)/.ready ## train and compare the mixers on moving digits; writes compare/report.html
	$(BIN)/translution compare $(ARGS)

test: $(VENV)/.ready ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

lint: $(VENV)/.ready ## ruff, mypy, and which part may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready ## speed and memory of the operators on this machine
	$(BIN)/translution bench $(ARGS)

docs: $(VENV)/.ready ## this library's site, into site/; it needs no network
	$(BIN)/python -m mkdocs build --strict

clean: ## remove what make made
	rm -rf $(VENV) compare site
