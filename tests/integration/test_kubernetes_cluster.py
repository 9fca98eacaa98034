"""Start and end of a Dask cluster on Kubernetes, with a real scheduler and worker, and a stand-in for the API."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
import time
from contextlib import AsyncExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask.config
import distributed
import pytest
from distributed.security import Security
from distributed.versions import get_versions
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from pydantic import TypeAdapter

from tests.polling import until
from tidepool import settings as settings_module
from tidepool.compute.clusters.kubernetes import certificate, early, manifest, usage
from tidepool.compute.clusters.kubernetes import cluster as kubernetes_module
from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster
from tidepool.compute.clusters.kubernetes.driver import PACKAGES, Driver, Run
from tidepool.errors import ClusterError, UsageError
from tidepool.settings import SizeSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import KubernetesServer

# Each takes seconds; what is wrong in a start is that it waits without end.
pytestmark = pytest.mark.timeout(120)

# An address of this machine's own, as a pod has one: the ports are fixed.
ADDRESS = "127.86.0.1"
IMAGE = "registry.example.com/tidepool@sha256:" + "a" * 64
SIZE = SizeSettings(workers=1)
KEY = "0123456789abcdef" * 2
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
    """What the API holds: `pods`; other objects by kind, then name."""
    held: dict[str, Any] = {"pods": [], "daskclusters": {}, "secrets": {}, "daskworkergroups": {}}

    def answer(request: str) -> tuple[int, Any]:
        method, path, body = (request + "  ").split(" ", 2)
        kind, _, name = re.sub(r"^.*/namespaces/ns/|\?.*$", "", path).partition("/")
        match method, kind:
            case "POST", _:
                created = json.loads(body)
                name = created["metadata"]["name"]
                if name in held[kind]:
                    return 409, {"message": "exists"}
                created["metadata"]["uid"] = f"uid of {name}"
                held[kind][name] = created
                return 201, created
            case "GET", "daskclusters":
                return (200, held[kind][name]) if name in held[kind] else (404, {"message": "not found"})
            case "GET", "pods":
                return 200, "a line" if name else {"items": held["pods"]}
            case "GET", "events":
                return 200, {"items": held.get("events", [])}
            case _:
                held[kind].pop(name, None)
                return 200, {}

    kubernetes.answers = answer
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_IMAGE", IMAGE)
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_SHARED_KEY", KEY)
    settings_module.settings.cache_clear()
    yield held
    settings_module.settings.cache_clear()


def in_the_pods(secret: dict[str, Any]) -> Security:
    """How scheduler and worker read the Secret that they mount."""
    crt, key = secret["stringData"]["tls.crt"], secret["stringData"]["tls.key"]
    return Security(
        require_encryption=True, tls_ca_file=crt, tls_scheduler_cert=crt, tls_scheduler_key=key, tls_worker_cert=crt,
        tls_worker_key=key,
    )  # fmt: skip


@contextmanager
def running_dask(objects: dict[str, Any], *, workers: int) -> Iterator[None]:
    """A scheduler and workers as the cluster's pods run them, once it has been created."""
    over = threading.Event()

    async def run() -> None:
        while not objects["daskworkergroups"]:
            if over.is_set():
                return
            await asyncio.sleep(0.01)
        secrets = [in_the_pods(each) for each in objects["secrets"].values()]
        security = secrets[0] if secrets else None
        preload = "tidepool.compute.clusters.preload."
        async with AsyncExitStack() as stack:
            stack.enter_context(dask.config.set({"distributed.scheduler.http.routes": list(manifest.HTTP_ROUTES)}))
            scheduler = await stack.enter_async_context(
                distributed.Scheduler(
                    host=ADDRESS, port=8786, dashboard=False, dashboard_address=f"{ADDRESS}:0", security=security,
                    protocol="tls" if security else "tcp", preload=[f"{preload}scheduler"],
                )
            )  # fmt: skip
            for _ in range(workers):
                worker = distributed.Worker(
                    scheduler.address, nthreads=1, dashboard=False, security=security, preload=[f"{preload}worker"]
                )
                await stack.enter_async_context(worker)
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    objects["pods"] = [pod("scheduler", ADDRESS), pod("worker", "10.0.0.1")]
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def dask_pods(objects: dict[str, Any]) -> Iterator[None]:
    with running_dask(objects, workers=1):
        yield


