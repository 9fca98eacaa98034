##@ From Git to the server (of PREFECT_API_URL; default: ENVIRONMENT=production)

ENVIRONMENT ?= production
IMAGE ?=
CANARY ?= csv-etl/csv-etl
CANARY_SECONDS ?= 900
DEPLOY = --environment $(ENVIRONMENT) $(if $(IMAGE),--image $(IMAGE))
YES = $(if $(YES_DELETE),--yes-delete $(YES_DELETE))
PREFECT = $(BIN)/prefect

.PHONY: validate
validate: setup ## Check prefect.yaml, automations.yaml and all environments; report every problem with its line
	@$(BIN)/tidepool validate

.PHONY: plan
plan: setup ## Show what a deploy would change (IMAGE=name@sha256:… to compare the image too)
	@$(BIN)/tidepool plan $(DEPLOY)

.PHONY: plan-comment
plan-comment: setup ## Write the plan as a comment on pull request PR=number, replacing the previous one
	@mkdir -p build && rm -f build/plan.md
	@$(BIN)/tidepool plan $(DEPLOY) --markdown --output build/plan.md
	@gh pr comment $(PR) --body-file build/plan.md --edit-last --create-if-none

.PHONY: deploy
deploy: setup ## Apply the plan: bring the server to the state in Git. Idempotent
	@$(BIN)/tidepool apply $(DEPLOY) $(YES)

.PHONY: prune
prune: setup ## Delete managed resources that are no longer in Git (YES_DELETE=N allows more than the usual share)
	@$(BIN)/tidepool prune --environment $(ENVIRONMENT) $(YES)

.PHONY: canary
canary: setup ## Run one deployment through the work pool and wait, to test scheduler, worker, image and store
	@$(PREFECT) deployment run $(CANARY) --watch --watch-timeout $(CANARY_SECONDS)

.PHONY: record
record: ## Push the Git tags that record what was deployed; `tidepool rollback` reads them
	@git push --quiet origin 'refs/tags/deployed/*:refs/tags/deployed/*'

.PHONY: drift
drift: setup ## Report the drift between Git and the server; fails if there is any
	@mkdir -p build && rm -f build/drift.md
	@$(BIN)/tidepool drift --environment $(ENVIRONMENT) $(DRIFT_ARGS) --detailed-exitcode --markdown --output build/drift.md; code=$$?; \
	  test ! -f build/drift.md || tee -a "$${GITHUB_STEP_SUMMARY:-/dev/null}" < build/drift.md; exit $$code

.PHONY: publish
publish: ## Build the image once, push it with SBOM and provenance, and print it by digest (REGISTRY_USER, REGISTRY_TOKEN)
	@printf '%s' "$$REGISTRY_TOKEN" | docker login --username "$$REGISTRY_USER" --password-stdin \
	  "$(firstword $(subst /, ,$(IMAGE_NAME)))"
	@docker buildx inspect tidepool >/dev/null 2>&1 || docker buildx create --name tidepool --driver docker-container
	@mkdir -p build
	@docker buildx build --builder tidepool --push --sbom=true --provenance=mode=max --metadata-file build/image.json \
	  --tag $(IMAGE_NAME):$(IMAGE_TAG) --build-arg REVISION=$(IMAGE_TAG) .
	@echo "image=$(IMAGE_NAME)@$$(jq -r '."containerimage.digest"' build/image.json)" | tee -a "$${GITHUB_OUTPUT:-/dev/null}"

.PHONY: check-workflows
check-workflows: setup ## Lint .github/workflows: actionlint (from PATH) and zizmor
	@actionlint
	@$(BIN)/zizmor --offline --quiet .github

ACTIONLINT := github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
KUBECONFORM := github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0

.PHONY: ci-tools
ci-tools: setup ## Install the checkers that are not Python packages into .venv/bin (needs Go), and debian-tools on a CI machine
	@for tool in $(ACTIONLINT) $(KUBECONFORM); do GOBIN=$(abspath $(BIN)) go install $$tool; done
	@test -z "$${GITHUB_PATH:-}" || { echo "$(abspath $(BIN))" >> "$$GITHUB_PATH"; $(MAKE) debian-tools; }

.PHONY: debian-tools
debian-tools: ## Install what tests leave out where it is missing: HAProxy, PostgreSQL, promtool (Debian, Ubuntu)
	@as_root=; test "$$(id -u)" = 0 || as_root=sudo; \
	  $$as_root apt-get update --quiet=2; \
  $$as_root apt-get install --quiet --yes --no-install-recommends haproxy postgresql prometheus
