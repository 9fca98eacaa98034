"""TLS inside a Dask cluster: who has not its key is refused, the key stays in its Secret, the Secret goes with it."""

from __future__ import annotations

import base64
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from drive import drive
from test_dask_clusters import LONG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drive import Driver
    from installed import Platform

# A driver of another run, with all that it may have: the network path of drivers, and their account.
STRANGER = """
import asyncio, json, socket, ssl, time
import distributed
from distributed.comm import connect
from tidepool.compute.clusters.kubernetes import certificate
from tidepool.compute.clusters.kubernetes.api import KubernetesApi
from tidepool.errors import ClusterError

def opens(host, port):
    try:
        socket.create_connection((host, port), timeout=3).close()
        return "open"
    except OSError as error:
        return repr(error)

def without_verification(context):
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return {"ssl_context": context}

async def answer(protocol, host, port, **connection):
    try:
        comm = await connect(f"{protocol}://{host}:{port}", timeout=5, **connection)
    except Exception as error:
        return repr(error)
    return f"connected to {comm.peer_address}"

async def read(api, url):
    try:
        return await api._request("GET", url)
    except ClusterError as error:
        return str(error)

async def main():
    # The node knows a new pod's address some seconds after the pod has begun.
    deadline = time.monotonic() + 60
    while opens(SCHEDULER, 8786) != "open" and time.monotonic() < deadline:
        time.sleep(1)
    api = KubernetesApi(NAMESPACE)
    await api.connect(30)
    other = certificate.own().security().get_connection_args("client")["ssl_context"]
    print(json.dumps({
        "scheduler's port": opens(SCHEDULER, 8786),
        "scheduler's HTTP": opens(SCHEDULER, 8787),
        "worker's port": opens(WORKER, 8788),
        "tls without a key": await answer("tls", SCHEDULER, 8786, **without_verification(ssl.create_default_context())),
        "tls with another key": await answer("tls", SCHEDULER, 8786, **without_verification(other)),
        "tcp": await answer("tcp", SCHEDULER, 8786),
        "get the Secret": await read(api, "secrets/" + SECRET),
        "list Secrets": await read(api, "secrets"),
    }))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def run(installation: Platform) -> Iterator[Driver]:
    """A run with a cluster that computes."""
    driver = drive(installation, LONG)
    installation.until(lambda: "is ready" in driver.log(), "the cluster is ready", 180)
    yield driver
    installation.runs.kubectl("delete", "job", driver.name, "--ignore-not-found", "--cascade=foreground")


@pytest.fixture(scope="module")
def cluster(installation: Platform, run: Driver) -> dict[str, Any]:
    """Its DaskCluster."""
    found = installation.runs.get("daskclusters")
    [mine] = [each for each in found if each["metadata"]["ownerReferences"][0]["name"] == run.name]
    return mine


def test_the_key_of_a_cluster_is_in_its_own_secret_only(installation: Platform, cluster: dict[str, Any]) -> None:
    name = cluster["metadata"]["name"]
    [secret] = [each for each in installation.runs.get("secrets") if each["metadata"]["name"] == f"{name}-dask-tls"]
    [owner] = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("DaskCluster", cluster["metadata"]["uid"])
    assert (secret["type"], secret["immutable"]) == ("kubernetes.io/tls", True)
    mounts = {
        volume["secret"]["secretName"]
        for pod in installation.runs.get("pods", f"dask.org/cluster-name={name}")
        for volume in pod["spec"]["volumes"]
        if "secret" in volume
    }
    assert mounts == {f"{name}-dask-tls"}
    key = base64.b64decode(secret["data"]["tls.key"]).decode().splitlines()[1]
    objects = str(installation.runs.get("all,daskclusters,daskworkergroups,configmaps,events"))
    assert secret["data"]["tls.key"] not in objects
    assert key not in objects


def test_another_run_reaches_a_scheduler_and_is_refused(installation: Platform, cluster: dict[str, Any]) -> None:
    name = cluster["metadata"]["name"]
    pods = installation.runs.get("pods", f"dask.org/cluster-name={name}")
    address = {each["metadata"]["labels"]["dask.org/component"]: each["status"]["podIP"] for each in pods}
    given = {
        "SCHEDULER": address["scheduler"],
        "WORKER": address["worker"],
        "NAMESPACE": installation.runs.name,
        "SECRET": f"{name}-dask-tls",
    }
    script = "".join(f"{key} = {value!r}\n" for key, value in given.items()) + STRANGER
    answers = drive(installation, script).result()
    sys.__stderr__.write("".join(f"{tried}: {answer}\n" for tried, answer in answers.items()))
    assert answers.pop("scheduler's port") == "open", "else the rest shows nothing"
    for tried in ("scheduler's HTTP", "worker's port"):
        assert "timed out" in answers.pop(tried), tried
    for tried in ("get the Secret", "list Secrets"):
        assert "is forbidden" in answers.pop(tried), tried
    for tried, answer in answers.items():
        assert "connected" not in answer, tried
    log = installation.runs.kubectl("logs", f"deployment/{name}-scheduler")
    for reason in ("peer did not return a certificate", "certificate verify failed", "wrong version number"):
        assert reason in log, "the scheduler, and not the network, refused"


def test_the_dashboard_is_reached_by_port_forward(installation: Platform, cluster: dict[str, Any]) -> None:
    service = f"service/{cluster['metadata']['name']}-scheduler"
    with installation.runs.forwarded(service, 8787, "/health") as port:
        page = httpx.get(f"http://127.0.0.1:{port}/status", timeout=60)
        assert "Dask" in page.text
        refused = httpx.post(f"http://127.0.0.1:{port}/api/v1/retire_workers", json={"n": 1}, timeout=30)
        assert refused.status_code == 404, "only an adaptive cluster's operator retires workers"


def test_the_secret_goes_with_the_cluster(installation: Platform, run: Driver, cluster: dict[str, Any]) -> None:
    name = f"{cluster['metadata']['name']}-dask-tls"
    assert f"Secret/{name}" in installation.runs.names("secrets")
    installation.runs.kubectl("delete", "job", run.name, "--cascade=foreground", "--timeout=90s")
    installation.until(lambda: f"Secret/{name}" not in installation.runs.names("secrets"), f"{name} is gone", 60)


def test_without_tls_a_cluster_computes_and_has_no_secret(installation: Platform) -> None:
    driver = drive(
        installation, LONG.replace("time.sleep(600)", "print(client.scheduler.address)"),
        TIDEPOOL_KUBERNETES_TLS="false",
    )  # fmt: skip
    name = driver.result()["name"]
    assert "tcp://" in driver.log()
    assert f"Secret/{name}-dask-tls" not in installation.runs.names("secrets")
