"""The report that the operator writes for a driver that is gone, from answers of the server. Without one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tidepool.operate.sweep import reports
from tidepool.operate.sweep.dask_workers import DaskWorkers

RUN = {
    "id": "750895ca-0000-4000-8000-000000000000",
    "name": "scoring",
    "state": {
        "type": "CRASHED",
        "name": "Crashed",
        "message": "its Job was deleted",
        "timestamp": "2026-11-27T12:00:00+00:00",
    },
    "start_time": "2026-11-27T11:58:00+00:00",
    "end_time": "2026-11-27T12:00:00+00:00",
}
# The operator has been there since before the run.
NO_WORKERS = DaskWorkers(datetime(2026, 11, 27, 11, tzinfo=UTC))
DEPLOYMENT = {"name": "nightly-scoring", "description": "[docs/runbooks/nightly-scoring.md](https://h/x.md)"}


def task_run(name: str, kind: str, message: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "state": {"type": kind, "name": kind.capitalize(), "message": message},
        "start_time": "2026-11-27T11:58:30+00:00",
        "total_run_time": 3.5,
        "run_count": 2,
    }


def test_it_has_what_the_server_knows_and_says_that_it_is_incomplete() -> None:
    task_runs = [
        task_run("a", "COMPLETED"),
        task_run("b", "FAILED", "Task run encountered an exception ValueError: bad"),
        task_run("c", "RUNNING"),
    ]
    past = [{"id": "1", "total_run_time": 60.0}]
    found = reports.artifact("nightly-scoring", DEPLOYMENT, RUN, task_runs, past, 200, NO_WORKERS)
    assert (found["key"], found["flow_run_id"]) == ("nightly-scoring-run", RUN["id"])
    text = found["data"]
    assert text.startswith("# Crashed: its Job was deleted\n")
    assert "[Runbook](https://h/x.md)" in text
    assert "Figures are incomplete: the driver is gone, this is what the server knows of its task runs." in text
    assert "| duration | 2 min 0 s | 1 min 0 s |" in text
    assert "1 done, 1 failed, 1 not ended, 2 retried." in text
    assert "| b | 2 | ValueError: bad |" in text


def test_it_names_version_and_image_that_the_run_had() -> None:
    deployment = {**DEPLOYMENT, "version": "1a2b3c", "job_variables": {"image": "registry/flows@sha256:1"}}
    text = reports.artifact("d", deployment, RUN, [], [], 200, NO_WORKERS)["data"]
    assert "Version: `1a2b3c` · Image: `registry/flows@sha256:1`" in text
    own = {**RUN, "job_variables": {"image": "registry/flows@sha256:2"}}
    text = reports.artifact("d", deployment, own, [], [], 200, NO_WORKERS)["data"]
    assert "Image: `registry/flows@sha256:2`" in text


def test_a_full_page_of_task_runs_is_a_part_of_them() -> None:
    found = reports.artifact("x", {}, RUN, [task_run("a", "COMPLETED")] * 2, [], 2, NO_WORKERS)
    assert "of the last 2 task runs" in found["data"]


def test_a_run_that_never_began_has_a_report() -> None:
    found = reports.artifact("x", {}, {**RUN, "start_time": None}, [], [], 200, NO_WORKERS)
    assert found["description"] == "Crashed: its Job was deleted"
    assert "Its flow did not begin." in found["data"]
    assert "| duration |" not in found["data"]
    assert "incomplete" not in found["data"]
