"""The operator's loop over idle Dask clusters."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
import kr8s.asyncio
import pytest

from tidepool.compute.clusters.kubernetes.names import LABEL_SHARED
from tidepool.operate import idle_clusters
from tidepool.operate.sweep import loop
from tidepool.settings import settings

if TYPE_CHECKING:
    from tests.conftest import KubernetesServer

DASK = "/apis/kubernetes.dask.org/v1/namespaces/ns/daskclusters"


def cluster(name: str, timeout: int, **metadata: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "ns", **metadata}, "spec": {"idleTimeout": timeout}}


def schedulers(request: httpx.Request) -> httpx.Response:
    name, since = request.url.host.removesuffix("-scheduler.ns"), time.time()
    assert (request.url.port, request.url.path) == (8787, "/api/v1/check_idle")
    match name:
        case "starting":
            raise httpx.ConnectError("refused")
        case "ending":
            return httpx.Response(200, text="half an ans")
        case "broken":
            return httpx.Response(500)
        case "busy":
            return httpx.Response(200, json={"idle_since": 0.0})
        case _:
            return httpx.Response(200, json={"idle_since": since - 70})


def test_only_clusters_that_are_idle_for_longer_than_their_timeout_are_deleted(kubernetes: KubernetesServer) -> None:
    names = ("starting", "ending", "broken", "busy", "short")
    listed = [cluster(name, 60) for name in names]
    listed += [cluster("long", 600), cluster("never", 0), cluster("deleted", 60, deletionTimestamp="now")]
    kubernetes.answers = [(200, {"items": listed}), (200, {})]

    async def check() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(schedulers)) as http:
            await idle_clusters.delete_idle(await kr8s.asyncio.api(), http, "ns")

    asyncio.run(check())
    assert kubernetes.requests[1:] == [f'DELETE {DASK}/short {{"propagationPolicy": "Background"}}']


def test_a_shared_cluster_is_deleted_at_its_age_whatever_its_scheduler_reports(
    kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's code can let its scheduler report that it is never idle; no run's end deletes a shared cluster."""
    monkeypatch.setenv("TIDEPOOL_OPERATOR_SHARED_CLUSTER_SECONDS", "3600")
    settings.cache_clear()

    def born(seconds: int, **labels: str) -> dict[str, Any]:
        when = (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        made = cluster("busy", 60, creationTimestamp=when)
        made["metadata"] |= {"name": "-".join(("busy", str(seconds), *labels.values())), "labels": labels}
        return made

    listed = [born(4000), born(3000, **{LABEL_SHARED: "warm"}), born(4000, **{LABEL_SHARED: "warm"})]
    kubernetes.answers = [(200, {"items": listed}), (200, {})]

    def busy(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"idle_since": 0.0})

    async def check() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(busy)) as http:
            await idle_clusters.delete_idle(await kr8s.asyncio.api(), http, "ns")

    asyncio.run(check())
    settings.cache_clear()
    assert kubernetes.requests[1:] == [f'DELETE {DASK}/busy-4000-warm {{"propagationPolicy": "Background"}}']


def test_a_cluster_that_is_deleted_meanwhile_is_not_an_error(kubernetes: KubernetesServer) -> None:
    kubernetes.answers = [(200, {"items": [cluster("short", 60)]}), (404, {"message": "not found"})]

    async def check() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(schedulers)) as http:
            await idle_clusters.delete_idle(await kr8s.asyncio.api(), http, "ns")

    asyncio.run(check())
    assert len(kubernetes.requests) == 2


def test_the_loop_outlives_an_unavailable_api_and_logs_it_once(
    kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(idle_clusters, "_POLL_SECONDS", 0.001)
    kubernetes.answers = [(503, {}), (503, {}), *[(200, {"items": []})] * 3, (kubernetes.NO_ANSWER, {})]

    async def check() -> None:
        watch = asyncio.create_task(idle_clusters.watch(["ns"]))
        async with asyncio.timeout(60):
            while len(kubernetes.requests) < 6:  # noqa: ASYNC110 - the server is another thread
                await asyncio.sleep(0.001)
        assert not watch.done()
        watch.cancel()

    asyncio.run(check())
    logged = [each.getMessage() for each in caplog.records if each.name == loop.__name__]
    assert "503" in logged[0]
    assert logged.count("idle clusters of namespace ns: works again") == 1


def test_a_connection_that_another_loop_has_replaced_ends_neither_watch_nor_operator(
    kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """kr8s opens another session at each 401 and 403, also of another loop; a request of the old one then fails."""
    monkeypatch.setattr(idle_clusters, "_POLL_SECONDS", 0.001)
    kubernetes.answers = lambda _: (200, {"items": []})

    async def check() -> None:
        api = await kr8s.asyncio.api()
        await api._create_session()
        assert api._session is not None
        replaced, sent = api._session, api._session.request

        async def request(**options: Any) -> httpx.Response:
            await api._create_session()  # as another loop does while this one waits
            return await sent(**options)

        monkeypatch.setattr(replaced, "request", request)
        watch = asyncio.create_task(idle_clusters.watch(["ns"]))
        async with asyncio.timeout(60):
            while not kubernetes.requests and not watch.done():  # noqa: ASYNC110 - the server is another thread
                await asyncio.sleep(0.001)
        assert not watch.done()
        watch.cancel()

    asyncio.run(check())
    assert "RuntimeError: Cannot send a request, as the client has been closed." in caplog.text


def test_a_cluster_that_may_not_be_deleted_keeps_no_other(kubernetes: KubernetesServer) -> None:
    def answer(request: str) -> tuple[int, Any]:
        if request.startswith(f"DELETE {DASK}/refused"):
            return 422, {"message": "a webhook refuses it"}
        return 200, {"items": [cluster("refused", 60), cluster("short", 60)]}

    kubernetes.answers = answer

    async def check() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(schedulers)) as http:
            await idle_clusters.delete_idle(await kr8s.asyncio.api(), http, "ns")

    with pytest.raises(loop.DeletionError, match=r"1 not deleted: .* DaskCluster refused: a web"):
        asyncio.run(check())
    assert any(each.startswith(f"DELETE {DASK}/short") for each in kubernetes.requests)
