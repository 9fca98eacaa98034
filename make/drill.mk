##@ On call

# Of the command line only: some shells have a variable NAME.
.PHONY: drill
drill: setup ## Break a local stack, see what on-call sees, and repair it by the runbook (NAME=late-runs; without NAME, the list)
	@$(BIN)/python -m tests.drill $(if $(filter command,$(firstword $(origin NAME))),$(NAME))

.PHONY: drill-all
drill-all: setup ## All drills, each on a stack of its own (long)
	@$(BIN)/python -m tests.drill --all
