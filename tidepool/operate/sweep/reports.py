"""The report of a flow run whose driver is gone, from what Prefect server and operator know. Pure functions."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from tidepool.report.reason import plain, reason
from tidepool.report.run_page import Past, Run, headline, page
from tidepool.report.run_record import Item, RunRecord
from tidepool.report.run_report import deployed, key, runbooks
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidepool.operate.sweep.dask_workers import DaskWorkers

Json = dict[str, Any]


def artifact(
    name: str,
    deployment: Mapping[str, Any],
    run: Json,
    task_runs: list[Json],
    past: Iterable[Json],
    page_size: int,
    workers: DaskWorkers,
) -> Json:
    """Return the artifact, as the API creates it.

    Args:
        name: Name of the deployment, or of the flow without one.
        deployment: The deployment; empty without one.
        run: The flow run, in its final state.
        task_runs: Its task runs, those that ended last first.
        past: Completed runs of the deployment.
        page_size: The most that `task_runs` may have.
        workers: Dask workers of flow runs.
    """
    state = run["state"]
    record = of_task_runs(task_runs)
    if (seen := workers.of(run["id"])) is not None:
        record.workers, record.events = seen.workers, seen.events
    known = f"the last {page_size} task runs" if len(task_runs) >= page_size else "its task runs"
    prices = settings().operator
    report = Run(
        id=run["id"],
        name=run["name"],
        deployment=name,
        state=state["name"],
        reason=reason(state["type"], state["message"], record),
        begun=_seconds(run["start_time"]),
        ended=_seconds(run["end_time"] or state["timestamp"]),
        record=record,
        past=[Past(each["id"], each["total_run_time"]) for each in past],
        links={
            **runbooks(deployment.get("description"), state["type"]),
            **deployed(deployment.get("version"), run.get("job_variables"), deployment.get("job_variables")),
        },
        prices=(prices.core_hour_price, prices.gib_hour_price),
        incomplete=f"the driver is gone, this is what the server knows of {known}{_of_workers(run, workers)}",
    )
    return {
        "key": key(name),
        "type": "markdown",
        "description": headline(report),
        "data": page(report),
        "flow_run_id": run["id"],
    }


def _of_workers(run: Json, workers: DaskWorkers) -> str:
    """Return what is known of a run's Dask workers, in words; empty for a run that has had none."""
    begun = _seconds(run["start_time"])
    late = begun and workers.since.timestamp() > begun
    if workers.of(run["id"]) is None:
        return "; its Dask workers, if it had any, are unknown: the operator began after the run" if late else ""
    return (
        ", and the operator of its Dask workers"
        + (f" since {workers.since:%H:%M:%S} UTC, when it began" if late else "")
        + ": it looks every ten seconds, does not know their memory, and counts no pod as lost that was gone in between"
    )


def of_task_runs(task_runs: Iterable[Json]) -> RunRecord:
    """Return the figures of a run from its task runs."""
    record = RunRecord()
    for each in task_runs:
        record.submit(1)
        state = each["state"] or {}
        kind = state.get("type", "")
        if kind in {"FAILED", "CRASHED", "COMPLETED", "CANCELLED"}:
            error = "" if kind == "COMPLETED" else plain(state["message"]) or state["name"]
            begun, seconds, tries = _seconds(each["start_time"]), each["total_run_time"], each["run_count"]
            record.end(Item(each["name"], begun, seconds, "task runs", max(tries, 1), error))
    return record


def _seconds(time: str | None) -> float:
    return datetime.fromisoformat(time).timestamp() if time else 0.0
