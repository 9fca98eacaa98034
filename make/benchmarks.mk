##@ Benchmarks

.PHONY: bench
bench: setup ## Measure the task runners, and the states that each reports after a loss (BENCH_ARGS="--repeats 1 --rows map-200")
	@$(BIN)/python -m benchmarks.task_runner $(BENCH_ARGS)
	@$(BIN)/python -m benchmarks.truth
