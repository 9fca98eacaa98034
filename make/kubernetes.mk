##@ Kubernetes

IMAGE_NAME ?= $(or $(TIDEPOOL_IMAGE_NAME),tidepool)
IMAGE_TAG ?= $(shell git describe --always --dirty --abbrev=12 --exclude='*')

.PHONY: image
image: ## Build the image, tag = Git commit (IMAGE_NAME=registry/name; PUSH=1 pushes and prints name@sha256:…)
	@docker buildx build --tag $(IMAGE_NAME):$(IMAGE_TAG) --build-arg REVISION=$(IMAGE_TAG) \
	  --build-arg BASE_IMAGE=$(TIDEPOOL_IMAGE_BASE) $(if $(PUSH),--push,--load) .
	@$(if $(PUSH),docker buildx imagetools inspect $(IMAGE_NAME):$(IMAGE_TAG) --format '$(IMAGE_NAME)@{{.Manifest.Digest}}',\
	  docker image inspect $(IMAGE_NAME):$(IMAGE_TAG) --format '$(IMAGE_NAME):$(IMAGE_TAG) {{.Size}} bytes')

.PHONY: chart-docs
chart-docs: setup ## Generate the chart's README, schema and copies of k8s/
	@$(BIN)/python -m helm.generate

.PHONY: admission-policies
admission-policies: setup ## Generate the admission policies of k8s/cluster from the rules for flow runs
	@$(BIN)/python k8s/generate.py

.PHONY: chart-test
chart-test: setup ## Render the chart and k8s/ and check them (needs helm, kubectl and kubeconform, no network)
	@$(BIN)/python -m pytest tests/helm

.PHONY: test-cluster
test-cluster: setup ## Install everything on the cluster of KUBECONFIG and run all flows there (T=tests/cluster/test_x.py for some tests)
	@$(BIN)/python -m pytest --durations=10 $(or $(T),tests/cluster)

VERSITYGW := github.com/versity/versitygw/cmd/versitygw@v1.8.0

.PHONY: kind-tools
kind-tools: setup ## Install the S3 server of the cluster tests into .venv/bin (needs Go)
	@GOBIN=$(abspath $(BIN)) go install $(VERSITYGW)
	@test -z "$${GITHUB_PATH:-}" || echo "$(abspath $(BIN))" >> "$$GITHUB_PATH"

STORE_IMAGE ?= localhost:5000/tidepool-store:1

.PHONY: store-image
store-image: ## Build and push the S3 server of k8s/overlays/dev/store (STORE_IMAGE=registry/name:tag; make kind-tools brings its program)
	@program=$$(PATH="$(abspath $(BIN)):$$PATH" command -v versitygw) || { echo "missing versitygw, the S3 server: make kind-tools"; exit 2; }; \
	  context=$$(mktemp -d); trap 'rm -r "$$context"' EXIT; cp tests/cluster/images/s3/Dockerfile "$$program" "$$context"; \
	  docker buildx build --tag $(STORE_IMAGE) --build-arg BASE_IMAGE=$(TIDEPOOL_IMAGE_BASE) --push "$$context"
	@name=$(STORE_IMAGE); docker buildx imagetools inspect $(STORE_IMAGE) --format "$${name%:*}@{{.Manifest.Digest}}"

# The same on any cluster: KUBECONFIG names it.
.PHONY: kind-demo
kind-demo: setup ## Install the chart for development on the cluster of KUBECONFIG and run all six flows (REGISTRY=localhost:5000)
	@PATH="$(abspath $(BIN)):$$PATH" REGISTRY=$(REGISTRY) $(BIN)/python tests/cluster/demo.py

REGISTRY ?= localhost:5000

.PHONY: kind-up
kind-up: ## Start a kind cluster `tidepool` with a registry on localhost:5000, for `make test-cluster` or to try the chart
	@docker inspect tidepool-registry >/dev/null 2>&1 || \
	  docker run --detach --publish 127.0.0.1:5000:5000 --name tidepool-registry registry:3 >/dev/null
	@kind get clusters | grep -qx tidepool || kind create cluster --name tidepool --config k8s/kind/cluster.yaml
	@docker network connect kind tidepool-registry 2>/dev/null || true # connected already
	@for node in $$(kind get nodes --name tidepool); do \
	  docker exec $$node mkdir -p /etc/containerd/certs.d/localhost:5000; \
	  docker exec --interactive $$node cp /dev/stdin /etc/containerd/certs.d/localhost:5000/hosts.toml < k8s/kind/hosts.toml; done

.PHONY: kind-down
kind-down: ## Remove the kind cluster and its registry
	@kind delete cluster --name tidepool
	@docker rm --force tidepool-registry >/dev/null
