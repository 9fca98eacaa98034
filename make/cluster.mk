.PHONY: test-cluster
test-cluster: setup ## Install everything on the cluster of KUBECONFIG and run all flows there (T=tests/cluster/test_x.py for some)
	@$(BIN)/python -m pytest --durations=10 $(or $(T),tests/cluster)
