"""The loop over what flow runs leave behind, and `tidepool reap`: reading, deleting, and failures of both."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import kr8s.asyncio
import pytest
from typer.testing import CliRunner

from tidepool import cli
from tidepool.operate.metrics import OPERATOR, Metrics
from tidepool.operate.sweep import loop
from tidepool.operate.sweep.figures import SweepFigures
from tidepool.operate.sweep.leftovers import Leftover
from tidepool.operate.sweep.observation import ReadingError, observe
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry

    from tests.conftest import KubernetesServer

DASK = "/apis/kubernetes.dask.org/v1/namespaces/ns"
CORE = "/api/v1/namespaces/ns"
OURS = {"app.kubernetes.io/part-of": "tidepool", "app.kubernetes.io/managed-by": "tidepool"}
LONG_AGO = "2026-01-01T00:00:00Z"
# In this order: what belongs to something is read before it. The clusters are read before, too, for their names.
READINGS = [
    f"{CORE}/events",
    f"{DASK}/daskclusters",
    f"{DASK}/daskworkergroups",
    f"{DASK}/daskautoscalers",
    "/apis/apps/v1/namespaces/ns/deployments",
    f"{CORE}/services",
    f"{DASK}/daskclusters",
    f"{CORE}/pods",
    "/apis/batch/v1/namespaces/ns/jobs",
]
Object = dict[str, Any]


def cluster(name: str, driver: str) -> Object:
    metadata = {"name": name, "uid": f"uid-{name}", "labels": OURS, "creationTimestamp": LONG_AGO}
    return {"metadata": metadata | {"annotations": {"tidepool.dev/driver": driver}}}


def pod(name: str, node: str = "n1") -> Object:
    return {"metadata": {"name": name}, "spec": {"nodeName": node} if node else {}, "status": {"phase": "Running"}}


class Namespace:
    """The answers of a Kubernetes API about namespace `ns`: what it has, and which requests fail."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Object]] = {}
        self.failing: dict[str, tuple[int, Any]] = {}

    def __call__(self, request: str) -> tuple[int, Any]:
        method, path, *_ = request.split(" ", 2)
        path = urlsplit(path).path
        if path in self.failing:
            return self.failing[path]
        if method == "DELETE":
            return 200, {}
        folder, _, name = path.rpartition("/")
        if folder in READINGS:
            found = [each for each in self.objects.get(folder, []) if each["metadata"]["name"] == name]
            return (200, found[0]) if found else (404, {"message": "not found"})
        # `null` for none, as the API server says it of custom resources' metadata.
        return 200, {"items": self.objects.get(path)}


@pytest.fixture
def namespace(kubernetes: KubernetesServer) -> Namespace:
    """One cluster with a living driver and one without."""
    found = Namespace()
    found.objects = {
        f"{DASK}/daskclusters": [cluster("alive", "driver-1"), cluster("dead", "driver-2")],
        f"{CORE}/pods": [pod("driver-1")],
    }
    kubernetes.answers = found
    return found


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()

    yield put
    settings.cache_clear()


def read() -> Any:
    async def once() -> Any:
        return await observe(await kr8s.asyncio.api(), "ns")

    return asyncio.run(once())


def test_parts_are_read_before_what_they_belong_to(kubernetes: KubernetesServer, namespace: Namespace) -> None:
    found = read()
    assert [urlsplit(each.split()[1]).path for each in kubernetes.requests if "driver-2" not in each] == READINGS
    assert [each["metadata"]["name"] for each in found.clusters] == ["alive", "dead"]
    queries = {urlsplit(each).path: parse_qs(urlsplit(each).query) for each in kubernetes.requests}
    ours = ",".join(f"{name}={value}" for name, value in OURS.items())
    assert queries[f"GET {CORE}/services"] == {"labelSelector": [f"{ours},dask.org/cluster-name"]}
    assert queries[f"GET {CORE}/pods"] == {"labelSelector": ["app.kubernetes.io/component=flow-run"]}
    assert namespace.failing == {}


