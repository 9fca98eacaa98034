##@ Upstream releases

NEWEST := build/newest
UPSTREAM := prefect prefect-dask prefect-docker prefect-kubernetes prefect-redis dask distributed dask-kubernetes kopf kr8s
UPSTREAM_ISSUE := The newest upstream releases fail a contract test

# Its own virtualenv: the locked dependencies, then only these packages (and what they require) at their newest release.
# The bounds of requirements/runtime.in on other packages stay in force.
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

.PHONY: upstream-issue
upstream-issue: ## Open the issue that reports the last test-upstream-newest, or update the open one (needs gh)
	@number=$$(gh issue list --state open --search 'in:title "$(UPSTREAM_ISSUE)"' --json number --jq '.[0].number // empty'); \
	  if test -n "$$number"; then gh issue edit "$$number" --body-file build/upstream.md; \
	  else gh issue create --title "$(UPSTREAM_ISSUE)" --body-file build/upstream.md; fi
