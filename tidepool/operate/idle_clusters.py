"""Removes Dask clusters that have been idle for longer than their `spec.idleTimeout` (seconds; 0: never).

It runs in the Dask operator, one loop for all clusters of the namespace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import aiohttp
import httpx
import kr8s
from dask_kubernetes.operator._objects import DaskCluster

_LOOK_SECONDS = 5.0
# Packets to a scheduler that is gone are lost, not refused.
_ANSWER = aiohttp.ClientTimeout(total=4.0)
_HTTP_PORT = 8787

_log = logging.getLogger(__name__)


async def watch(namespace: str) -> None:
    """Looks at all clusters of the namespace, every five seconds, until it is cancelled."""
    said = ""
    async with aiohttp.ClientSession(timeout=_ANSWER) as session:
        while True:
            problem = ""
            try:
                await _remove(session, namespace)
            except (kr8s.ServerError, kr8s.APITimeoutError, kr8s.ConnectionClosedError, httpx.TransportError) as error:
                problem = str(error) or type(error).__name__
            if problem != said:
                _log.warning("idle clusters: %s", problem or "looked at again")
            said = problem
            await asyncio.sleep(_LOOK_SECONDS)


async def _remove(session: aiohttp.ClientSession, namespace: str) -> None:
    """Removes those that are idle for too long."""
    found = [each async for each in DaskCluster.list(namespace=namespace)]
    limited = [each for each in found if each.spec.get("idleTimeout") and "deletionTimestamp" not in each.metadata]
    since = await asyncio.gather(*(_idle_since(session, _url(each)) for each in limited))
    for cluster, began in zip(limited, since, strict=True):
        if began is None or time.time() <= began + cluster.spec.idleTimeout:
            continue
        _log.info("DaskCluster %s is idle since %.0f s: removed", cluster.name, time.time() - began)
        with suppress(kr8s.NotFoundError):  # its run has ended just now
            await cluster.delete(propagation_policy="Background")


def _url(cluster: DaskCluster) -> str:
    return f"http://{cluster.name}-scheduler.{cluster.namespace}:{_HTTP_PORT}"


async def _idle_since(session: aiohttp.ClientSession, url: str) -> float | None:
    """Since when a scheduler has had nothing to do (seconds of the epoch); None when it is busy or does not answer."""
    try:
        async with session.get(f"{url}/api/v1/check_idle") as answer:
            answer.raise_for_status()
            idle_since = (await answer.json())["idle_since"]
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None  # it starts or ends, and answers nothing or half
    return float(idle_since) if idle_since else None