def test_a_driver_without_the_label_of_flow_runs_is_found_by_its_name(
    kubernetes: KubernetesServer, namespace: Namespace
) -> None:
    def answer(request: str) -> tuple[int, Any]:
        return (200, pod("driver-2")) if f"{CORE}/pods/driver-2" in request else namespace(request)

    kubernetes.answers = answer
    assert {each["metadata"]["name"] for each in read().drivers} == {"driver-1", "driver-2"}


@pytest.mark.parametrize("driver", ["", "../secrets/x", "a" * 300])
def test_a_driver_that_is_not_a_pods_name_is_not_asked_for(
    driver: str, kubernetes: KubernetesServer, namespace: Namespace
) -> None:
    namespace.objects[f"{DASK}/daskclusters"] = [cluster("odd", driver)]
    read()
    assert len(kubernetes.requests) == len(READINGS)


def test_deployments_of_a_runs_cluster_that_is_there_are_not_read(
    kubernetes: KubernetesServer, namespace: Namespace
) -> None:
    shared, long = cluster("shared-x", ""), cluster("a" * 64, "")
    shared["metadata"]["labels"] = OURS | {"tidepool.dev/shared-cluster": "x"}
    namespace.objects[f"{DASK}/daskclusters"] += [shared, long]
    read()
    [asked] = [each for each in kubernetes.requests if "/deployments" in each]
    [selector] = parse_qs(urlsplit(asked).query)["labelSelector"]
    assert selector.endswith(",dask.org/cluster-name,dask.org/cluster-name notin (alive,dead)")


def test_without_parts_only_the_rest_is_read(kubernetes: KubernetesServer, namespace: Namespace) -> None:
    async def once() -> Any:
        return await observe(await kr8s.asyncio.api(), "ns", parts=False)

    found = asyncio.run(once())
    paths = [urlsplit(each.split()[1]).path for each in kubernetes.requests if "driver-2" not in each]
    assert paths == [READINGS[0], *READINGS[-3:]]
    assert (len(found.clusters), found.parts) == (2, {})
    assert namespace.failing == {}


@pytest.mark.parametrize("path", [*READINGS, f"{CORE}/pods/driver-2"])
def test_without_one_reading_there_is_none(path: str, namespace: Namespace) -> None:
    namespace.failing = {path: (500, {})}
    with pytest.raises(ReadingError, match=f"refused to read .*{path.rpartition('/')[2]} for namespace ns"):
        read()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((403, {"message": "jobs is forbidden"}), "refused to read jobs for namespace ns: jobs is forbidden"),
        ((0, {}), "no answer from Kubernetes to read jobs"),
        ((200, "half an ans"), "no answer .*Expecting value"),
        ((200, []), "the answer is not an object"),
        ((200, {}), "no complete list of jobs"),
        ((200, {"metadata": {"continue": "x"}, "items": []}), "no complete list of jobs"),
        ((404, {"message": "no such kind"}), "no complete list of jobs"),
    ],
)
def test_an_answer_that_is_not_the_whole_list_is_none(
    answer: tuple[int, Any], problem: str, namespace: Namespace
) -> None:
    namespace.failing = {READINGS[-1]: answer}
    with pytest.raises(ReadingError, match=problem):
        read()


@pytest.mark.parametrize(("allowed", "node", "asked"), [("true", "", 1), ("true", "n1", 0), ("false", "", 0)])
def test_nodes_are_read_when_a_driver_waits_for_one(
    allowed: str,
    node: str,
    asked: int,
    kubernetes: KubernetesServer,
    namespace: Namespace,
    environment: Callable[..., None],
) -> None:
    environment(TIDEPOOL_OPERATOR_READ_NODES=allowed)
    namespace.objects[f"{CORE}/pods"] = [pod("driver-1", node), pod("driver-2", node)]
    namespace.objects["/api/v1/nodes"] = [{"metadata": {"name": "n1"}}]
    found = read()
    assert kubernetes.requests.count("GET /api/v1/nodes") == asked
    assert found.nodes == (({"metadata": {"name": "n1"}},) if asked else None)


