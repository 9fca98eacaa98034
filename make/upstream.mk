##@ Upstream releases

NEWEST := build/newest
UPSTREAM := prefect prefect-dask prefect-docker prefect-kubernetes prefect-redis dask distributed dask-kubernetes kopf kr8s
UPSTREAM_ISSUE := The newest upstream releases fail a contract test

# Its own virtualenv: the locked dependencies, then only these packages (and what they require) at their newest release.
# The bounds of requirements/package.in on other packages stay in force.
.PHONY: test-upstream-newest
test-upstream-newest: setup ## Run the contract tests of tidepool/upstream against the newest releases of its packages
	@mkdir -p build
	@$(PYTHON) -m venv --clear --without-pip $(NEWEST)
	@$(BIN)/uv pip sync --quiet --python $(NEWEST)/bin/python --require-hashes requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(NEWEST)/bin/python --no-deps --no-build-isolation --editable .
	@$(BIN)/uv pip install --quiet --python $(NEWEST)/bin/python $(UPSTREAM) $(addprefix --upgrade-package=,$(UPSTREAM))
	@{ echo '```'; $(BIN)/uv pip freeze --quiet --python $(NEWEST)/bin/python | grep -E '^($(subst $(eval) ,|,$(UPSTREAM)))=='; \
	  $(NEWEST)/bin/python -m pytest --tb=short tests/contract/test_upstream_*.py && code=0 || code=$$?; \
	  echo '```'; exit $$code; } | tee build/upstream.md && code=0 || code=$$?; \
	  cat build/upstream.md >> "$${GITHUB_STEP_SUMMARY:-/dev/null}"; exit $$code

PREFECT_DASK := build/prefect-dask
SUITE = PREFECT_TEST_MODE=1 PYTHONPATH=$(CURDIR)/$(PREFECT_DASK)/tools:$(CURDIR)/tests/prefect_dask $(CURDIR)/$(BIN)/python -m pytest \
  --quiet --tb=short --timeout=900 --timeout-method=thread -p pytest_asyncio -p suite_plugin \
  --override-ini env= tests/test_task_runners.py

# Its source distribution, pinned by hash, is built for its metadata only, by tools that are pinned too.
.PHONY: test-prefect-dask
test-prefect-dask: setup ## Run prefect-dask's own tests of its task runner, with the stock one and with ours; none may be worse
	@rm -rf $(PREFECT_DASK) && mkdir -p $(PREFECT_DASK)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --target $(PREFECT_DASK)/tools -r tests/prefect_dask/tools.txt
	@PYTHONPATH=$(CURDIR)/$(PREFECT_DASK)/tools SETUPTOOLS_SCM_PRETEND_VERSION=$$(sed -n 's/^prefect-dask==\([^ ]*\).*/\1/p' tests/prefect_dask/source.txt) \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --no-binary :all: --require-hashes --dest $(PREFECT_DASK) -r tests/prefect_dask/source.txt
	@tar --extract --gzip --strip-components 1 --directory $(PREFECT_DASK) --file $(PREFECT_DASK)/prefect_dask-*.tar.gz
	@cd $(PREFECT_DASK) && { $(SUITE) --junitxml=stock.xml > stock.log || true; }
	@cd $(PREFECT_DASK) && { SUITE_RUNNER=ours $(SUITE) --junitxml=ours.xml > ours.log || true; }
	@$(BIN)/python -m tests.prefect_dask.compare $(PREFECT_DASK)/stock.xml $(PREFECT_DASK)/ours.xml

.PHONY: upstream-issue
upstream-issue: ## Open the issue that reports the last test-upstream-newest, or update the open one (needs gh)
	@number=$$(gh issue list --state open --search 'in:title "$(UPSTREAM_ISSUE)"' --json number --jq '.[0].number // empty'); \
	  if test -n "$$number"; then gh issue edit "$$number" --body-file build/upstream.md; \
	  else gh issue create --title "$(UPSTREAM_ISSUE)" --body-file build/upstream.md; fi
