"""Requests to a Kubernetes API: retries, refusals and absent objects, by kr8s and a web server in the API's place."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tidepool.compute.clusters.kubernetes import api as kubernetes_api
from tidepool.compute.clusters.kubernetes.api import KubernetesApi
from tidepool.errors import ClusterError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import KubernetesServer

CLUSTER = {"apiVersion": "kubernetes.dask.org/v1", "kind": "DaskCluster", "metadata": {"name": "c"}}
DASK = "/apis/kubernetes.dask.org/v1/namespaces/ns"
CORE = "/api/v1/namespaces/ns"


@pytest.fixture
async def api(kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> KubernetesApi:
    monkeypatch.setattr(kubernetes_api, "_RETRY_SECONDS", 0.001)
    assert kubernetes.answers == []
    api = KubernetesApi("")
    await api.connect(60)
    api.retry_for(0)
    return api


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def refused(status: int, message: str) -> tuple[int, Any]:
    return status, {"kind": "Status", "message": message, "code": status}


pytestmark = pytest.mark.anyio


async def test_a_created_object_is_returned(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    kubernetes.answers = [(201, CLUSTER)]
    assert await api.create(CLUSTER) == CLUSTER
    assert kubernetes.requests == [f"POST {DASK}/daskclusters {json.dumps(CLUSTER)}"]
    assert api.namespace == "ns", "the kubeconfig's"


async def test_a_secret_is_created_in_the_core_group(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "c-dask-tls"}}
    kubernetes.answers = [(201, secret)]
    await api.create(secret)
    assert kubernetes.requests == [f"POST {CORE}/secrets {json.dumps(secret)}"]


async def test_a_name_that_exists_creates_nothing(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    kubernetes.answers = [refused(409, "exists")]
    assert await api.create(CLUSTER) is None


async def test_an_unavailable_api_is_asked_again(
    kubernetes: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(kubernetes_api, "asyncio", SimpleNamespace(sleep=sleep))
    kubernetes.answers = [(kubernetes.DISCONNECT, {}), (503, ""), refused(429, "too many"), (200, {"items": []})]
    api.retry_for(60)
    assert await api.pods("c") == []
    assert kubernetes.requests == [f"GET {CORE}/pods?labelSelector=dask.org%2Fcluster-name%3Dc"] * 4
    assert pauses == [0.001] * 3


async def test_it_is_not_asked_again_when_the_time_is_over(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    kubernetes.answers = [(503, "")]
    with pytest.raises(ClusterError, match=r"no answer from the Kubernetes API to GET pods: .*503"):
        await api.pods("c")


async def test_an_api_without_any_answer_is_unavailable(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    kubernetes.answers = [(kubernetes.DISCONNECT, {})]
    with pytest.raises(ClusterError, match=r"no answer .*disconnected"):
        await api.pods("c")


async def test_a_request_without_an_answer_ends_after_the_timeout(
    kubernetes: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "TIMEOUT_SECONDS", 0.05)
    kubernetes.answers = [(kubernetes.NO_ANSWER, {})]
    with pytest.raises(ClusterError, match=r"no answer .*Timeout"):
        await api.pods("c")


async def test_a_refusal_has_the_apis_own_words(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    # kr8s asks again with new credentials, three times.
    kubernetes.answers = [refused(403, "exceeded quota: dask")] * 4
    api.retry_for(60)
    with pytest.raises(ClusterError, match="refused POST daskclusters in namespace ns: exceeded quota: dask"):
        await api.create(CLUSTER)


async def test_an_absent_object_is_an_answer(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    kubernetes.answers = [refused(404, "not found"), refused(404, "not found"), refused(400, "waiting to start")]
    assert await api.cluster("c") is None
    await api.delete_cluster("c")
    assert await api.log("p", 10) == ""
    kubernetes.answers = [refused(404, "not found")]
    with pytest.raises(ClusterError, match="no pod p in namespace ns; check TIDEPOOL_KUBERNETES_POD_NAME"):
        await api.pod("p")


async def test_a_deletion_does_not_wait_for_what_the_cluster_owns(
    kubernetes: KubernetesServer, api: KubernetesApi
) -> None:
    kubernetes.answers = [(200, {})]
    await api.delete_cluster("c")
    assert kubernetes.requests == [f"DELETE {DASK}/daskclusters/c?propagationPolicy=Background"]


async def test_warnings_are_those_of_the_cluster_newest_last(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    def event(name: str, reason: str, time: str) -> dict[str, Any]:
        return {"involvedObject": {"name": name}, "reason": reason, "message": "m", "lastTimestamp": time}

    events = [event("c-x", "B", "2"), event("c-x", "Unhealthy", "3"), event("other", "C", "3"), event("c-y", "A", "1")]
    kubernetes.answers = [(200, {"items": events})]
    assert await api.warnings("c") == ["A: m", "B: m"]
    newer = {**event("c-z", "D", "0"), "lastTimestamp": None, "eventTime": "1.5"}  # of the newer API of events
    kubernetes.answers = [(200, {"items": [newer, *events]})]
    assert await api.warnings("c") == ["A: m", "D: m", "B: m"]


async def test_a_refusal_by_the_operator_is_that_of_what_was_created_here(
    kubernetes: KubernetesServer, api: KubernetesApi
) -> None:
    def event(uid: str) -> dict[str, Any]:
        return {"involvedObject": {"uid": uid}, "message": f"about {uid}"}

    created = {**CLUSTER, "metadata": {**CLUSTER["metadata"], "uid": "ours"}}
    kubernetes.answers = [(201, created), (200, {"items": [event("predecessor")]})]
    await api.create(CLUSTER)
    assert await api.refusal() == ""
    kubernetes.answers = [(200, {"items": [event("predecessor"), event("ours")]})]
    assert await api.refusal() == "the Dask operator refused it: about ours"


async def test_a_log_is_its_last_lines(kubernetes: KubernetesServer, api: KubernetesApi) -> None:
    kubernetes.answers = [(200, "one\ntwo\n")]
    assert await api.log("p", 2) == "one\ntwo\n"
    assert kubernetes.requests == [f"GET {CORE}/pods/p/log?tailLines=2"]


async def test_without_credentials_the_message_names_both_kinds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(ClusterError, match="neither a pod's ServiceAccount nor a kubeconfig"):
        await KubernetesApi("").connect(60)