def deletions(kubernetes: KubernetesServer) -> list[str]:
    return [each for each in kubernetes.requests if each.startswith("DELETE")]


def by_uid(path: str, uid: str) -> str:
    options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
    return f"DELETE {path} {json.dumps(options)}"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("DaskCluster", f"{DASK}/daskclusters"),
        ("DaskWorkerGroup", f"{DASK}/daskworkergroups"),
        ("DaskAutoscaler", f"{DASK}/daskautoscalers"),
        ("Deployment", "/apis/apps/v1/namespaces/ns/deployments"),
        ("Service", f"{CORE}/services"),
    ],
)
def test_a_deletion_names_the_uid(kind: str, path: str, kubernetes: KubernetesServer) -> None:
    kubernetes.answers = [(200, {}), (404, {"message": "not found"}), (409, {"message": "another uid"})]

    async def three() -> list[bool]:
        api = await kr8s.asyncio.api()
        return [await loop.delete(api, Leftover(kind, "ns", "x", "uid-x", "orphaned")) for _ in range(3)]

    assert asyncio.run(three()) == [True, False, False], "gone, or another object of that name: nothing to do"
    assert kubernetes.requests == [by_uid(f"{path}/x", "uid-x")] * 3


def watched(kubernetes: KubernetesServer, *namespaces: str, until: Callable[[], bool]) -> CollectorRegistry:
    """Let the loop run until something has happened; return its metrics."""
    metrics = Metrics(OPERATOR)

    async def check() -> None:
        watch = asyncio.create_task(loop.watch(namespaces, loop.Exchange(), SweepFigures(metrics, namespaces)))
        async with asyncio.timeout(60):
            while not until():  # noqa: ASYNC110 - the server is another thread
                await asyncio.sleep(0.001)
        assert not watch.done()
        watch.cancel()

    kubernetes.requests.clear()
    asyncio.run(check())
    return metrics.registry


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(loop, "_POLL_SECONDS", 0.001)
    caplog.set_level(logging.INFO, loop.__name__)
    return caplog


def messages(log: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in log.records if each.name == loop.__name__]


@pytest.mark.usefixtures("namespace")
def test_the_loop_deletes_what_is_dead_and_logs_why(
    kubernetes: KubernetesServer, fast: pytest.LogCaptureFixture
) -> None:
    watched(kubernetes, "ns", until=lambda: len(deletions(kubernetes)) > 1)
    assert set(deletions(kubernetes)) == {by_uid(f"{DASK}/daskclusters/dead", "uid-dead")}
    expected = "DaskCluster dead in namespace ns deleted: its driver pod driver-2 is gone"
    assert set(messages(fast)) == {expected}


@pytest.mark.parametrize("path", [READINGS[0], READINGS[-1]])
def test_nothing_goes_while_a_reading_fails_and_that_is_logged_once(
    path: str, kubernetes: KubernetesServer, namespace: Namespace, fast: pytest.LogCaptureFixture
) -> None:
    namespace.failing = {path: (503, {})}
    watched(kubernetes, "ns", until=lambda: sum(path in each for each in kubernetes.requests) > 3)
    assert deletions(kubernetes) == []
    [problem] = messages(fast)
    assert problem.startswith("sweep of namespace ns: Kubernetes refused to read ")
    assert "503" in problem


def test_the_loop_works_again_after_a_failure(
    kubernetes: KubernetesServer, namespace: Namespace, fast: pytest.LogCaptureFixture
) -> None:
    def answer(request: str) -> tuple[int, Any]:
        return (503, {}) if len(kubernetes.requests) < 4 else namespace(request)

    kubernetes.answers = answer
    watched(kubernetes, "ns", until=lambda: "works again" in fast.text)
    assert messages(fast)[-1] == "sweep of namespace ns: works again"
    assert deletions(kubernetes)


