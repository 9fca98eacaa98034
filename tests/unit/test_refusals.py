"""The operator's check before each step, with a stand-in for the Kubernetes API."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import kopf
import pytest

from tests.flow_run_objects import CLUSTER, LEGITIMATE, PARAMETERS
from tidepool.compute.clusters.kubernetes import names
from tidepool.operate import refusals

if TYPE_CHECKING:
    from tests.conftest import KubernetesServer

Objects = dict[str, Any]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Warning events."""
    found: list[str] = []
    monkeypatch.setattr(kopf, "warn", lambda _, *, reason, message: found.append(f"{reason}: {message}"))
    return found


@pytest.fixture
def objects(kubernetes: KubernetesServer) -> Objects:
    """What the API has, by the end of its path."""
    cluster = copy.deepcopy(LEGITIMATE["DaskCluster"])
    cluster["metadata"]["uid"] = "uid-c"
    found = {
        "configmaps/tidepool-flow-run-rules": {"data": PARAMETERS},
        f"daskclusters/{CLUSTER}": cluster,
    }

    def answer(request: str) -> tuple[int, Any]:
        name = "/".join(request.split(" ")[1].rsplit("/", 2)[1:])
        return (200, found[name]) if name in found else (404, {"message": "not found"})

    kubernetes.answers = answer
    return found


def checked(manifest: dict[str, Any]) -> kopf.Patch:
    patch = kopf.Patch()
    asyncio.run(refusals.check(body=kopf.Body(manifest), namespace="ns", patch=patch))
    return patch


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("kind", ["DaskCluster", "DaskWorkerGroup", "DaskAutoscaler"])
def test_what_tidepool_makes_is_not_refused(kind: str, told: list[str]) -> None:
    assert checked(LEGITIMATE[kind]) == {}
    assert not told


@pytest.mark.usefixtures("objects")
def test_a_cluster_that_asks_for_too_much_is_refused_in_words(told: list[str]) -> None:
    cluster = copy.deepcopy(LEGITIMATE["DaskCluster"])
    cluster["spec"]["scheduler"]["spec"] |= {"hostNetwork": True, "serviceAccountName": "tidepool-operator"}
    patch = kopf.Patch()
    with pytest.raises(kopf.PermanentError, match=r"refused: spec\.scheduler\.spec must not have hostNetwork, s"):
        asyncio.run(refusals.check(body=kopf.Body(cluster), namespace="ns", patch=patch))
    assert patch["status"]["phase"] == "Refused"
    [event] = told
    assert event.startswith(
        "Refused: spec.scheduler.spec must not have hostNetwork, serviceAccountName: "
        "it may have only automountServiceAccountToken, containers, "
    )
    # Its deletion is not held up.
    cluster["metadata"]["deletionTimestamp"] = "2026-11-27T00:00:00Z"
    checked(cluster)


def test_an_object_is_refused_once_until_it_changes(
    kubernetes: KubernetesServer, objects: Objects, told: list[str]
) -> None:
    """Kopf calls the timer of an autoscaler every five seconds: each time an event and a line of log."""
    autoscaler = copy.deepcopy(LEGITIMATE["DaskAutoscaler"])
    autoscaler["metadata"] |= {"uid": "uid-once", "generation": 1}
    autoscaler["spec"]["maximum"] = 6

    def check() -> bool:
        return asyncio.run(refusals.check(body=kopf.Body(autoscaler), namespace="ns", patch=kopf.Patch()))

    with pytest.raises(kopf.PermanentError, match=r"spec\.maximum"):
        check()
    asked = len(kubernetes.requests)
    assert [check(), check()] == [False, False], "the handler is not called"
    assert len(told) == 1
    assert len(kubernetes.requests) == asked
    autoscaler["metadata"]["generation"] = 2
    with pytest.raises(kopf.PermanentError):
        check()
    autoscaler["spec"]["maximum"] = 5
    autoscaler["metadata"]["generation"] = 3
    assert check()
    assert objects


