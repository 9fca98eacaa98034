"""Dask clusters: owners, caps, failed starts, deletion. Each test is a driver with the flow runs' account."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drive import drive

if TYPE_CHECKING:
    from installed import Platform

OPEN = """
import json, logging, time
import distributed
from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster
from tidepool.settings import settings
logging.basicConfig(level=logging.INFO)
size = settings().size("small")
"""

ONE = (
    OPEN
    + """
with KubernetesCluster(size) as cluster, distributed.Client(cluster, set_as_default=False) as client:
    client.wait_for_workers(2)
    value = client.submit(sum, [1, 2, 3]).result()
    time.sleep(SECONDS)
print(json.dumps({"name": cluster.name, "value": value, "steps": list(cluster.steps), "used": vars(cluster.used)}))
"""
)
SHORT, LONG = ONE.replace("SECONDS", "5"), ONE.replace("SECONDS", "600")


def nothing_left(installation: Platform, seconds: float = 60) -> None:
    installation.until(lambda: not installation.runs.dask(), "no Dask object is left", seconds)


def test_a_cluster_belongs_to_its_job_and_computes(installation: Platform) -> None:
    driver = drive(installation, SHORT)
    clusters = installation.until(lambda: installation.runs.get("daskclusters"), "a DaskCluster exists", 120)
    [owner] = clusters[0]["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Job", driver.name)
    groups = installation.until(lambda: installation.runs.get("daskworkergroups"), "its workers exist", 30)
    assert groups[0]["metadata"]["ownerReferences"][0]["uid"] == clusters[0]["metadata"]["uid"]

    result = driver.result()
    assert result["value"] == 6
    assert result["steps"][-1] == "verified", "image and libraries are compared before anything runs"
    assert len(result["used"]["workers"]) == 2
    assert result["used"]["memory_peak_gib"] > 0.05
    nothing_left(installation)


def test_clusters_that_are_closed_at_once_leave_nothing(installation: Platform) -> None:
    """The operator makes a worker group without an owner; a cluster that was deleted by then left it orphaned."""
    script = """
for wait in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2):
    cluster = KubernetesCluster(size)
    time.sleep(wait)
    cluster.close()
print(json.dumps({}))
"""
    drive(installation, OPEN + script).result()
    nothing_left(installation)


def test_more_than_the_caps_is_refused_before_anything_is_created(installation: Platform) -> None:
    driver = drive(installation, SHORT, TIDEPOOL_KUBERNETES_MAX_WORKERS="1")
    succeeded, log = driver.wait()
    assert not succeeded
    assert "2 workers requested for the Dask workers of one run, above TIDEPOOL_KUBERNETES_MAX_WORKERS=1" in log
    assert not installation.runs.dask()


def test_a_cluster_that_finds_no_node_says_so_and_leaves_nothing(installation: Platform) -> None:
    driver = drive(
        installation, SHORT, TIDEPOOL_SMALL_CPU="90", TIDEPOOL_KUBERNETES_MAX_CPU="1000",
        TIDEPOOL_KUBERNETES_START_TIMEOUT_SECONDS="20",
    )  # fmt: skip
    succeeded, log = driver.wait()
    assert not succeeded
    assert "did not start within 20 s; it waited for its first worker: worker not scheduled: " in log
    assert "Insufficient cpu" in log
    nothing_left(installation)


def test_without_an_operator_the_run_waits_says_so_fails_and_leaves_nothing(installation: Platform) -> None:
    namespace = installation.namespace
    namespace.kubectl("scale", "deployment/tidepool-operator", "--replicas=0")
    operator = "app.kubernetes.io/component=operator"
    try:
        namespace.until(lambda: not namespace.names("pods", operator), "the operator is gone", 90)
        succeeded, log = drive(installation, SHORT, TIDEPOOL_KUBERNETES_START_TIMEOUT_SECONDS="25").wait()
    finally:
        namespace.kubectl("scale", "deployment/tidepool-operator", "--replicas=1")
        namespace.kubectl("rollout", "status", "deployment/tidepool-operator", "--timeout=180s", timeout=200)
    assert not succeeded
    assert "waiting for its scheduler" in log, "a long wait is told while it lasts"
    assert f"is a Dask operator running that watches namespace {installation.runs.name}?" in log
    nothing_left(installation)


def test_a_cluster_goes_with_its_job(installation: Platform) -> None:
    driver = drive(installation, LONG)
    installation.until(lambda: "is ready" in driver.log(), "the cluster is ready", 180)
    installation.runs.kubectl("delete", "job", driver.name, "--cascade=foreground", "--timeout=90s")
    nothing_left(installation)


def test_a_shared_cluster_serves_the_next_run_and_goes_when_it_is_idle(installation: Platform) -> None:
    script = """