def test_a_namespace_that_cannot_be_read_does_not_keep_the_next(
    kubernetes: KubernetesServer, namespace: Namespace, fast: pytest.LogCaptureFixture
) -> None:
    namespace.failing = {"/api/v1/namespaces/former/events": (403, {"message": "forbidden"})}
    watched(kubernetes, "former", "ns", until=lambda: bool(deletions(kubernetes)))
    assert "sweep of namespace former: Kubernetes refused to read events" in messages(fast)[0]


def test_a_deletion_that_is_refused_does_not_keep_the_next(
    kubernetes: KubernetesServer, namespace: Namespace, fast: pytest.LogCaptureFixture
) -> None:
    namespace.objects[f"{CORE}/pods"] = []
    namespace.failing = {f"{DASK}/daskclusters/alive": (403, {"message": "a policy forbids it"})}
    watched(kubernetes, "ns", until=lambda: "not deleted" in fast.text)
    assert by_uid(f"{DASK}/daskclusters/dead", "uid-dead") in deletions(kubernetes)
    refused = [each for each in messages(fast) if each.startswith("Dask clusters of namespace ns: ")]
    assert "1 not deleted: Kubernetes refused to delete DaskCluster alive in namespace ns: a policy" in refused[0]


def test_an_object_that_is_not_understood_stops_neither_loop_nor_operator(
    kubernetes: KubernetesServer, namespace: Namespace, fast: pytest.LogCaptureFixture
) -> None:
    namespace.objects[f"{DASK}/daskclusters"].append({"metadata": {"name": "x", "uid": "x", "labels": OURS}})
    watched(kubernetes, "ns", until=lambda: sum(READINGS[-1] in each for each in kubernetes.requests) > 3)
    found = [each for each in fast.records if each.name == loop.__name__]
    parts = [f"{each} of namespace ns: KeyError: 'creationTimestamp'" for each in ("Dask clusters", "figures")]
    assert [each.getMessage() for each in found] == parts
    assert all(each.exc_info for each in found), "with its traceback"


@pytest.mark.usefixtures("fast")
def test_the_sweep_exports_what_it_found_and_deleted(kubernetes: KubernetesServer, namespace: Namespace) -> None:
    namespace.objects[f"{CORE}/pods"] = []
    namespace.failing = {f"{DASK}/daskclusters/alive": (403, {"message": "a policy forbids it"})}
    before = time.time()
    found = watched(kubernetes, "ns", until=lambda: sum(READINGS[-1] in each for each in kubernetes.requests) > 3)
    ns = {"run_namespace": "ns"}
    assert found.get_sample_value("tidepool_dask_clusters", ns | {"kind": "run"}) == 2
    assert found.get_sample_value("tidepool_dask_clusters", ns | {"kind": "shared"}) == 0
    age = before - datetime.fromisoformat(LONG_AGO).timestamp()
    assert found.get_sample_value("tidepool_dask_cluster_oldest_seconds", ns | {"kind": "run"}) >= age
    # Since the sweep first found it, not since it was made.
    assert 0 < found.get_sample_value("tidepool_dask_orphan_oldest_seconds", ns) <= time.time() - before
    assert found.get_sample_value("tidepool_reaper_last_sweep_timestamp_seconds", ns) >= before
    # The API of this test keeps what it says it deleted: once or more.
    assert found.get_sample_value("tidepool_reaper_deleted_total", ns | {"kind": "DaskCluster"}) >= 1
    assert found.get_sample_value("tidepool_reaper_deleted_total", ns | {"kind": "Service"}) == 0


@pytest.mark.usefixtures("fast")
def test_a_sweep_that_fails_is_not_a_sweep(kubernetes: KubernetesServer, namespace: Namespace) -> None:
    namespace.failing = {READINGS[-1]: (503, {})}
    found = watched(kubernetes, "ns", until=lambda: sum(READINGS[-1] in each for each in kubernetes.requests) > 3)
    assert found.get_sample_value("tidepool_reaper_last_sweep_timestamp_seconds", {"run_namespace": "ns"}) == 0


