"""Start and end of a Dask cluster on Kubernetes, with a real scheduler and worker, and a stand-in for the API."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import dask.config
import distributed
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tidepool import settings as settings_module
from tidepool.compute.clusters.kubernetes import cluster as kubernetes_module
from tidepool.compute.clusters.kubernetes import manifest, usage
from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster
from tidepool.compute.clusters.kubernetes.driver import Run
from tidepool.errors import ClusterError
from tidepool.settings import SizeSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import KubernetesServer

# An address of this machine's own, as a pod has one: the ports are fixed.
ADDRESS = "127.86.0.1"
IMAGE = "registry.example.com/tidepool@sha256:" + "a" * 64
SIZE = SizeSettings(workers=1)
CRASHES = {
    "name": "scheduler",
    "restartCount": 3,
    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    "lastState": {"terminated": {"reason": "Error", "exitCode": 1, "message": "ImportError: x"}},
}


def pod(component: str, ip: str = "", **status: object) -> dict[str, Any]:
    return {
        "metadata": {"name": f"c-{component}", "labels": {"dask.org/component": component}},
        "spec": {"nodeName": "n", "containers": [{"name": component, "image": IMAGE}]},
        "status": {"podIP": ip, **status},
    }


@pytest.fixture
def objects(kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the API holds: DaskClusters by name, and `pods`."""
    held: dict[str, Any] = {"pods": []}

    def answer(request: str) -> tuple[int, Any]:
        method, path, body = (request + "  ").split(" ", 2)
        kind, _, name = re.sub(r"^.*/namespaces/ns/|\?.*$", "", path).partition("/")
        match method, kind:
            case "POST", "daskclusters":
                created = json.loads(body)
                created["metadata"]["uid"] = "uid"
                return (
                    (409, {"message": "exists"})
                    if created["metadata"]["name"] in held
                    else (
                        201,
                        held.setdefault(created["metadata"]["name"], created),
                    )
                )
            case "POST", _:
                return 201, json.loads(body)
            case "GET", "daskclusters":
                return (200, held[name]) if name in held else (404, {"message": "not found"})
            case "GET", "pods":
                return 200, "a line" if name else {"items": held["pods"]}
            case "GET", "events":
                return 200, {"items": []}
            case _:
                held.pop(name, None)
                return 200, {}

    kubernetes.answers = answer
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_IMAGE", IMAGE)
    settings_module.settings.cache_clear()
    yield held
    settings_module.settings.cache_clear()


@pytest.fixture
def dask_pods(objects: dict[str, Any]) -> Iterator[None]:
    """A scheduler and a worker as the cluster's pods run them."""
    ready, over = threading.Event(), threading.Event()

    async def run() -> None:
        with dask.config.set({"distributed.scheduler.http.routes": list(manifest.HTTP_ROUTES)}):
            preload = "tidepool.compute.clusters.preload."
            async with (
                distributed.Scheduler(
                    host=ADDRESS, port=8786, dashboard=False, dashboard_address=f"{ADDRESS}:0",
                    preload=[f"{preload}scheduler"],
                ) as scheduler,
                distributed.Worker(scheduler.address, nthreads=1, dashboard=False, preload=[f"{preload}worker"]),
            ):  # fmt: skip
                ready.set()
                await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(60)
    objects["pods"] = [pod("scheduler", ADDRESS), pod("worker", "10.0.0.1")]
    yield
    over.set()
    thread.join()


def requests(kubernetes: KubernetesServer, *methods: str) -> list[str]:
    paths = [each.split(" ")[:2] for each in kubernetes.requests]
    return [f"{method} {path.rpartition('/namespaces/ns/')[2]}" for method, path in paths if method in methods]


@pytest.mark.usefixtures("dask_pods")
def test_a_cluster_starts_computes_and_is_deleted(kubernetes: KubernetesServer, objects: dict[str, Any]) -> None:
    with KubernetesCluster(SIZE) as cluster:
        assert [name for name in objects if name != "pods"] == [cluster.name]
        with distributed.Client(cluster, set_as_default=False) as client:
            assert client.submit(sum, [1, 2]).result(30) == 3
    assert list(cluster.steps) == [
        "created",
        "scheduler has an address",
        "scheduler answers",
        "first worker",
        "verified",
    ]
    assert cluster.used is not None
    assert len(cluster.used.workers) == 1
    assert [path for path in requests(kubernetes, "GET") if "/log" in path] == [
        "GET pods/c-scheduler/log?tailLines=60",
        "GET pods/c-worker/log?tailLines=60",
    ]
    assert requests(kubernetes, "POST", "DELETE") == [
        "POST daskclusters",
        "POST daskworkergroups",
        f"DELETE daskclusters/{cluster.name}?propagationPolicy=Background",
    ]
    assert list(objects) == ["pods"]


