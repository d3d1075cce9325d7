# `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test test-all lint

# The whole main job on built-in phantom patients, or on real scans: make demo LIDC=/path/to/LIDC-IDRI
demo: $(READY)
	$(BIN)/raysynth demo $(if $(LIDC),--lidc "$(LIDC)")

# Two processes: much of a test is waiting for others to start.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint
	$(PYTEST)

# The slow tests: faults, every tiny recipe, several processes.
test-all: $(READY)
	$(PYTEST) -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy raysynth storage_schema
	$(BIN)/codespell raysynth storage_schema jobs tests README.md

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
