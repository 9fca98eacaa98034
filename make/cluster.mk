VERSITYGW := github.com/versity/versitygw/cmd/versitygw@v1.8.0

.PHONY: test-cluster
test-cluster: setup ## Install everything on the cluster of KUBECONFIG and run all flows there (T=tests/cluster/test_x.py for some)
	@$(BIN)/python -m pytest --durations=10 $(or $(T),tests/cluster)

.PHONY: kind
kind: setup ## A kind cluster with a registry at localhost:5000, for test-cluster (needs Docker, kind, Go)
	@test -x $(BIN)/versitygw || GOBIN=$(abspath $(BIN)) CGO_ENABLED=0 go install $(VERSITYGW)
	@docker inspect tidepool-registry >/dev/null 2>&1 || \
	  docker run --detach --restart=always --publish 127.0.0.1:5000:5000 --name tidepool-registry registry:2.8.3
	@kind get clusters | grep -qx tidepool || kind create cluster --name tidepool --config tests/cluster/kind.yaml
	@docker network connect kind tidepool-registry 2>/dev/null || true
	@for node in $$(kind get nodes --name tidepool); do \
	  docker exec $$node mkdir -p /etc/containerd/certs.d/localhost:5000; \
	  echo '[host."http://tidepool-registry:5000"]' | \
	    docker exec --interactive $$node tee /etc/containerd/certs.d/localhost:5000/hosts.toml >/dev/null; done
	@test -z "$${GITHUB_PATH:-}" || echo "$(abspath $(BIN))" >> "$$GITHUB_PATH"
