"""Removes Dask clusters that have been idle for longer than their `spec.idleTimeout` (seconds; 0: never).

It runs in the Dask operator, one loop for all clusters of the namespace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import aiohttp
import httpx
import kr8s
import kr8s.asyncio
from dask_kubernetes.operator._objects import DaskCluster

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOK_SECONDS = 5.0
# Packets to a scheduler that is gone are lost, not refused.
_ANSWER = aiohttp.ClientTimeout(total=4.0)
_HTTP_PORT = 8787

_log = logging.getLogger(__name__)


async def watch() -> None:
    """Looks at all clusters, every five seconds, until it is cancelled."""
    async with aiohttp.ClientSession(timeout=_ANSWER) as session:
        while True:
            try:
                await remove(session, scheduler_url)
            except (kr8s.ServerError, kr8s.APITimeoutError, kr8s.ConnectionClosedError, httpx.TransportError) as error:
                _log.warning("idle clusters were not looked at: %s", error or type(error).__name__)
            await asyncio.sleep(_LOOK_SECONDS)


async def remove(session: aiohttp.ClientSession, url_of: Callable[[DaskCluster], str]) -> list[str]:
    """Removes the clusters of the namespace that are idle for too long.

    Args:
        session: Asks the schedulers.
        url_of: Where a cluster's scheduler answers HTTP.

    Returns:
        Their names.
    """
    api = await kr8s.asyncio.api()
    found = [each async for each in DaskCluster.list(namespace=api.namespace)]
    limited = [each for each in found if each.spec.get("idleTimeout") and "deletionTimestamp" not in each.metadata]
    since = await asyncio.gather(*(_idle_since(session, url_of(each)) for each in limited))
    removed = []
    for cluster, began in zip(limited, since, strict=True):
        if began is None or time.time() <= began + cluster.spec.idleTimeout:
            continue
        _log.info("DaskCluster %s is idle since %.0f s: removed", cluster.name, time.time() - began)
        try:
            await cluster.delete(propagation_policy="Background")
        except kr8s.NotFoundError:
            continue  # its run has ended just now
        removed.append(cluster.name)
    return removed


def scheduler_url(cluster: DaskCluster) -> str:
    """Where the HTTP server of a cluster's scheduler is."""
    return f"http://{cluster.name}-scheduler.{cluster.namespace}:{_HTTP_PORT}"


async def _idle_since(session: aiohttp.ClientSession, url: str) -> float | None:
    """Since when a scheduler has had nothing to do (seconds of the epoch); None when it is busy or does not answer."""
    try:
        async with session.get(f"{url}/api/v1/check_idle") as answer:
            answer.raise_for_status()
            idle_since = (await answer.json())["idle_since"]
    except (aiohttp.ClientError, TimeoutError):
        return None  # it starts or ends
    return float(idle_since) if idle_since else None