import os
def where():
    return os.uname().nodename
with KubernetesCluster(size, shared="warm") as cluster, distributed.Client(cluster, set_as_default=False) as client:
    pods = client.run(where)
print(json.dumps({"name": cluster.name, "pods": sorted(pods.values()), "steps": list(cluster.steps)}))
"""
    idle = {
        "TIDEPOOL_KUBERNETES_IDLE_TIMEOUT_SECONDS": "60",
        "TIDEPOOL_KUBERNETES_SHARED_KEY": "0123456789abcdef" * 2,
    }
    first = drive(installation, OPEN + script, **idle).result()
    second = drive(installation, OPEN + script, **idle).result()
    assert first["name"] == second["name"]
    assert set(first["pods"]) <= set(second["pods"])
    assert second["steps"][0] == "joined"

    # The same name with another size is another thing.
    succeeded, log = drive(installation, OPEN + script, TIDEPOOL_SMALL_WORKERS="1", **idle).wait()
    assert not succeeded
    assert "shared Dask cluster 'warm' has another size than this run" in log
    nothing_left(installation, 150)


def test_an_adaptive_cluster_grows_and_never_stops_a_busy_worker(installation: Platform) -> None:
    script = """
def work(seconds):
    distributed.get_worker().log_event("ran", seconds)
    if seconds == LONG:
        distributed.Event("shrunk").wait(240)
    else:
        time.sleep(seconds)
    return seconds
# Many short tasks, and one that lasts until the cluster has shrunk around it.
LONG = 1000
with KubernetesCluster(size) as cluster, distributed.Client(cluster, set_as_default=False) as client:
    def workers():
        return len(client.scheduler_info(n_workers=-1)["workers"])
    def until(condition):
        deadline = time.monotonic() + 180
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.5)
        return workers()
    # Short ones are sent until the cluster has grown, however long the pods take.
    seconds = [LONG] + [3.0 + n / 100 for n in range(12)]
    futures = client.map(work, seconds)
    def grown():
        if sum(not future.done() for future in futures) < 7:
            seconds.extend(more := [3.0 + len(seconds) / 100 + n / 100 for n in range(6)])
            futures.extend(client.map(work, more))
        return workers() == 3
    most = until(grown)
    least = until(lambda: workers() < most)
    distributed.Event("shrunk", client=client).set()
    results = client.gather(futures)
    ran = [value for _, value in client.get_events("ran")]
result = {"most": most, "least": least, "sent": sorted(seconds), "ran": sorted(ran), "results": sorted(results)}
print(json.dumps(result))
"""
    result = drive(
        installation, OPEN + script, TIDEPOOL_SMALL_WORKERS="3", TIDEPOOL_KUBERNETES_ADAPTIVE_MINIMUM="1"
    ).result(500)
    assert result["most"] == 3
    assert result["least"] < 3, "it did not shrink, so this showed nothing"
    assert result["ran"] == result["results"] == result["sent"], "a task ran twice: its worker was closed while busy"
    nothing_left(installation)
