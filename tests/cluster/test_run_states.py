"""States of flow runs whose drivers die, do not start or are cancelled: what the server says, and what is left."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from installed import Platform

# The promise: a state and its reason are on the server 30 s after Kubernetes knows them.
TOLD_SECONDS = 30
# The promise for a cancelled run: no Job a minute later.
GONE_SECONDS = 60
# A busy two-core machine starts a Python in seconds.
START_SECONDS = 180
# A driver that begins its run, as the engine does, and then does what the test wants.
BEGIN = """
import asyncio, os, signal, time, uuid
from prefect import get_client
from prefect.states import Running
from prefect.utilities.engine import propose_state
async def begin():
    async with get_client() as client:
        # It waits for the time of a retry.
        await propose_state(client, Running(), flow_run_id=uuid.UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
asyncio.run(begin())
"""
SLEEP = f"{BEGIN}time.sleep(3600)"
# In steps, so that a page is used before the next is asked for.
EAT = f"{BEGIN}eaten = []\nwhile True: eaten.append(b'x' * 10_000_000)"
DEAF = f"{BEGIN}signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
MISSING = "@sha256:" + "0" * 64


def start(platform: Platform, script: str = SLEEP, *, due: datetime | None = None, **job_variables: Any) -> str:
    """Start a run whose driver executes a script; return its id."""
    flow = platform.post("flows/", {"name": "states"})["id"]
    command = f"python -c '{script.replace(chr(39), chr(34))}'"
    body = {
        "name": f"states-{uuid4().hex[:6]}", "flow_id": flow, "work_pool_name": platform.pool,
        "job_variables": {"command": command, "termination_grace_period_seconds": 10, **job_variables},
    }  # fmt: skip
    deployment = platform.post("deployments/", body)["id"]
    when = (due or datetime.now(UTC)).isoformat()
    state = {"type": "SCHEDULED", "name": "Scheduled", "state_details": {"scheduled_time": when}}
    return str(platform.post(f"deployments/{deployment}/create_flow_run", {"state": state})["id"])


def jobs(platform: Platform, run: str) -> list[dict[str, Any]]:
    return platform.runs.get("jobs", f"prefect.io/flow-run-id={run}")


def pod_of(platform: Platform, run: str) -> str:
    [pod] = platform.runs.get("pods", f"prefect.io/flow-run-id={run}")
    return str(pod["metadata"]["name"])


def running(platform: Platform, script: str = SLEEP, **job_variables: Any) -> str:
    run = start(platform, script, **job_variables)
    platform.until(lambda: platform.state(run) == "RUNNING", f"{run} is Running", START_SECONDS)
    return run


def told(platform: Platform, run: str, message: str, seconds: float, state: str = "") -> None:
    """Wait until the message of a run's state has a text."""
    began = time.monotonic()

    def matches() -> bool:
        found = platform.run(run)["state"]
        return message in (found["message"] or "") and (not state or found["type"] == state)

    platform.until(matches, f"{run} says {message!r}", seconds)
    found = platform.run(run)["state"]
    sys.__stderr__.write(f"{found['name']} after {time.monotonic() - began:.1f} s: {found['message']}\n")


@contextmanager
def without_prefect_worker(platform: Platform) -> Iterator[None]:
    name = f"deployment/tidepool-worker{platform.team}"
    platform.namespace.kubectl("scale", name, "--replicas=0")
    component = "app.kubernetes.io/component=worker"
    platform.until(lambda: not platform.namespace.get("pods", component), "the Prefect worker is gone", 90)
    try:
        yield
    finally:
        platform.namespace.kubectl("scale", name, "--replicas=1")
        platform.namespace.kubectl("rollout", "status", name, "--timeout=180s", timeout=200)


# --- the driver is gone -----------------------------------------------------------------------------------------------


def test_a_driver_out_of_memory(installation: Platform) -> None:
    run = running(installation, EAT, memory_request="200Mi", memory_limit="300Mi")
    told(installation, run, "driver out of memory (limit 300Mi); raise memory_limit", 60, "CRASHED")
    states = installation.read(f"flow_run_states/?flow_run_id={run}")
    assert [each["type"] for each in states].count("CRASHED") == 1, "on-call is notified once"


def test_a_driver_pod_that_is_deleted_while_the_prefect_worker_is_away(installation: Platform) -> None:
    run = running(installation)
    with without_prefect_worker(installation):
        installation.runs.kubectl("delete", "pod", pod_of(installation, run), "--force", "--grace-period=0")
        told(installation, run, "driver pod deleted", TOLD_SECONDS, "CRASHED")


def test_a_job_that_is_deleted(installation: Platform) -> None:
    run = running(installation)
    [job] = jobs(installation, run)
    installation.runs.kubectl("delete", "job", job["metadata"]["name"], "--wait=false")
    told(installation, run, "its Job was deleted", TOLD_SECONDS + 10, "CRASHED")


def test_a_crashed_run_is_executed_again_as_the_same_run(installation: Platform) -> None:
    run = running(installation, on_crash="retry 1")
    for _ in range(2):
        installation.until(lambda: installation.state(run) == "RUNNING", f"{run} is Running", START_SECONDS)
        pods = installation.runs.get("pods", f"prefect.io/flow-run-id={run}")
        alive = [each["metadata"]["name"] for each in pods if each["status"]["phase"] == "Running"]
        installation.runs.kubectl("delete", "pod", *alive, "--force", "--grace-period=0")
        installation.until(lambda: installation.state(run) != "RUNNING", f"{run} is not Running", TOLD_SECONDS)
    told(installation, run, "driver pod deleted", TOLD_SECONDS, "CRASHED")
    assert installation.run(run)["run_count"] == 2
    states = [each["name"] for each in installation.read(f"flow_run_states/?flow_run_id={run}")]
    assert states.count("AwaitingRetry") == 1
    assert states.count("Crashed") == 2


# --- it does not start ------------------------------------------------------------------------------------------------


def test_an_image_that_does_not_exist(installation: Platform) -> None:
    image = installation.image.partition("@")[0] + MISSING
    run = start(installation, image=image, start_timeout_seconds=45)
    told(installation, run, f"image {image} cannot be pulled: not found", TOLD_SECONDS, "PENDING")
    told(installation, run, f"did not start within 45 s: image {image} cannot be pulled: not found", 60, "CRASHED")
    installation.until(lambda: not jobs(installation, run), "its Job is gone", 10)


def test_a_driver_that_no_node_has_room_for(installation: Platform) -> None:
    run = start(installation, cpu_request="7")
    told(installation, run, "no node has 7 CPU free (asked: 7; largest node: 2)", TOLD_SECONDS, "PENDING")
    cancel(installation, run)
    gone(installation, run)


def test_a_quota_that_is_used_up(installation: Platform) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none-left"},
        "spec": {"hard": {"pods": "0"}},
    }
    installation.runs.apply(quota)
    try:
        run = start(installation)
        told(installation, run, "quota none-left: pods ", TOLD_SECONDS, "PENDING")
        cancel(installation, run)
        gone(installation, run)
    finally:
        installation.runs.kubectl("delete", "resourcequota", "none-left")


