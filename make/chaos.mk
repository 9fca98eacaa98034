##@ Chaos (on the cluster of KUBECONFIG, which it needs for itself)

N ?= 5
AT_ONCE ?= 2

.PHONY: chaos
chaos: setup ## Break running flows in every way of tests/cluster/chaos, N times each (N=5, ROWS="engine-sigkill …", AT_ONCE=2)
	@CHAOS_N=$(N) CHAOS_ROWS="$(ROWS)" CHAOS_AT_ONCE=$(AT_ONCE) $(BIN)/python -m pytest --capture=no tests/cluster/chaos/suite.py
