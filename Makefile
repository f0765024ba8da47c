# `make help` lists what there is. Everything runs in .venv, which `make setup` makes and keeps up to date.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tandem-setup
PROTO_PACKAGE := tandem/v1
PROTOS := $(wildcard proto/$(PROTO_PACKAGE)/*.proto)
OUT ?= .

# Where the CPU has no GPU beside it, torch must be its CPU build; a mirror or pip.conf decides where it comes from.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint types layers proto proto-check test-fast test-slow bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with every extra, at the pinned versions; quick when nothing has changed

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "$(PYTHON) is not Python 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@

serve: setup ## start the built-in model; FILE=serve.yaml starts another (Ctrl-C ends it)
	@exec $(BIN)/tandem serve $(FILE)

test: setup lint types layers proto-check ## all checks, and the tests of the gate with their coverage
	@mkdir -p build/coverage && $(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage json -q --fail-under=0 -o - | $(BIN)/python .ci/coverage_by_package.py
	@$(BIN)/coverage report --format=total > /dev/null || { echo "less than 90 % of the lines are covered" >&2; exit 1; }

lint: setup ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy --strict on our packages
	$(BIN)/mypy

layers: setup ## who may import whom
	$(BIN)/lint-imports --no-cache

proto: setup ## write the stubs in tandem/v1 anew
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) $(PROTOS)

proto-check: setup ## do the stubs belong to the .proto files?
	@rm -rf build/proto && mkdir -p build/proto
	@$(MAKE) --no-print-directory proto OUT=build/proto
	@for file in build/proto/$(PROTO_PACKAGE)/*; do cmp "$$file" "$(PROTO_PACKAGE)/$${file##*/}" || exit 1; done \
	  || { echo "the stubs are out of date: run make proto" >&2; exit 1; }

test-fast: setup ## the tests that need no Ray
	$(BIN)/python -m pytest -q --ignore=tests/deploy/test_ray_cluster.py --ignore=tests/cluster

test-slow: setup ## the long tests, without the gate's
	$(BIN)/python -m pytest -q -m slow

bench: setup ## measure the engine and the request path around it
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.overhead

clean: ## remove what was made, .venv too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