# --- cancelling -------------------------------------------------------------------------------------------------------


def cancel(platform: Platform, run: str) -> None:
    """Cancel a run as the UI does."""
    platform.post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


def gone(platform: Platform, run: str) -> None:
    began = time.monotonic()
    platform.until(lambda: not jobs(platform, run), f"{run} has no Job", GONE_SECONDS)
    platform.until(lambda: platform.state(run) == "CANCELLED", f"{run} is Cancelled", TOLD_SECONDS)
    sys.__stderr__.write(f"Cancelled without a Job after {time.monotonic() - began:.1f} s\n")


def test_a_scheduled_run_is_cancelled(installation: Platform) -> None:
    run = start(installation, due=datetime.now(UTC) + timedelta(hours=1))
    cancel(installation, run)
    assert installation.state(run) == "CANCELLED"


@pytest.mark.parametrize("worker", [True, False], ids=["at once", "while the Prefect worker is away"])
def test_a_run_whose_pod_cannot_start_is_cancelled(installation: Platform, *, worker: bool) -> None:
    run = start(installation, image=installation.image.partition("@")[0] + MISSING)
    told(installation, run, "cannot be pulled", TOLD_SECONDS, "PENDING")
    if worker:
        cancel(installation, run)
        gone(installation, run)
        return
    with without_prefect_worker(installation):
        cancel(installation, run)
        gone(installation, run)


def test_a_driver_that_does_not_react_is_cancelled(installation: Platform) -> None:
    """No supervisor listens in it, and it ignores SIGTERM."""
    run = running(installation, DEAF)
    cancel(installation, run)
    gone(installation, run)
    installation.until(
        lambda: not installation.runs.get("pods", f"prefect.io/flow-run-id={run}"), "its pod is gone", GONE_SECONDS
    )
