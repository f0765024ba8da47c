# `make help` lists the targets. All commands run in .venv, which `make setup` makes and updates.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tandem-setup
PROTO_PACKAGE := tandem/v1
PROTOS := $(wildcard proto/$(PROTO_PACKAGE)/*.proto)
PROMTOOL := build/tools/promtool
OUT ?= .
# `make test` runs these and the checks beside the others, one process a half. None of them starts whole clusters.
BESIDE := tests/placement tests/engine tests/models tests/bench tests/fuzz tests/scheduling tests/conformance tests/kv_transfer

# On machines without a GPU, torch should be the CPU build; a mirror or pip.conf decides where it comes from.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# pip would do it on one core. Some packages have files for other versions of Python, which do not compile.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib

.DEFAULT_GOAL := help
HELM := build/tools/helm

.PHONY: docs help setup serve test beside lint types layers proto proto-check check-deploy test-fast test-slow chaos soak bench lock audit clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with all extras, at the pinned versions; does nothing if nothing has changed

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "$(PYTHON) is not Python 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@mkdir -p build && echo "making $(VENV); build/setup.log says how far it is"
	@{ { test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV); } \
	  && $(PIP) install --no-compile -c constraints.txt torch \
	  && $(PIP) install --no-compile -c constraints.txt --editable '.[dev]' \
	  && { $(COMPILE) || true; }; } > build/setup.log 2>&1 \
	  || { cat build/setup.log >&2; exit 1; }
	@touch $@

serve: setup ## start the built-in model, or FILE=serve.yaml; Ctrl-C ends it
	@exec $(BIN)/tandem serve --launcher process $(FILE)

test: setup lint $(HELM) $(PROMTOOL) ## what CI runs: all checks, and all tests but the slow ones with their coverage
	@mkdir -p build/coverage && $(BIN)/coverage erase
	@$(MAKE) --no-print-directory beside > build/beside.log 2>&1 & trap "kill $$!" INT TERM; \
	$(BIN)/coverage run -m pytest -q --durations=15 $(BESIDE:%=--ignore=%); others=$$?; \
	wait $$!; beside=$$?; echo "beside them:"; cat build/beside.log; \
	test "$$others$$beside" = 00
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage json -q -o build/coverage.json; enough=$$?; $(BIN)/python .ci/coverage_by_package.py < build/coverage.json; \
	test $$enough = 0 || { echo "less than 90 % of the lines are covered" >&2; exit 1; }

beside: types layers proto-check
	@$(BIN)/coverage run -m pytest -q --durations=15 $(BESIDE)

lint: setup ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy --strict
	$(BIN)/mypy

layers: setup ## which package may import which
	$(BIN)/lint-imports --no-cache

proto: setup ## generate the stubs in tandem/v1
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) $(PROTOS)

proto-check: setup ## check that the stubs are those of the .proto files
	@rm -rf build/proto && mkdir -p build/proto
	@$(MAKE) --no-print-directory proto OUT=build/proto
	@for file in build/proto/$(PROTO_PACKAGE)/*; do cmp "$$file" "$(PROTO_PACKAGE)/$${file##*/}" || exit 1; done \
	  || { echo "the stubs are out of date: run make proto" >&2; exit 1; }

$(HELM): .ci/fetch_helm.py | $(STAMP)
	@$(BIN)/python .ci/fetch_helm.py $(@D)

$(PROMTOOL): .ci/fetch_promtool.sh
	@.ci/fetch_promtool.sh $(@D) || echo "no promtool: the tests of alert rules are skipped" >&2

check-deploy: setup $(HELM) $(PROMTOOL) ## the Helm chart, held against the schemas of Kubernetes; alert rules; what runs in containers
	$(BIN)/python -m pytest -q tests/deploy/kubernetes tests/deploy/monitoring

test-fast: setup $(HELM) $(PROMTOOL) ## the tests that need no Ray
	$(BIN)/python -m pytest -q --ignore=tests/deploy/test_ray_cluster.py --ignore=tests/cluster \
	  --ignore=tests/chaos

test-slow: setup $(PROMTOOL) ## the long tests only, without those of `make chaos`
	$(BIN)/python -m pytest -q -m slow --ignore=tests/chaos

chaos: setup ## every row of docs/failures.md: processes die, stall, are slow, full or cut off
	$(BIN)/python -m pytest -q -m 'slow or not slow' tests/chaos

soak: setup ## 15 minutes of mixed load with kills and stalls, then 100,000 short requests; fails if anything leaks or is wrong
	@mkdir -p build
	@$(BIN)/python -m bench.soak --json build/soak.json; mixed=$$?; \
	$(BIN)/python -m bench.soak --short-requests 100000 --json build/soak-short.json; short=$$?; \
	test "$$mixed$$short" = 00

bench: setup ## measure the engine, and what a request costs beside it
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.overhead

docs: setup ## the documentation as a site, in build/site
	$(BIN)/mkdocs build --quiet

TOOLS := build/lock-tools
$(TOOLS): # of `make lock` and `make audit`, apart from what is tested
	@"$(PYTHON)" -m venv $@ && $@/bin/python -m pip --disable-pip-version-check --no-input install --quiet uv pip-audit

lock: $(TOOLS) ## write requirements.lock: all packages in the tested versions, with the hashes of their files
	$(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-header \
	  --constraints constraints.txt --output-file requirements.lock pyproject.toml

audit: $(TOOLS) ## compare the locked packages with published weaknesses; fails where the registry tells none
	$(TOOLS)/bin/pip-audit --strict --requirement requirements.lock --require-hashes --disable-pip --progress-spinner off

clean: ## remove all that was built, .venv too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
