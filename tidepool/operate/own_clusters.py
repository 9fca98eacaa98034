"""Deletion of the Dask clusters that a driver pod left when the process of its flow run died.

A process that ends in order has closed them. One that was killed has not: they would stay until the operator or
Kubernetes' garbage collection finds them.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import kr8s
import kr8s.asyncio
from kr8s.asyncio.objects import new_class

from tidepool.compute.clusters.kubernetes.names import ANNOTATION_DRIVER, GROUP, LABEL_RUN

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

    from tidepool.settings import KubernetesSettings

# All of it: Prefect reports the crash afterwards.
_SECONDS = 20.0
_REQUEST_SECONDS = 5
_RETRY_SECONDS = 0.5

DaskCluster = new_class("DaskCluster", GROUP)


async def delete(run_id: str, settings: KubernetesSettings, log: Logger | LoggerAdapter[Any]) -> None:
    """Delete the clusters that this pod created for a flow run; log what was deleted, or why it was not possible.

    Clusters of the run's other attempts name other pods; shared ones belong to no run.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            deleted = await _delete_when_answered(run_id, settings)
    except Exception as error:  # noqa: BLE001 - whatever it is: Prefect must report the crash
        reason = f"no answer within {_SECONDS:g} s" if isinstance(error, TimeoutError) else error
        text = "Dask clusters of this run not deleted (%s); the operator deletes them, or Kubernetes with the Job"
        log.error(text, reason)  # noqa: TRY400 - in words
        return
    for name in deleted:
        log.warning("Dask cluster %s deleted: the process of its flow run ended without closing it", name)


async def _delete_when_answered(run_id: str, settings: KubernetesSettings) -> list[str]:
    while True:
        try:
            return await _delete(run_id, settings)
        except (kr8s.APITimeoutError, kr8s.ConnectionClosedError, httpx.TransportError):
            pass
        except kr8s.ServerError as error:
            if error.response is not None and error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
        await asyncio.sleep(_RETRY_SECONDS)


async def _delete(run_id: str, settings: KubernetesSettings) -> list[str]:
    api = await kr8s.asyncio.api()
    api.timeout = _REQUEST_SECONDS
    selector = f"{LABEL_RUN}={run_id}"
    found: list[Any] = [
        each async for each in DaskCluster.list(api=api, namespace=settings.namespace, label_selector=selector)
    ]
    clusters = [
        each
        for each in found
        if each.annotations.get(ANNOTATION_DRIVER) == settings.pod_name and "deletionTimestamp" not in each.metadata
    ]
    for cluster in clusters:
        with suppress(kr8s.NotFoundError):  # the operator was faster
            await cluster.delete(propagation_policy="Background")
    return [cluster.name for cluster in clusters]