def test_the_memory_of_refusals_is_bounded(objects: Objects, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_REMEMBERED", 2)
    monkeypatch.setattr(refusals, "_refused", OrderedDict())
    cluster = copy.deepcopy(LEGITIMATE["DaskCluster"])
    cluster["spec"]["idleTimeout"] = 0
    for uid in "abc":
        cluster["metadata"]["uid"] = uid
        with pytest.raises(kopf.PermanentError):
            asyncio.run(refusals.check(body=kopf.Body(cluster), namespace="ns", patch=kopf.Patch()))
    assert list(refusals._refused) == ["b", "c"]
    assert len(told) == 3
    assert objects


@pytest.mark.usefixtures("objects")
def test_a_refusal_is_one_line_that_an_event_can_hold(told: list[str]) -> None:
    cluster = copy.deepcopy(LEGITIMATE["DaskCluster"])
    pod = cluster["spec"]["worker"]["spec"]
    pod |= {f"a\n{n}{'b' * 200}": True for n in range(100)}
    pod["containers"][0]["env"] = [{"name": "a" * 300, "value": 1}] * 100
    with pytest.raises(kopf.PermanentError):
        asyncio.run(refusals.check(body=kopf.Body(cluster), namespace="ns", patch=kopf.Patch()))
    [event] = told
    assert event.isprintable()
    assert len(event) <= 1024


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("DaskWorkerGroup", {"uid": "uid-x"}, f"metadata.ownerReferences must have the uid of DaskCluster {CLUSTER}"),
        ("DaskAutoscaler", {"uid": "uid-x"}, f"metadata.ownerReferences must have the uid of DaskCluster {CLUSTER}"),
        (
            "DaskAutoscaler",
            {"annotations": {names.ANNOTATION_DRIVER: "other"}},
            f"metadata.annotations.{names.ANNOTATION_DRIVER} must be that of DaskCluster {CLUSTER}",
        ),
        (
            "DaskWorkerGroup",
            {"labels": LEGITIMATE["DaskWorkerGroup"]["metadata"]["labels"] | {names.LABEL_SHARED: "mine"}},
            f"metadata.labels.{names.LABEL_SHARED} must be that of DaskCluster {CLUSTER}",
        ),
        ("DaskWorkerGroup", {"args": ["sh"]}, f"spec.worker must be that of DaskCluster {CLUSTER}, but for replicas"),
    ],
)
@pytest.mark.usefixtures("objects")
def test_what_is_not_its_clusters_own_is_refused(
    kind: str, change: dict[str, Any], sentence: str, told: list[str]
) -> None:
    manifest = copy.deepcopy(LEGITIMATE[kind])
    if "uid" in change:
        manifest["metadata"]["ownerReferences"][0] |= change
    elif change.keys() <= {"annotations", "labels"}:
        manifest["metadata"] |= change
    else:
        manifest["spec"]["worker"]["spec"]["containers"][0] |= change
    with pytest.raises(kopf.PermanentError):
        checked(manifest)
    assert told == [f"Refused: {sentence}"]


@pytest.mark.usefixtures("objects")
def test_more_workers_than_at_first_are_the_clusters_own(told: list[str]) -> None:
    manifest = copy.deepcopy(LEGITIMATE["DaskWorkerGroup"])
    manifest["spec"]["worker"]["replicas"] = 5
    checked(manifest)
    assert not told


def test_the_workers_of_a_refused_cluster_are_refused(objects: Objects, told: list[str]) -> None:
    objects[f"daskclusters/{CLUSTER}"]["spec"]["scheduler"]["spec"]["hostPID"] = True
    with pytest.raises(kopf.PermanentError, match="must not have hostPID"):
        checked(LEGITIMATE["DaskWorkerGroup"])
    assert told


def test_the_workers_of_a_cluster_that_is_gone_are_not_made(objects: Objects, told: list[str]) -> None:
    del objects[f"daskclusters/{CLUSTER}"]
    with pytest.raises(kopf.PermanentError, match="its DaskCluster is gone"):
        checked(LEGITIMATE["DaskWorkerGroup"])
    assert not told, "an ordinary end"


def test_an_autoscaler_without_a_cluster_is_looked_at_once(objects: Objects, kubernetes: KubernetesServer) -> None:
    """Its timer asked for the cluster every five seconds, with a line of the log each time."""
    del objects[f"daskclusters/{CLUSTER}"]
    alone = copy.deepcopy(LEGITIMATE["DaskAutoscaler"])
    alone["metadata"] |= {"uid": "uid-alone", "generation": 1}
    with pytest.raises(kopf.PermanentError, match="its DaskCluster is gone"):
        checked(alone)
    asked = len(kubernetes.requests)
    assert not asyncio.run(refusals.check(body=kopf.Body(alone), namespace="ns", patch=kopf.Patch()))
    assert len(kubernetes.requests) == asked


def test_without_rules_everything_is_refused(objects: Objects, told: list[str]) -> None:
    del objects["configmaps/tidepool-flow-run-rules"]
    with pytest.raises(kopf.PermanentError):
        checked(LEGITIMATE["DaskCluster"])
    assert told == [
        "Refused: namespace ns has no ConfigMap tidepool-flow-run-rules, which says what flow runs may have"
    ]


@pytest.mark.usefixtures("objects")
def test_a_dask_job_is_refused(told: list[str]) -> None:
    with pytest.raises(kopf.PermanentError):
        checked({"kind": "DaskJob", "metadata": {"name": "j"}, "spec": {}})
    assert told == ["Refused: a DaskJob is not allowed"]


def test_an_api_that_fails_is_asked_again(kubernetes: KubernetesServer) -> None:
    kubernetes.answers = lambda _: (503, {"message": "busy"})
    with pytest.raises(kopf.TemporaryError, match="does not answer"):
        checked(LEGITIMATE["DaskCluster"])
