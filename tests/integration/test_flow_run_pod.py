"""What a flow run's pod leaves behind when the process of its flow dies: no Dask cluster, and an exit code."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from prefect.client.orchestration import get_client

from tests.integration.flow_run_process import Pod
from tests.polling import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import KubernetesServer

CLUSTERS = "/apis/kubernetes.dask.org/v1/namespaces/ns/daskclusters"


def cluster(name: str, driver: str, **metadata: str) -> dict[str, Any]:
    annotations = {"tidepool.dev/driver": driver} if driver else {}
    return {"metadata": {"name": name, "namespace": "ns", "annotations": annotations, **metadata}, "spec": {}}


LISTED = [
    cluster("own", "driver"),
    cluster("own-2", "driver"),
    cluster("going", "driver", deletionTimestamp="2026-01-01T00:00:00Z"),
    cluster("of-another-attempt", "driver-2"),
    cluster("of-a-laptop", ""),
]


@pytest.fixture
def pod(tmp_path: Path, prefect_server: str, kubernetes: KubernetesServer) -> Pod:
    kubernetes.answers = lambda request: (200, {"items": LISTED} if request.startswith("GET") else {})
    return Pod(
        tmp_path, prefect_server, TIDEPOOL_KUBERNETES_POD_NAME="driver", TIDEPOOL_KUBERNETES_NAMESPACE="ns"
    )  # fmt: skip


def deleted(kubernetes: KubernetesServer) -> list[str]:
    return [each.split()[1].rpartition("/")[2] for each in kubernetes.requests if each.startswith("DELETE")]


def logged(run_id: str, text: str) -> list[str]:
    query = {"logs": {"flow_run_id": {"any_": [run_id]}}}
    with get_client(sync_client=True) as client:
        lines = client.request("POST", "/logs/filter", json=query).json()
    return [line["message"] for line in lines if text in line["message"]]


def test_the_clusters_of_a_killed_run_are_deleted_and_no_other(pod: Pod, kubernetes: KubernetesServer) -> None:
    executed = pod.execute("is_killed")
    run_id = str(executed.flow_run.id)
    assert (executed.flow_run.state_name, executed.code) == ("Crashed", 137)
    asked = [each for each in kubernetes.requests if each.startswith("GET")]
    assert asked == [f"GET {CLUSTERS}?limit=100&labelSelector=tidepool.dev%2Fflow-run-id%3D{run_id}"]
    assert deleted(kubernetes) == ["own", "own-2"]
    until(lambda: logged(run_id, "Dask cluster own deleted: the process of its flow run ended without closing it"))
    until(lambda: logged(run_id, f"Crashed: {executed.flow_run.state.message}"))


@pytest.mark.parametrize("name", ["completes", "fails"])
def test_a_run_that_ends_by_itself_asks_kubernetes_nothing(pod: Pod, kubernetes: KubernetesServer, name: str) -> None:
    pod.execute(name)
    assert kubernetes.requests == []


def test_an_api_that_answers_late_is_asked_again(pod: Pod, kubernetes: KubernetesServer) -> None:
    answers = [(503, {}), (kubernetes.DISCONNECT, {}), (200, {"items": LISTED[:1]}), (404, {"message": "not found"})]
    kubernetes.answers = answers
    assert pod.execute("is_killed").code == 137
    assert deleted(kubernetes) == ["own"], "deleted by another one meanwhile"
    assert answers == []


def test_a_refusal_is_logged_and_the_run_is_crashed_all_the_same(pod: Pod, kubernetes: KubernetesServer) -> None:
    kubernetes.answers = lambda _: (403, {"kind": "Status", "message": "may not list daskclusters"})
    executed = pod.execute("is_killed")
    assert (executed.flow_run.state_name, executed.code) == ("Crashed", 137)
    words = "not deleted (may not list daskclusters); the operator deletes them, or Kubernetes with the Job"
    until(lambda: logged(str(executed.flow_run.id), words))


@pytest.mark.parametrize("hears", [True, False])
def test_a_pod_that_is_told_to_end_says_so_and_its_clusters_go(
    pod: Pod, kubernetes: KubernetesServer, *, hears: bool
) -> None:
    """A stopped process cannot acknowledge that the pod is told to end: it is killed."""
    flow_run = pod.create("waits")
    process = pod.start(flow_run, PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR="relinquish")
    until(pod.hook.exists, seconds=120)
    [engine] = psutil.Process(process.pid).children()
    if not hears:
        engine.suspend()
    os.kill(process.pid, signal.SIGTERM)
    executed = pod.end(flow_run, process)
    assert executed.code == 143, executed.output
    assert deleted(kubernetes) == ["own", "own-2"]