# --- tidepool reap ----------------------------------------------------------------------------------------------------


def reap(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["reap", *arguments])
    return done.exit_code, done.output


@pytest.mark.usefixtures("namespace")
def test_reap_prints_what_why_and_done(kubernetes: KubernetesServer) -> None:
    code, text = reap()
    assert code == 0
    assert text.splitlines() == [
        "KIND         NAMESPACE  NAME  WHY                              DONE",
        "DaskCluster  ns         dead  its driver pod driver-2 is gone  deleted",
        "ns: 0 Jobs and 2 Dask clusters read, 1 left behind",
    ]
    assert deletions(kubernetes) == [by_uid(f"{DASK}/daskclusters/dead", "uid-dead")]


@pytest.mark.usefixtures("namespace")
def test_a_dry_run_deletes_nothing(kubernetes: KubernetesServer) -> None:
    code, text = reap("--dry-run")
    assert code == 0
    assert "would be deleted" in text
    assert deletions(kubernetes) == []


def test_nothing_left_behind_is_one_line(namespace: Namespace) -> None:
    namespace.objects = {}
    assert reap() == (0, "ns: 0 Jobs and 0 Dask clusters read, 0 left behind\n")


@pytest.mark.usefixtures("namespace")
def test_reap_as_json(kubernetes: KubernetesServer) -> None:
    code, text = reap("--json", "--dry-run", "--namespace", "ns", "-n", "other")
    assert code == 0
    found = json.loads(text)
    assert found["namespaces"] == {
        "ns": {"jobs": 0, "dask_clusters": 2},
        "other": {"jobs": 0, "dask_clusters": 0},
    }
    [left] = found["left_behind"]
    assert left == {
        "kind": "DaskCluster", "namespace": "ns", "name": "dead", "uid": "uid-dead", "run": "",
        "reason": "its driver pod driver-2 is gone", "outcome": "would be deleted",
    }  # fmt: skip
    assert deletions(kubernetes) == []


def test_reap_takes_the_operators_namespaces(
    kubernetes: KubernetesServer, namespace: Namespace, environment: Callable[..., None]
) -> None:
    environment(TIDEPOOL_OPERATOR_NAMESPACES="runs media")
    namespace.objects = {}
    code, text = reap()
    assert code == 0
    assert [each.partition(":")[0] for each in text.splitlines()] == ["runs", "media"]
    assert not any("/namespaces/ns/" in each for each in kubernetes.requests)


def test_reap_deletes_nothing_when_a_namespace_cannot_be_read(
    kubernetes: KubernetesServer, namespace: Namespace
) -> None:
    namespace.failing = {"/apis/batch/v1/namespaces/other/jobs": (503, {})}
    code, text = reap("-n", "ns", "-n", "other")
    assert code == 1
    assert text.startswith("tidepool: Kubernetes refused to read jobs for namespace other: ")
    assert text.endswith("; nothing was deleted\n")
    assert deletions(kubernetes) == []


def test_reap_fails_when_a_deletion_is_refused(namespace: Namespace) -> None:
    namespace.failing = {f"{DASK}/daskclusters/dead": (403, {"message": "a policy forbids it"})}
    code, text = reap()
    assert code == 1
    assert "refused to delete DaskCluster dead in namespace ns: a policy forbids it" in text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is empty, or not YAML with contexts"),
        ("{", "it is empty, or not YAML with contexts"),
        ("clusters: []", "it has no 'current-context'"),
    ],
)
def test_a_kubeconfig_that_is_not_one_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, content: str, why: str
) -> None:
    (tmp_path / "config").write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    code, text = reap()
    assert code == 1
    assert text == (
        f"tidepool: the kubeconfig (KUBECONFIG, or ~/.kube/config) is not valid: {why}; nothing was deleted\n"
    )


def test_reap_without_credentials_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, text = reap()
    assert code == 1
    assert text.startswith("tidepool: no Kubernetes credentials")
