"""tidepool's preloads of a Dask scheduler and its workers, on a real scheduler and a real worker in this process."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import dask.config
import distributed
import httpx
from distributed.versions import get_versions

from tidepool.compute.clusters.kubernetes import manifest
from tidepool.compute.clusters.kubernetes.driver import PACKAGES, in_one_line
from tidepool.compute.clusters.preload.scheduler import USAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Any, str]]:
    """A scheduler as the cluster's pods run it, with one worker; with the URL of its HTTP server."""
    with dask.config.set({"distributed.scheduler.http.routes": list(manifest.HTTP_ROUTES)}):
        async with (
            distributed.Scheduler(
                host="127.0.0.1",
                port=0,
                dashboard=False,
                dashboard_address="127.0.0.1:0",
                preload=["tidepool.compute.clusters.preload.scheduler"],
            ) as scheduler,
            distributed.Worker(
                scheduler.address, nthreads=1, dashboard=False, preload=["tidepool.compute.clusters.preload.worker"]
            ) as worker,
        ):
            await worker.heartbeat()
            yield scheduler, f"http://127.0.0.1:{scheduler.http_server.port}"


async def answer(url: str) -> Any:
    async with httpx.AsyncClient() as http:
        return (await http.get(url)).json()


def test_a_cluster_is_idle_only_without_tasks_and_without_a_client() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, url):
            check = f"{url}/api/v1/check_idle"
            # The first answer after a change is busy, as upstream's is.
            await answer(check)
            assert (await answer(check))["idle_since"] > 0
            async with distributed.Client(scheduler.address, asynchronous=True):
                assert await answer(check) == {"idle_since": 0.0}, (
                    "a driver that computes itself still needs its cluster"
                )

    asyncio.run(scenario())


def test_the_target_is_never_below_the_busy_workers_which_are_not_closed() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, url), distributed.Client(scheduler.address, asynchronous=True) as client:
            assert len(scheduler.workers_to_close(n=1)) == 1
            gate = distributed.Event("gate", client=client)
            waiting = client.submit(lambda: distributed.Event("gate").wait(timeout=60))
            while not any(worker.processing for worker in scheduler.workers.values()):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
            assert scheduler.workers_to_close(n=1) == []
            assert (await answer(f"{url}/api/v1/adaptive_target"))["workers"] >= 1
            await gate.set()
            await waiting

    asyncio.run(scenario())


def test_scheduler_and_workers_return_usage_and_versions() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, _), distributed.Client(scheduler.address, asynchronous=True) as client:
            await client.submit(sum, [1, 2])
            async with distributed.rpc(scheduler.address) as remote:
                [worker] = (await getattr(remote, USAGE)())["workers"]
                assert worker["memory_peak"] > 0
                assert worker["cpu_seconds"] > 0
                told = await remote.broadcast(msg={"op": "versions", "packages": PACKAGES})
                told["scheduler"] = await remote.versions(packages=PACKAGES)
                assert len(told) == 2
                assert {in_one_line(each) for each in told.values()} == {in_one_line(get_versions(PACKAGES))}

    asyncio.run(scenario())


def test_the_dashboard_loads_with_its_first_visitor() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, url), httpx.AsyncClient(follow_redirects=True) as http:
            assert len(scheduler.http_application.applications) == 1
            page = await http.get(f"{url}/status", timeout=60)
            assert page.status_code == httpx.codes.OK
            assert "bokeh" in page.text
            assert (await http.get(f"{url}/health")).text == "ok"

    asyncio.run(scenario())
