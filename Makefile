# Two commands for a newcomer: `make demo` and `make test`. Nothing but Python 3.11+ and make
# need be there. Big downloads are kept in ~/.cache/comfy-restore, by their pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICK := tests/unit tests/contracts -m "not services and not real_engine"

.DEFAULT_GOAL := help
.PHONY: help setup engine demo unit test haproxy chaos failover bench simulate check format dist lock upgrade clean
# One file for each lock: of what develops and tests, and of what a cluster's nodes need.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## make the project's environment

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer with venv is needed (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	$(BIN)/pip install --quiet --require-hashes -r $(VENV)/uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

engine: $(READY) ## install ComfyUI and the models into the user cache
	$(BIN)/restore engine install

demo: engine ## restore a photo through the whole system; pictures in demo/
	$(BIN)/python docs/examples/demo.py

unit: $(READY) ## quick tests on fakes, without engine, servers or Ray, on all cores
	$(BIN)/pytest $(QUICK) --numprocesses logical --maxprocesses 4

test: engine ## all tests but those of failover, the real ComfyUI's among them; coverage is gated
	$(BIN)/pytest tests/unit tests/contracts --cov
	$(BIN)/pytest tests/integration tests/security tests/e2e tests/chaos

haproxy: engine ## the tests of security, or TESTS, with HAProxy in front as on a cluster
	RAY_SERVE_ENABLE_HA_PROXY=1 $(BIN)/pytest $(or $(TESTS),tests/security)

chaos: engine ## kill one component after another for SECONDS (600), then count what came of the jobs
	$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),600)

failover: engine ## take a node, and the head, from a service at work; deploy releases and engines over it
	$(BIN)/pytest tests/failover/failover.py tests/failover/head.py tests/failover/deployment.py \
		tests/failover/engine.py

bench: engine ## measure against a bare ComfyUI and others; table, build/bench.json and a chart
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.lock -e '.[bench]'
	$(BIN)/python -m benchmarks $(ONLY)

simulate: $(READY) ## one day of a fleet under four ways to scale it; table, build/simulate.json and a chart
	$(BIN)/python -m benchmarks.simulation

check: $(READY) ## ruff (bandit's rules too), mypy, import-linter, pip-audit
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m tests.support.audit

format: $(READY) ## let ruff format everything
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --fix --quiet .

dist: $(READY) ## build the wheel into dist/, install it into a new environment and run it there
	rm -rf dist build/release
	$(BIN)/uv build --quiet --wheel
	$(BIN)/uv venv --quiet --python $(BIN)/python build/release
	$(BIN)/uv pip install --quiet --python build/release/bin/python -c deploy/requirements.lock dist/*.whl
	cd build/release && bin/restore --help >/dev/null
	$(BIN)/pytest --quiet tests/unit/test_release.py

lock: $(READY) ## lock what pyproject.toml has new; what is locked stays
	$(LOCK) $(UPGRADE) --extra dev -o requirements.lock pyproject.toml
	$(LOCK) -c requirements.lock -o deploy/requirements.lock pyproject.toml

upgrade: UPGRADE := --upgrade
upgrade: lock ## lock the newest versions that pyproject.toml allows

clean: ## remove the environment and what was built; the user cache stays
	rm -rf $(VENV) build dist demo
