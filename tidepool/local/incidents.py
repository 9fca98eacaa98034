"""Runs of the demo that go wrong on purpose, by parameters of the flows: what on-call sees, before the first night."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun


@dataclass(frozen=True)
class Incident:
    """A run that goes wrong on purpose, and how it is meant to end.

    Attributes:
        deployment: Name of its deployment.
        state: Type of its final state.
        words: Words of the sentence about its end.
        parameters: Parameters of the run, beside the deployment's.
        kills_worker: A Dask worker of the run is killed.
    """

    deployment: str
    state: str
    words: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    kills_worker: bool = False

    def is_as_meant(self, run: FlowRun) -> bool:
        """Return whether a run has ended so."""
        message = (run.state and run.state.message) or ""
        return run.state_type is not None and run.state_type.value == self.state and self.words in message


INCIDENTS = {
    "csv-etl: bad input": Incident(
        "csv-etl", "FAILED", "is not an integer", {"source": "samples/nyc_taxi_2019-03_sample.csv"}
    ),
    "most-generous-riders: retry": Incident(
        "most-generous-riders", "COMPLETED", "retried", {"nrows": 12, "failure_rate": 0.2}
    ),
    # Items that wait for their next attempt are on the worker that is killed.
    "most-generous-riders: lost worker": Incident(
        "most-generous-riders", "COMPLETED", "worker lost", {"nrows": 12, "failure_rate": 0.5}, kills_worker=True
    ),
}


def kill_worker(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Kill a Dask worker of a run on this machine as soon as it has work; return whether one was killed."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        TaskRunFilter,
        TaskRunFilterState,
        TaskRunFilterStateName,
    )

    waits = TaskRunFilter(state=TaskRunFilterState(name=TaskRunFilterStateName(any_=["AwaitingRetry"])))
    if not client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), task_run_filter=waits
    ):
        return False
    for process in psutil.process_iter(["environ", "cmdline"]):
        mine = (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == str(run.id)
        # Dask starts its workers so, and nothing else in a run's process tree is.
        if mine and any("multiprocessing.spawn" in each for each in process.info["cmdline"] or ()):
            process.kill()
            return True
    return False
