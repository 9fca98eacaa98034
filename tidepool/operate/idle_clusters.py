"""Deletion of Dask clusters that have been idle for longer than their `spec.idleTimeout` (seconds; 0: never).

And of shared ones that have existed for longer than a setting: no run's end deletes them, and a scheduler, which runs
what flows give it, can report that it is busy forever. It runs in the Dask operator, one loop for all clusters of all
namespaces.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import kr8s
import kr8s.asyncio
from kr8s.asyncio.objects import new_class

from tidepool.compute.clusters.kubernetes.names import GROUP, LABEL_SHARED, scheduler_url
from tidepool.operate.schedulers import client, idle_since
from tidepool.operate.sweep.loop import DeletionError, Problems
from tidepool.settings import settings

_POLL_SECONDS = 5.0
_REQUEST_SECONDS = 10

if TYPE_CHECKING:
    from collections.abc import Sequence

    import httpx

DaskCluster = new_class("DaskCluster", GROUP)
_log = logging.getLogger(__name__)


async def watch(namespaces: Sequence[str]) -> None:
    """Check all clusters of the namespaces every five seconds, until cancelled."""
    problems, api = Problems(), None
    async with client() as http:

        async def check(api: kr8s.asyncio.Api, namespace: str) -> None:
            with problems.of(f"idle clusters of namespace {namespace}"):
                await delete_idle(api, http, namespace)

        while True:
            with problems.of("idle clusters"):
                if api is None:
                    api = await kr8s.asyncio.api()
                    api.timeout = _REQUEST_SECONDS
                await asyncio.gather(*(check(api, each) for each in namespaces))
            await asyncio.sleep(_POLL_SECONDS)


async def delete_idle(api: kr8s.asyncio.Api, http: httpx.AsyncClient, namespace: str) -> None:
    """Delete the clusters of a namespace whose idle timeout has passed, and shared ones that are too old.

    Raises:
        DeletionError: after all deletions: some were refused.
    """
    refused: list[str] = []
    clusters: list[Any] = [each async for each in DaskCluster.list(api=api, namespace=namespace)]
    clusters = [each for each in clusters if "deletionTimestamp" not in each.metadata]
    old = [each for each in clusters if _too_old(each)]
    for cluster in old:
        text = "shared DaskCluster %s is older than TIDEPOOL_OPERATOR_SHARED_CLUSTER_SECONDS: deleted"
        _log.info(text, cluster.name)
        await _delete(cluster, refused)
    limited = [each for each in clusters if each.spec.get("idleTimeout") and each not in old]
    since = await asyncio.gather(*(idle_since(http, scheduler_url(each.name, each.namespace)) for each in limited))
    for cluster, began in zip(limited, since, strict=True):
        if began is None or time.time() <= began + cluster.spec.idleTimeout:
            continue
        _log.info("DaskCluster %s has been idle for %.0f s: deleted", cluster.name, time.time() - began)
        await _delete(cluster, refused)
    if refused:
        raise DeletionError(f"{len(refused)} not deleted: {refused[0]}")


def _too_old(cluster: Any) -> bool:
    if LABEL_SHARED not in cluster.metadata.get("labels", {}):
        return False
    created = datetime.fromisoformat(cluster.metadata["creationTimestamp"])
    return (datetime.now(UTC) - created).total_seconds() > settings().operator.shared_cluster_seconds


async def _delete(cluster: Any, refused: list[str]) -> None:
    try:
        with suppress(kr8s.NotFoundError):  # its run has ended just now
            await cluster.delete(propagation_policy="Background")
    except kr8s.ServerError as error:
        refused.append(f"Kubernetes refused to delete DaskCluster {cluster.name}: {error}")
