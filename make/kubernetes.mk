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
chart-docs: setup ## Write the chart's README, schema and copies of k8s/ anew
	@$(BIN)/python helm/generate.py

.PHONY: chart-test
chart-test: setup ## Render the chart and k8s/ and check them (needs helm, kubectl and kubeconform, no network)
	@$(BIN)/python -m pytest tests/helm