@pytest.mark.filterwarnings("ignore:Scheduler already contains a plugin with name worker-status")
@pytest.mark.usefixtures("dask_pods")
def test_a_shared_cluster_is_joined_and_outlives_the_run(kubernetes: KubernetesServer) -> None:
    with KubernetesCluster(SIZE, "warm") as first, KubernetesCluster(SIZE, "warm") as second:
        assert first.name == second.name
        assert (next(iter(first.steps)), next(iter(second.steps))) == ("created", "joined")
    assert requests(kubernetes, "DELETE") == []
    with (
        pytest.raises(ClusterError, match=r"shared Dask cluster 'warm' has another size than this run \(1 x 1 threads"),
        KubernetesCluster(SizeSettings(workers=2), "warm"),
    ):
        pass


@pytest.mark.usefixtures("dask_pods")
def test_a_shared_cluster_waits_for_the_deletion_of_its_predecessor(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 15 s of it the run failed, with an exception without a text."""
    monkeypatch.setattr(kubernetes_module, "_LOG_SECONDS", 0.1)
    name = manifest.shared_name("warm", IMAGE)
    objects[name] = {"metadata": {"name": name, "deletionTimestamp": "2026-11-26T00:00:00Z"}}
    cluster = KubernetesCluster(SIZE, "warm")
    end = time.monotonic() + 30
    while requests(kubernetes, "POST").count("POST daskclusters") < 5:
        assert time.monotonic() < end
        time.sleep(0.01)
    del objects[name]
    with cluster:
        assert next(iter(cluster.steps)) == "created"


@pytest.mark.usefixtures("dask_pods")
def test_a_lost_worker_has_the_reason_that_kubernetes_reports(
    objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_module, "_EXIT_SECONDS", 0.1)
    killed = {"restartCount": 1, "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    with KubernetesCluster(SIZE) as cluster:
        assert cluster.worker_exit("tcp://10.0.0.1:8788") is None, "not reported yet"
        objects["pods"][1]["status"]["containerStatuses"] = [killed]
        assert cluster.worker_exit("tcp://10.0.0.1:8788") == "OOMKilled (137)"
        removed = cluster.worker_exit("tcp://10.0.0.2:8788")
        assert removed == "its pod was removed (deleted, evicted, or its node is gone)"


@pytest.mark.parametrize(
    ("pods", "seconds", "message"),
    [
        (
            [pod("scheduler", containerStatuses=[CRASHES])],
            600,
            r"cannot start: scheduler terminated: Error \(1\), last",
        ),
        ([], 2, r"did not start within 2 s; it waited for its scheduler: no pod yet; is the Dask operator running"),
    ],
)
def test_a_cluster_that_does_not_start_is_deleted(
    pods: list[dict[str, Any]],
    seconds: float,
    message: str,
    kubernetes: KubernetesServer,
    objects: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_START_TIMEOUT_SECONDS", str(seconds))
    settings_module.settings.cache_clear()
    objects["pods"] = pods
    with pytest.raises(ClusterError, match=message), KubernetesCluster(SIZE):
        pass
    assert len(requests(kubernetes, "DELETE")) == 1
    assert [name for name in objects if name != "pods"] == []


def test_a_cluster_that_is_closed_while_it_starts_is_deleted(
    kubernetes: KubernetesServer, objects: dict[str, Any]
) -> None:
    cluster = KubernetesCluster(SIZE)
    end = time.monotonic() + 30
    while len(objects) == 1:
        assert time.monotonic() < end
        time.sleep(0.001)
    cluster.close()
    assert requests(kubernetes, "DELETE") == [f"DELETE daskclusters/{cluster.name}?propagationPolicy=Background"]


@pytest.mark.usefixtures("prefect_server", "dask_pods")
def test_a_runs_cluster_has_its_name_and_a_page() -> None:
    @flow(name="Noted run")
    def noted() -> str:
        with KubernetesCluster(SIZE) as cluster:
            return cluster.name

    ended: Any = noted(return_state=True)
    run = ended.state_details.flow_run_id
    assert re.fullmatch(rf"noted-run-{str(run)[:8]}-1-[0-9a-f]{{4}}", ended.result())
    key = ArtifactFilter(key=ArtifactFilterKey(any_=["noted-run-dask-cluster"]))
    with get_client(sync_client=True) as client:
        pages = [each for each in client.read_artifacts(artifact_filter=key) if each.flow_run_id == run]
    [page] = [each for each in pages if "core-seconds requested" in str(each.data)]
    assert "a line" in str(page.data)
    assert "1 workers" in str(page.description)


def test_a_page_that_cannot_be_written_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(usage, "_PUBLISH_SECONDS", 0)
    run = Run("0d9e1c1e-86a4-4a0f-9d47-6a8a5d1a0b11", "noted")
    asyncio.run(usage.publish(run, "the page", "about it", logging.getLogger(__name__)))
    assert "the page noted-dask-cluster was not published: TimeoutError" in caplog.text
