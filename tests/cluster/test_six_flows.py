"""All six flows complete through the Kubernetes pool, each with its own Dask cluster, and leave nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from installed import Platform

# Absolute: a Dask worker reads it too, from its own copy of the image.
TAXI = "/app/samples/nyc_taxi_2019-03_sample.csv"
FLOWS: dict[str, dict[str, Any]] = {
    "csv-etl/csv-etl": {},
    "image-etl/image-etl": {},
    "most-generous-riders/most-generous-riders": {"source": TAXI, "nrows": 200},
    "taxi-tip-amounts/taxi-tip-amounts": {"source": TAXI},
    "ticket-model-evaluation/ticket-model-evaluation": {"resamples": 20},
    "weekly-forecast/weekly-forecast": {"windows": 2},
}
# These map or use a Dask dataframe, whatever the size of their data.
WITH_CLUSTER = {"image-etl", "most-generous-riders", "taxi-tip-amounts", "weekly-forecast"}


@pytest.fixture(scope="module")
def runs(platform: Platform) -> dict[str, str]:
    """A run of each, all at once."""
    return {name: platform.start(name, **parameters) for name, parameters in FLOWS.items()}


@pytest.fixture(scope="module")
def middle(platform: Platform, runs: dict[str, str]) -> list[dict[str, Any]]:
    """All pods at a moment in which a driver, a scheduler and a worker run."""

    def look() -> list[dict[str, Any]]:
        pods = platform.runs.get("pods")
        running = {
            each["metadata"]["labels"].get("dask.org/component")
            or each["metadata"]["labels"].get("app.kubernetes.io/component")
            for each in pods
            if each["status"]["phase"] == "Running"
        }
        return pods if {"flow-run", "scheduler", "worker"} <= running else []

    assert runs
    pods: list[dict[str, Any]] = platform.until(look, "a driver, a scheduler and a worker run", 300)
    sys.__stderr__.write(platform.runs.kubectl("get", "jobs,daskclusters,pods", "--output=wide"))
    return pods


def test_the_middle_of_a_run(platform: Platform, middle: list[dict[str, Any]]) -> None:
    """Dask pods run the driver's image, belong to the run, and Prefect does not take them for flow runs."""
    assert platform
    drivers = [pod for pod in middle if "prefect.io/flow-run-id" in pod["metadata"]["labels"]]
    # A node that has an image by several digests reports any of them.
    images = {each["imageID"] for pod in drivers for each in pod["status"].get("containerStatuses", [])} - {""}
    assert images
    assert all("@sha256:" in image for image in images)
    dask = [pod for pod in middle if "dask.org/component" in pod["metadata"]["labels"]]
    assert {pod["spec"]["containers"][0]["image"] for pod in dask} <= images, "by digest, also when the driver is not"
    for pod in dask:
        assert "prefect.io/flow-run-id" not in pod["metadata"]["labels"]
        assert pod["metadata"]["labels"]["tidepool.dev/flow-run-id"]
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        literal = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        assert literal.get("PREFECT_API_AUTH_STRING") is None, "the password stands in a manifest"


def test_the_registered_image_is_a_digest(platform: Platform) -> None:
    ours = {"deployments": {"tags": {"all_": ["managed-by:tidepool"]}}}
    for deployment in platform.post("deployments/filter", ours):
        assert "@sha256:" in deployment["job_variables"]["image"]


@pytest.mark.parametrize("name", FLOWS)
def test_completes(platform: Platform, runs: dict[str, str], middle: list[dict[str, Any]], name: str) -> None:
    assert middle
    run = platform.wait(runs[name])
    assert run["state_type"] == "COMPLETED", (
        f"{run['state']}\n{platform.logs(runs[name])}\n{platform.namespace.report()}"
    )


@pytest.mark.parametrize("flow", sorted(WITH_CLUSTER))
def test_the_run_tells_what_its_cluster_used(platform: Platform, runs: dict[str, str], flow: str) -> None:
    run_id = runs[f"{flow}/{flow}"]
    platform.wait(run_id)

    def last_page() -> dict[str, Any] | None:
        """The one of the end: a flow is Completed before its cluster is closed."""
        page: dict[str, Any] = platform.artifacts(run_id)[f"{flow}-dask-cluster"]
        return page if "core-seconds" in page["description"] else None

    page = platform.until(last_page, "the run's page has figures", 60)
    for expected in ("8787", "peak memory", "distributed", "idle share"):
        assert expected in page["data"], page["data"]


def test_every_task_run_is_final(platform: Platform, runs: dict[str, str]) -> None:
    for run_id in runs.values():
        platform.wait(run_id)
    query = {"task_runs": {"flow_run_id": {"any_": list(runs.values())}}, "limit": 200}

    def all_completed() -> bool:
        """The server records task runs behind the flow runs they belong to."""
        found = platform.post("task_runs/filter", query)
        return bool(found) and {each["state_type"] for each in found} == {"COMPLETED"}

    platform.until(all_completed, "every task run is Completed on the server", 60)


def test_nothing_is_left(platform: Platform, runs: dict[str, str]) -> None:
    for run_id in runs.values():
        platform.wait(run_id)
    platform.until(lambda: not platform.runs.dask(), "no Dask object is left", 60)
    # Finished Jobs stay for their logs, as long as the pool says.
    platform.until(
        lambda: all(pod["status"]["phase"] != "Running" for pod in platform.runs.get("pods", "job-name")),
        "no driver runs",
        60,
    )
    sys.__stderr__.write(platform.runs.kubectl("get", "jobs,daskclusters,pods"))


def test_no_call_of_theirs_was_refused(platform: Platform, runs: dict[str, str]) -> None:
    for run in runs.values():
        platform.wait(run)
    began = min(platform.run(run)["start_time"] for run in runs.values())
    log = platform.namespace.kubectl(
        "logs", "deployment/tidepool-server", "--container=flow-run-api", f"--since-time={began}"
    )
    assert [line for line in log.splitlines() if "flow-run-api team=" in line] == []