def requests(kubernetes: KubernetesServer, *methods: str) -> list[str]:
    paths = [each.split(" ")[:2] for each in kubernetes.requests]
    return [f"{method} {path.rpartition('/namespaces/ns/')[2]}" for method, path in paths if method in methods]


@pytest.fixture
def asked_early(objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> early.Asked:
    """A cluster that another process of the driver has asked for, and created."""
    body = manifest.manifest(
        "early-abcd",
        run=Run(),
        driver=Driver(IMAGE),
        size=SIZE,
        settings=settings_module.settings().kubernetes,
        dask_settings=manifest.scheduler_settings(0, settings_module.settings().compute.no_worker_seconds),
    )
    asked = early.Asked("early-abcd", Driver(IMAGE), certificate.own(), body)
    created = {**body, "metadata": {**body["metadata"], "uid": "u"}}
    objects["daskclusters"][asked.name] = created
    for part in manifest.parts(created, SIZE, settings_module.settings().kubernetes, asked.identity):
        objects[f"{part['kind'].lower()}s"][part["metadata"]["name"]] = part
    reader, writer = os.pipe()
    os.write(writer, f"{asked.name}\n{TypeAdapter(early.Asked).dump_json(asked).decode()}\n".encode())
    os.close(writer)
    monkeypatch.setattr(early, "_asked", early.Early(reader))
    return asked


def test_a_cluster_that_was_asked_for_early_is_taken_over(
    objects: dict[str, Any], asked_early: early.Asked, kubernetes: KubernetesServer
) -> None:
    with running_dask(objects, workers=1), KubernetesCluster(SIZE, allowed_failures=0) as cluster:
        assert cluster.name == asked_early.name
        assert next(iter(cluster.steps)) == "asked for early"
        with distributed.Client(cluster, set_as_default=False) as client:
            assert client.submit(sum, (1, 2)).result(timeout=20) == 3
        assert not [each for each in kubernetes.requests if each.startswith("POST")]
    assert objects["daskclusters"] == {}, "it is this run's to delete"


@pytest.mark.parametrize("error", [None, ConnectionRefusedError("refused")])
def test_half_an_early_cluster_is_deleted_before_another_one_is_created(
    objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    deleted: list[str] = []

    class Api:
        def __init__(self, _: str) -> None:
            if error:
                raise error

        def delete(self, name: str) -> bool:
            assert objects["daskclusters"] == {}
            deleted.append(name)
            return True

    reader, writer = os.pipe()
    os.write(writer, b"early-abcd\n")
    os.close(writer)
    monkeypatch.setattr(early, "_asked", early.Early(reader))
    monkeypatch.setattr(early, "_Api", Api)
    with running_dask(objects, workers=1), KubernetesCluster(SIZE, allowed_failures=0) as cluster:
        assert cluster.name != "early-abcd"
    assert deleted == ([] if error else ["early-abcd"])
    said = (
        "was not deleted: refused" if error else "Dask cluster early-abcd, asked for early, was not complete: deleted"
    )
    assert said in caplog.text


def test_an_early_cluster_of_another_size_is_deleted(
    objects: dict[str, Any], asked_early: early.Asked, caplog: pytest.LogCaptureFixture
) -> None:
    objects["daskworkergroups"].clear()
    objects["secrets"].clear()
    other = SizeSettings(workers=1, cpu=0.5)
    with running_dask(objects, workers=1), KubernetesCluster(other, allowed_failures=0) as cluster:
        assert cluster.name != asked_early.name
        assert list(objects["daskclusters"]) == [cluster.name]
    assert (
        "Dask cluster early-abcd was asked for early with 1 x 1 threads, 1 CPU, 1 GiB and is deleted, because this "
        "flow asks for 1 x 1 threads, 0.5 CPU, 1 GiB: the deployment's job variable early_cluster does not fit"
    ) in caplog.text


@pytest.mark.usefixtures("dask_pods")
def test_a_cluster_starts_computes_and_is_deleted(kubernetes: KubernetesServer, objects: dict[str, Any]) -> None:
    with KubernetesCluster(SIZE) as cluster:
        assert list(objects["daskclusters"]) == [cluster.name]
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
        "POST secrets",
        "POST daskworkergroups",
        f"DELETE daskclusters/{cluster.name}?propagationPolicy=Background",
    ]
    assert objects["daskclusters"] == {}


@pytest.mark.filterwarnings("ignore:Scheduler already contains a plugin with name worker-status")
@pytest.mark.usefixtures("dask_pods")
def test_a_shared_cluster_is_joined_and_outlives_the_run(kubernetes: KubernetesServer) -> None:
    with KubernetesCluster(SIZE, "warm") as first, KubernetesCluster(SIZE, "warm") as second:
        assert first.name == second.name
        assert (next(iter(first.steps)), next(iter(second.steps))) == ("created", "joined")
        # The first one may end between the cluster and its Secret.
        assert requests(kubernetes, "POST").count("POST secrets") == 2
    assert requests(kubernetes, "DELETE") == []
    with (
        pytest.raises(ClusterError, match=r"shared Dask cluster 'warm' has another size than this run \(1 x 1 threads"),
        KubernetesCluster(SizeSettings(workers=2), "warm"),
    ):
        pass


@pytest.mark.usefixtures("dask_pods")
def test_the_key_of_a_cluster_is_in_its_secret_and_nowhere_else(
    kubernetes: KubernetesServer, objects: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), KubernetesCluster(SIZE) as cluster:
        name = cluster.name
        assert cluster.scheduler_address.startswith("tls://")
        shown = repr(cluster) + cluster._repr_html_() + str(vars(cluster))
        # As prefect_dask.get_dask_client connects.
        with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
            assert client.submit(sum, [1, 2]).result(30) == 3
        with pytest.raises(OSError, match=r"Timed out|TLS"):
            distributed.Client(
                cluster.scheduler_address, security=certificate.own().security(), timeout=2, set_as_default=False
            )
    secret = objects["secrets"][f"{name}-dask-tls"]
    [owner] = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("DaskCluster", name, f"uid of {name}")
    key = secret["stringData"]["tls.key"].splitlines()[1]
    [told] = [each for each in kubernetes.requests if key in each]
    assert told.startswith("POST /api/v1/namespaces/ns/secrets ")
    assert key not in shown + caplog.text


@pytest.mark.usefixtures("dask_pods")
def test_without_tls_there_is_no_secret(objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_TLS", "false")
    settings_module.settings.cache_clear()
    with KubernetesCluster(SIZE, "warm") as cluster, distributed.Client(cluster, set_as_default=False) as client:
        assert client.submit(sum, [1, 2]).result(30) == 3
        assert cluster.scheduler_address.startswith("tcp://")
    assert objects["secrets"] == {}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, {"message": "secrets is forbidden"}), "refused POST secrets in namespace ns: secrets is forbidden$"),
        ((503, {"message": "etcd is away"}), "no answer from the Kubernetes API to POST secrets: .*503"),
    ],
)
def test_a_cluster_whose_secret_cannot_be_created_is_deleted(
    answer: tuple[int, Any],
    message: str,
    kubernetes: KubernetesServer,
    objects: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_START_TIMEOUT_SECONDS", "1")
    settings_module.settings.cache_clear()
    others: Any = kubernetes.answers
    kubernetes.answers = lambda request: answer if "/secrets " in request else others(request)
    with pytest.raises(ClusterError, match=message), KubernetesCluster(SIZE):
        pass
    assert len(requests(kubernetes, "DELETE")) == 1
    assert objects["daskclusters"] == {}


@pytest.mark.usefixtures("dask_pods")
def test_a_scheduler_with_another_key_is_not_believed(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Secret was there before that of the shared cluster, whose name can be foreseen."""
    monkeypatch.setattr(manifest.names, "tls_secret", lambda _: "planted")
    planted = manifest.secret({"metadata": {"name": "c", "uid": "u", "labels": {}}}, certificate.own())
    objects["secrets"]["planted"] = planted
    with (
        pytest.raises(
            ClusterError, match=r"^the scheduler of Dask cluster shared-warm-.{8} does not have the cluster's key$"
        ),
        KubernetesCluster(SIZE, "warm"),
    ):
        pass
    assert len(requests(kubernetes, "DELETE")) == 1


@pytest.mark.usefixtures("dask_pods")
def test_the_names_of_a_runs_cluster_have_the_uid_of_its_pod(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission refuses others: a run could take the name of another one's worker group beforehand."""
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_POD_NAME", "driver")
    settings_module.settings.cache_clear()
    containers = [{"name": "driver", "image": IMAGE}]
    driver = {"metadata": {"name": "driver", "uid": "5f0c7a9e-1b2c"}, "spec": {"containers": containers}}
    others: Any = kubernetes.answers
    kubernetes.answers = lambda asked: (200, driver) if asked.rstrip().endswith("/pods/driver") else others(asked)
    with KubernetesCluster(SIZE) as cluster:
        assert cluster.name.endswith("-5f0c7a9e")
        assert [*objects["daskclusters"]] == [cluster.name]
        assert [*objects["secrets"]] == [f"{cluster.name}-dask-tls"]
        assert [*objects["daskworkergroups"]] == [f"{cluster.name}-default"]


def test_a_secret_that_was_there_before_fails_the_start_in_words(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest.names, "tls_secret", lambda _: "planted")
    objects["secrets"]["planted"] = {}
    message = r"^Dask cluster adhoc-.{4} cannot start: a Secret planted exists already, and this run did not create it$"
    with pytest.raises(ClusterError, match=message), KubernetesCluster(SIZE):
        pass
    assert len(requests(kubernetes, "DELETE")) == 1
    assert objects["daskclusters"] == {}


def test_a_shared_cluster_needs_a_key_that_its_runs_share(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIDEPOOL_KUBERNETES_SHARED_KEY")
    settings_module.settings.cache_clear()
    with pytest.raises(
        UsageError, match=r"^shared Dask cluster 'warm' needs a key: set TIDEPOOL_KUBERNETES_SHARED_KEY"
    ):
        KubernetesCluster(SIZE, "warm")
    assert kubernetes.requests == []
    assert objects["daskclusters"] == {}


@pytest.mark.usefixtures("dask_pods")
def test_a_shared_cluster_waits_for_the_deletion_of_its_predecessor(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 15 s of it the run failed, with an exception without a text."""
    monkeypatch.setattr(kubernetes_module, "_LOG_SECONDS", 0.1)
    name = manifest.shared_name("warm", IMAGE, KEY)
    objects["daskclusters"][name] = {"metadata": {"name": name, "deletionTimestamp": "2026-11-26T00:00:00Z"}}
    cluster = KubernetesCluster(SIZE, "warm")
    end = time.monotonic() + 30
    while requests(kubernetes, "POST").count("POST daskclusters") < 5:
        assert time.monotonic() < end
        time.sleep(0.01)
    del objects["daskclusters"][name]
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
        assert cluster.worker_exit("tcp://10.0.0.1:8788") == "out of memory (137)"
        removed = cluster.worker_exit("tcp://10.0.0.2:8788")
        assert removed == "its pod was removed (deleted, evicted, or its node is gone)"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("pods", "seconds", "message"),
    [
        (
            [pod("scheduler", containerStatuses=[CRASHES])],
            600,
            r"cannot start: scheduler terminated: exit code 1, last",
        ),
        ([], 2, r"did not start within 2 s; it waited for its scheduler: no pod yet; is a Dask operator running"),
        (
            [pod("scheduler", "127.86.0.2")],  # nothing listens there yet
            2,
            r"did not start within 2 s; it waited for its scheduler: its pods are starting$",
        ),
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
    assert objects["daskclusters"] == {}


def test_a_cluster_without_a_worker_is_not_ready(objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_START_TIMEOUT_SECONDS", "3")
    settings_module.settings.cache_clear()
    message = r"did not start within 3 s; it waited for its first worker: its pods are starting$"
    with running_dask(objects, workers=0), pytest.raises(ClusterError, match=message), KubernetesCluster(SIZE):
        pass
    assert objects["daskclusters"] == {}


def test_a_start_that_takes_too_long_names_the_last_warning(
    objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_START_TIMEOUT_SECONDS", "1")
    settings_module.settings.cache_clear()
    cluster = KubernetesCluster(SIZE)
    about = {"reason": "FailedCreate", "message": "exceeded quota: dask", "lastTimestamp": "2026-11-26T00:00:00Z"}
    objects["events"] = [{**about, "involvedObject": {"name": f"{cluster.name}-scheduler"}}]
    with pytest.raises(ClusterError, match=r"waited for its scheduler: FailedCreate: exceeded quota: dask$"), cluster:
        pass


@pytest.mark.usefixtures("dask_pods")
def test_a_cluster_with_other_libraries_is_refused_and_deleted(
    objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They exchange pickles: a table of another pandas may be read wrong, or not at all."""
    ours = get_versions(PACKAGES)
    ours["packages"]["pandas"] = "0.1"
    monkeypatch.setattr(kubernetes_module, "get_versions", lambda _: ours)
    message = r"has other libraries than this run: pandas 0\.1 here, pandas \d+\.\d+\.\d+ there$"
    with pytest.raises(ClusterError, match=message), KubernetesCluster(SIZE):
        pass
    assert objects["daskclusters"] == {}


@pytest.mark.usefixtures("dask_pods")
def test_a_cluster_that_may_not_be_deleted_fails_no_run(
    kubernetes: KubernetesServer, caplog: pytest.LogCaptureFixture
) -> None:
    others: Any = kubernetes.answers
    refused = 403, {"message": "daskclusters is forbidden"}
    kubernetes.answers = lambda request: refused if request.startswith("DELETE ") else others(request)
    with KubernetesCluster(SIZE) as cluster:
        pass
    assert f"Dask cluster {cluster.name} could not be deleted (Kubernetes refused DELETE daskclusters/" in caplog.text
    assert f"or: kubectl --namespace ns delete daskcluster {cluster.name}\n" in caplog.text


def test_the_digest_of_the_drivers_image_is_waited_for_patiently(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred drivers that start at once ask the API of the Kubernetes cluster; a loaded image never has a digest."""
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_POD_NAME", "driver")
    settings_module.settings.cache_clear()
    containers = [{"name": "driver", "image": "tidepool:loaded"}]
    driver = {"metadata": {"name": "driver", "uid": "5f0c7a9e-1b2c"}, "spec": {"containers": containers}}
    others: Any = kubernetes.answers
    asked: list[float] = []

    def answer(request: str) -> tuple[int, Any]:
        if not request.rstrip().endswith("/pods/driver"):
            return others(request)  # type: ignore[no-any-return]
        asked.append(time.monotonic())
        return 200, driver

    kubernetes.answers = answer
    cluster = KubernetesCluster(SIZE)
    until(lambda: objects["daskworkergroups"])
    cluster.close()
    [group] = objects["daskworkergroups"].values()
    assert group["spec"]["worker"]["spec"]["containers"][0]["image"] == "tidepool:loaded"
    # A lower bound, which no slow machine breaks: the first pause is 50 ms.
    assert min(after - before for before, after in pairwise(asked)) > 0.049


def test_nothing_is_created_after_a_cluster_is_closed(kubernetes: KubernetesServer, objects: dict[str, Any]) -> None:
    """A Secret whose owner is gone stayed until Kubernetes looked for it."""
    deleting, created, others = threading.Event(), threading.Event(), kubernetes.answers
    assert callable(others)
    answer = others

    def slow(request: str) -> tuple[int, Any]:
        if "/daskclusters " in request:
            deleting.wait(30)
        if request.startswith("DELETE "):
            deleting.set()
            created.wait(0.5)  # during this answer the Secret would be created
        if request.startswith("POST ") and "/secrets" in request:
            created.set()
        return answer(request)

    kubernetes.answers = slow
    cluster = KubernetesCluster(SIZE)
    until(lambda: requests(kubernetes, "POST"))
    cluster.close()
    deleted = f"DELETE daskclusters/{cluster.name}?propagationPolicy=Background"
    assert requests(kubernetes, "POST", "DELETE") == ["POST daskclusters", deleted]
    assert objects["secrets"] == {}


def test_a_cluster_that_the_operator_refuses_fails_at_once_in_words(
    kubernetes: KubernetesServer, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_module, "_DIAGNOSE_SECONDS", 0.1)
    cluster = KubernetesCluster(SIZE)
    # The first is about a predecessor of the same name.
    objects["events"] = [
        {"message": text, "involvedObject": {"name": cluster.name, "uid": uid}}
        for uid, text in (("uid-0", "old"), (f"uid of {cluster.name}", "spec.worker may have only a; not hostNetwork"))
    ]
    refused = r"cannot start: the Dask operator refused it: spec\.worker may have only a; not hostNetwork$"
    with pytest.raises(ClusterError, match=refused), cluster:
        pass
    assert len(requests(kubernetes, "DELETE")) == 1
    asked = [each for each in kubernetes.requests if "/events?" in each]
    assert "reason%3DRefused" in asked[0], "the namespace may have thousands of events"


def test_a_cluster_that_is_closed_while_it_starts_is_deleted(
    kubernetes: KubernetesServer, objects: dict[str, Any]
) -> None:
    cluster = KubernetesCluster(SIZE)
    end = time.monotonic() + 30
    while not objects["daskclusters"]:
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
