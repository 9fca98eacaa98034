##@ Chaos, load and incidents (on the cluster of KUBECONFIG, which they need for themselves)

N ?= 5
AT_ONCE ?= 2
MINUTES ?= 15

.PHONY: chaos
chaos: setup ## Break running flows in every way of tests/cluster/chaos, N times each (N=5, ROWS="engine-sigkill …", AT_ONCE=2)
	@CHAOS_N=$(N) CHAOS_ROWS="$(ROWS)" CHAOS_AT_ONCE=$(AT_ONCE) $(BIN)/python -m pytest --capture=no tests/cluster/chaos/suite.py

.PHONY: load
load: setup ## 20 runs at once, a map of 10,000 items, 200 deployments every minute (MINUTES=15)
	@LOAD_MINUTES=$(MINUTES) $(BIN)/python -m pytest --capture=no tests/cluster/chaos/load.py

.PHONY: incidents
incidents: setup ## Three incidents that need a cluster, as on-call sees them: state, report, message, status and alert
	@$(BIN)/python -m pytest --capture=no tests/cluster/chaos/incidents.py
