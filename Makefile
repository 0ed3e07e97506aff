# Needs Python 3.11 or newer, make and git; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Two processes of pytest, each with files of its own; the integration tests come first, as they take longest.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# The tests start many processes: what one has compiled, the others read, wherever they are run.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo quick test check schema clean

help:  ## Show the targets.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: .venv/installed  ## Make .venv with everything in it.

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install  ## Search, train, evaluate and register on real handwritten digits, offline.
	$(BIN)/grainmill tune search_spaces/demo.yaml

quick: check  ## Run the checks and all tests that start neither Ray nor a server.
	$(BIN)/python -m pytest $(TWO) --ignore tests/integration

test: check  ## Run the checks and the whole test suite.
	$(BIN)/python -m pytest $(TWO)

check: install  ## Lint, types, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

schema: install  ## Write the JSON schema of experiment files and the page of all settings.
	$(BIN)/grainmill schema > search_spaces/schema.json
	$(BIN)/python docs/write_settings.py > docs/settings.md

clean:  ## Remove .venv and caches; runs stay.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build
