# tidepool: the commands of this repository. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# Servers, drivers and workers are separate processes: without bytecode each compiles a thousand modules again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help
help: ## Show the commands
	@awk 'BEGIN {FS = ":.*##"; printf "usage: make COMMAND\n"} \
	  /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-zA-Z_-]+:.*##/ {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Daily use

.PHONY: setup
setup: $(READY) ## Create .venv with the locked dependencies, or update it when they changed

# pip installs the locked uv, which installs the rest in seconds; nothing unlocked is fetched.
$(READY): requirements/bootstrap.txt requirements/dev.txt requirements/gc.pth pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "tidepool needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/bootstrap.txt
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@packages="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	  cp requirements/gc.pth "$$packages"; echo '$(CURDIR)' >"$$packages/repository.pth" # makes `flows` importable
	@touch $@

.PHONY: demo
demo: setup ## Run all flows on this machine, on real samples, and show them in the Prefect UI (DEMO_ARGS=--exit stops afterwards)
	@$(BIN)/tidepool demo $(DEMO_ARGS)

.PHONY: run
run: setup ## Run one deployment's flow on this machine: make run FLOW=csv-etl [ARGS="-p increment=2"]
	@test -n "$(FLOW)" || { echo "missing FLOW, for example: make run FLOW=csv-etl"; exit 2; }
	@$(BIN)/tidepool run $(FLOW) $(ARGS)

##@ Before a pull request

.PHONY: test
test: setup ## Run the tests (T=tests/unit/test_x.py for some of them; COVERAGE=1 measures coverage, and takes longer)
	@if test -n "$(T)"; then $(BIN)/python -m pytest $(T); else \
	  $(BIN)/python -m pytest $(OURS) $(PARALLEL) $(LONGEST) $(filter-out $(LONGEST),$(TESTS)) $(MEASURED); fi

TESTS := $(wildcard $(addsuffix /test_*.py,$(addprefix tests/,integration contract unit helm)))
MEASURED = $(if $(COVERAGE),--cov --cov-report=term:skip-covered --cov-fail-under=90)

# Three processes keep two cores busy, because tests wait for other processes a third of their time. Each has a Prefect
# server of its own and takes the next file when it has finished one. The longest files come first, because one that begins
# last leaves the other cores idle.
JOBS ?= 3
# A test that hangs ends its process, and pytest-xdist gives it to the next one.
PARALLEL = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 1
LONGEST := $(addprefix tests/integration/,test_runner_truth.py test_runner_behaviours.py test_demo.py test_run_command.py \
  test_drill.py test_new_command.py test_first_flow.py \
  test_forecast_flow.py test_deploy_apply.py test_deploy_command.py test_taxi_flows.py test_batches.py test_compute.py \
  test_deploy_workflow.py test_flow_run_api.py test_image_etl_flow.py test_tickets_flow.py test_deploy_property.py)

# Tests of the stock task runner take minutes, and must not block a change of ours.
OURS := -m "not stock"

.PHONY: test-runner
test-runner: setup ## Run the tests of the task runner, ours and the stock one
	@$(BIN)/python -m pytest tests/integration/test_runner_behaviours.py tests/integration/test_runner_truth.py \
	  tests/integration/test_batches.py

.PHONY: test-recovery
test-recovery: setup ## Fire each automation on PostgreSQL, and kill and retry each flow (needs Debian's postgresql)
	@$(BIN)/python -m pytest tests/recovery

.PHONY: check
check: setup ## Lint, formatting, types, import rules and language; every tool runs, whatever the others found
	@failed=0; summary=; \
	for tool in "ruff check ." "ruff format --check ." mypy lint-imports "pytest -q $(LANGUAGE)"; do \
	  if $(BIN)/$$tool; then result=ok; else result=FAILED; failed=1; fi; \
	  summary+=$$(printf '%-44s %s' "$$tool" "$$result")$$'\n'; done; \
	printf '\n%s' "$$summary"; exit $$failed

# In `make test`, too; here, because a sentence is often the last thing that is changed.
LANGUAGE := tests/contract/test_language.py

.PHONY: format
format: setup ## Format the code, and fix what the linter can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

##@ Maintenance

.PHONY: lock
lock: setup ## Lock the dependencies of requirements/*.in (UPGRADE=--upgrade for newer versions)
	@for name in bootstrap runtime dev; do \
	  $(BIN)/uv pip compile $(UPGRADE) --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	    --override requirements/overrides.in requirements/$$name.in --output-file requirements/$$name.txt; done

.PHONY: reference
reference: setup ## Generate docs/settings.md and docs/commands.md
	@$(BIN)/python -m docs.generate

# Strict: a warning, such as a link to an anchor that a page does not have, fails the build. From the beginning each time:
# the menu is in every page, and Sphinx would write only those that have changed.
.PHONY: docs
docs: setup ## Build the site of docs/ into build/docs: open build/docs/index.html
	@rm -rf build/docs build/doctrees
	@$(BIN)/python -m sphinx -c docs --builder html --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees . build/docs
	@echo "build/docs/index.html"

.PHONY: clean
clean: ## Remove the environment, the caches and the demo's data
	@rm -rf $(VENV) .tidepool .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* htmlcov build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

include $(wildcard make/*.mk)
