"""Runs through the pool: some at a time (`make load` has twenty), and one that is told to end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from installed import Platform

RUNS = 4


def jobs(platform: Platform, run_id: str) -> list[dict[str, Any]]:
    return platform.runs.get("jobs", f"prefect.io/flow-run-id={run_id}")


def test_runs_with_a_cluster_each_complete_at_the_same_time(platform: Platform) -> None:
    deployment = platform.copy("image-etl/image-etl", "at-once")
    began = time.monotonic()
    runs = [platform.start(deployment, n_workers=2, gif_name=f"clip-{n}.gif") for n in range(RUNS)]
    most = 0

    def ended() -> bool:
        nonlocal most
        most = max(most, len(platform.runs.get("daskclusters")))
        return all(platform.state(run) in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} for run in runs)

    platform.until(ended, "all runs have ended", 400)
    sys.__stderr__.write(f"{RUNS} runs in {time.monotonic() - began:.0f} s, {most} clusters at a time at most\n")
    states = [platform.run(run)["state"] for run in runs]
    assert [state["type"] for state in states] == ["COMPLETED"] * RUNS, [state["message"] for state in states]
    platform.until(lambda: not platform.runs.dask(), "no Dask object is left", 60)


def test_a_cluster_that_was_asked_for_early_is_there_when_the_flow_begins(platform: Platform) -> None:
    """And is the one of its run: one cluster, ready, used, gone."""
    run_id = platform.start("weekly-forecast/weekly-forecast", windows=4, horizon=1)
    names: set[str] = set()

    def ended() -> bool:
        names.update(each["metadata"]["name"] for each in platform.runs.get("daskclusters"))
        return platform.state(run_id) in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

    platform.until(ended, "the run has ended", 400)
    log = platform.logs(run_id)
    assert "is ready (asked for early " in log, log
    assert len(names) == 1
    assert platform.run(run_id)["state"]["type"] == "COMPLETED"
    platform.until(lambda: not platform.runs.dask(), "no Dask object is left", 60)


@pytest.mark.parametrize(
    ("entrypoint", "state"), [("flows.csv_etl.flow.csv_etl", "COMPLETED"), ("flows.csv_etl.absent.csv_etl", "CRASHED")]
)
def test_a_cluster_that_no_flow_takes_is_deleted(platform: Platform, entrypoint: str, state: str) -> None:
    found = platform.read("deployments/name/csv-etl/csv-etl")
    variables = {**found["job_variables"], "early_cluster": "small"}
    deployment = platform.copy(
        "csv-etl/csv-etl", f"early-{state.lower()}", entrypoint=entrypoint, job_variables=variables
    )
    run_id = platform.start(deployment)
    platform.until(lambda: platform.runs.get("daskclusters"), "its cluster exists", 120)
    assert platform.wait(run_id)["state_type"] == state
    platform.until(lambda: not platform.runs.dask(), "no Dask object is left", 60)
    [pod] = platform.runs.get("pods", f"prefect.io/flow-run-id={run_id}")
    log = platform.runs.kubectl("logs", pod["metadata"]["name"])
    assert "deleted: it was asked for early, and not used" in log


def test_a_run_that_is_told_to_end_is_crashed_and_not_executed_again(platform: Platform) -> None:
    """A drained node sends SIGTERM. Prefect's own choice for such a Job is to execute the run a second time."""
    run_id = platform.start("weekly-forecast/weekly-forecast", windows=52, horizon=1)
    selector = f"prefect.io/flow-run-id={run_id}"
    platform.until(lambda: "is ready" in platform.logs(run_id), "its cluster is ready", 300)
    [pod] = platform.runs.get("pods", selector)
    platform.runs.kubectl("delete", "pod", pod["metadata"]["name"], "--timeout=90s")
    run = platform.wait(run_id, 120)
    assert run["state_type"] == "CRASHED", run["state"]
    platform.until(lambda: not platform.runs.dask(), "no Dask object is left", 60)
    assert len(jobs(platform, run_id)) == 1
    assert platform.run(run_id)["run_count"] == 1
    assert platform.state(run_id) == "CRASHED", "it is final: nothing takes it up again"
