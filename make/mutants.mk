##@ Mutation tests

MUTANTS ?= 200
SEED ?= 19

.PHONY: mutants
mutants: setup ## Try small faults in deploy, compute and storage, one at a time: do tests fail? (hours; MUTANTS=200 SEED=19)
	@$(BIN)/python -m tests.mutants --number $(MUTANTS) --seed $(SEED) --jobs $(JOBS) $(MUTANTS_ARGS)
