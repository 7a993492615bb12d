# Two commands: `make run` serves the four demo models, `make test` checks everything. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ADDRESS ?=
CONFIG ?=

.PHONY: run test test-unit check format protos lock clean

run: $(VENV)/installed
	@exec $(BIN)/nibble serve $(CONFIG) $(if $(ADDRESS),--address $(ADDRESS))

test: $(VENV)/installed-dev check
	$(BIN)/python -m pytest

# No process is started, no port is bound beyond this one's: a few minutes.
test-unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/unit

# Format, lint, types, the direction of imports and fresh stubs: the same for people and CI.
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_stubs

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/installed-dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(wildcard protos/*.proto)

# Needs uv; pins every package for every supported Python.
lock:
	uv pip compile --universal --python-version 3.10 --no-header --no-annotate --extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit("nibble needs Python 3.10 or newer, found " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@ $(VENV)/installed
