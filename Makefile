# Two commands: `make run` serves the four demo models, `make test` checks everything but what takes long (`make
# test-long`) or installs much (`make test-clients`). Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests that start processes, a server for example: one after the other.
PROCESSES := tests/k8s tests/integration tests/clients tests/chaos
ADDRESS ?=
CONFIG ?=

.PHONY: run test test-long test-unit test-clients test-k8s check format docs protos k8s lock clean

run: $(VENV)/installed
	@exec $(BIN)/nibble serve $(CONFIG) $(if $(ADDRESS),--address $(ADDRESS))

test: $(VENV)/installed-dev check test-unit
	$(BIN)/python -m pytest -m "not long and not cluster and not installs" $(PROCESSES)

# What takes long and is rarely broken; and what draws examples, with more of them.
test-long: $(VENV)/installed-dev
	NIBBLE_TEST_LONG=1 $(BIN)/python -m pytest -m "long or generated" -n 2 --dist loadfile tests/unit
	NIBBLE_TEST_LONG=1 $(BIN)/python -m pytest -m "(long or generated) and not cluster and not installs" $(PROCESSES)

# Clients that others wrote, each in an environment of its own, which is kept for the next time: aiperf and guidellm too,
# whose gigabytes take minutes to install.
test-clients: $(VENV)/installed-dev
	$(BIN)/python -m pytest -rs tests/clients

# No process is started but pytest's own two, no port is bound beyond theirs: under two minutes on two cores.
test-unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile tests/unit

# The Kubernetes manifests: held to every rule that needs no cluster; run by a look-alike of KubeRay on this machine (as
# root, with ip, unshare, nft and redis-server); and the image, built and run (with mmdebstrap and buildah). What a test
# needs and does not find, it says.
test-k8s: $(VENV)/installed-dev
	NIBBLE_TEST_LONG=1 $(BIN)/python -m pytest -s -rs tests/k8s

# Format, lint, types, the direction of imports, fresh stubs, and tests that can be imported: the same for people and CI.
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_stubs
	$(BIN)/python -m pytest --collect-only -qq -m ""

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pages of docs/reference that are made from the code; a test holds them to it.
docs: $(VENV)/installed-dev
	$(BIN)/python -m tests.fields_page
	$(BIN)/python -m tests.metrics_page

protos: $(VENV)/installed-dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(wildcard protos/*.proto)

# What the Kubernetes manifests have of each configuration beside them; tests hold the committed files to it.
k8s: $(VENV)/installed-dev
	for config in $(wildcard k8s/base/nibble.yaml k8s/overlays/*/nibble.yaml); do \
	  $(BIN)/nibble render $$config --rayservice nibble > $$(dirname $$config)/serve-config.yaml && \
	  $(BIN)/nibble render $$config --settings > $$(dirname $$config)/serve-settings.env || exit 1; \
	done

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
