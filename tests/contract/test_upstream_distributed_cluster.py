"""tidepool.upstream.distributed_cluster on a real scheduler: connecting to it, following it, leaving it."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import dask.config
import pytest
from distributed import Client, Scheduler, Worker
from distributed.core import Status
from distributed.security import Security

from tidepool.upstream.distributed_cluster import RemoteCluster, security_of

if TYPE_CHECKING:
    from collections.abc import Callable


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of another thread
            await asyncio.sleep(0.01)


def compute(cluster: RemoteCluster | str) -> int:
    with Client(cluster, set_as_default=False) as client:
        return int(client.submit(sum, [1, 2]).result(30))


def test_a_cluster_follows_a_scheduler_that_goes_on_without_it() -> None:
    async def scenario() -> None:
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0") as scheduler,
            Worker(scheduler.address, nthreads=1, dashboard=False),
        ):
            cluster = RemoteCluster("named")
            loop = cluster.loop
            await asyncio.wrap_future(cluster.start_soon(cluster.connect(scheduler.address)))
            assert (cluster.name, cluster.status) == ("named", Status.running)
            assert len(cluster.scheduler_info["workers"]) == 1
            assert await asyncio.to_thread(compute, cluster) == 3

            async with Worker(scheduler.address, nthreads=1, dashboard=False):
                await until(lambda: len(cluster.scheduler_info["workers"]) == 2)
            await until(lambda: len(cluster.scheduler_info["workers"]) == 1)

            await asyncio.wrap_future(cluster.start_soon(cluster.disconnect()))
            await asyncio.to_thread(cluster.stop_loop)
            assert cluster.status == Status.closed
            assert loop is not None
            assert not loop.asyncio_loop.is_running()
            assert scheduler.status == Status.running

    asyncio.run(scenario())


def test_a_client_takes_the_security_of_a_cluster_and_of_the_address_of_one() -> None:
    """`Client(cluster)` reads `cluster.security`; `Client(address)` asks what `client.security-loader` names."""
    security = Security.temporary()

    async def scenario() -> None:
        options = {"dashboard": False, "security": security}
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard_address=":0", protocol="tls", **options) as scheduler,
            Worker(scheduler.address, nthreads=1, **options),
        ):
            cluster = RemoteCluster("named")
            cluster.security = security
            await asyncio.wrap_future(cluster.start_soon(cluster.connect(scheduler.address)))
            assert cluster.scheduler_address == scheduler.address
            assert await asyncio.to_thread(compute, cluster) == 3
            assert await asyncio.to_thread(compute, scheduler.address) == 3
            assert security_of({"address": "tls://127.0.0.1:1"}) is None
            await asyncio.wrap_future(cluster.start_soon(cluster.disconnect()))
            await asyncio.to_thread(cluster.stop_loop)

    with dask.config.set({"distributed.client.security-loader": None}):
        asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore:Scheduler already contains a plugin with name worker-status")
def test_a_scheduler_reports_workers_only_to_the_cluster_that_connected_last() -> None:
    """Two runs start one shared cluster: the first one has to ask (`KubernetesCluster._first_worker`)."""

    async def scenario() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0") as scheduler:
            first, last = RemoteCluster("first"), RemoteCluster("last")
            for cluster in (first, last):
                await asyncio.wrap_future(cluster.start_soon(cluster.connect(scheduler.address)))
            async with Worker(scheduler.address, nthreads=1, dashboard=False):
                await until(lambda: bool(last.scheduler_info["workers"]))
                assert not first.scheduler_info["workers"], "both are told: _first_worker need not ask"
                asked: Any = first.scheduler_comm
                identity = await asyncio.wrap_future(first.start_soon(asked.identity()))
                assert len(identity["workers"]) == 1
            for cluster in (first, last):
                await asyncio.wrap_future(cluster.start_soon(cluster.disconnect()))
                await asyncio.to_thread(cluster.stop_loop)

    asyncio.run(scenario())


def test_a_coroutine_that_is_started_soon_does_not_wait_for_the_caller() -> None:
    cluster = RemoteCluster("named")
    begun, go_on = threading.Event(), threading.Event()

    async def work() -> str:
        begun.set()
        await asyncio.to_thread(go_on.wait, 30)
        return "done"

    future = cluster.start_soon(work())
    assert begun.wait(30)
    assert not future.done()
    go_on.set()
    assert future.result(30) == "done"
    cluster.start_soon(cluster.disconnect()).result(30)
    cluster.stop_loop()
