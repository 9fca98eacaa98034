"""Questions to Dask schedulers, which run a flow's code: answers are bounded in time and size, and not trusted."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import httpx
from kr8s.asyncio.objects import Deployment

from tidepool.compute.clusters.kubernetes.names import HTTP_PORT
from tidepool.upstream.dask_kubernetes import SchedulerCommError

if TYPE_CHECKING:
    import logging

# From the request to the last byte. Packets to a scheduler that is gone are lost, not refused.
_SECONDS = 4.0
# The state of a hundred retired workers is half of that.
_BYTES = 1 << 20


async def ask(http: httpx.AsyncClient, method: str, url: str, **options: Any) -> Any:
    """Return a scheduler's JSON answer; None if it does not answer, or not as it should."""
    body = bytearray()
    try:
        async with (
            asyncio.timeout(_SECONDS),
            http.stream(method, url, headers={"Accept-Encoding": "identity"}, **options) as response,
        ):
            response.raise_for_status()
            if "content-encoding" in response.headers:  # a few bytes could become gigabytes
                return None
            async for part in response.aiter_bytes():
                body += part
                if len(body) > _BYTES:
                    return None
        return json.loads(body)
    except (httpx.HTTPError, TimeoutError, ValueError, RecursionError):
        return None


def client() -> httpx.AsyncClient:
    """Return a client for `ask`: not by the proxy of the environment, which cannot reach a Service."""
    return httpx.AsyncClient(timeout=_SECONDS, trust_env=False)


async def idle_since(http: httpx.AsyncClient, url: str) -> float | None:
    """Return since when the scheduler at a URL has been idle (seconds of the epoch); None when busy or not known."""
    answer = await ask(http, "GET", f"{url}/api/v1/check_idle")
    since = answer.get("idle_since") if isinstance(answer, dict) else None
    return since if isinstance(since, float) and math.isfinite(since) and since > 0 else None


async def desired_workers(scheduler_service_name: str, namespace: str | None) -> int:
    """Return how many workers an adaptive cluster's scheduler wants, as the controller's own function does.

    Raises:
        SchedulerCommError: it does not answer with a number.
    """
    async with client() as http:
        answer = await ask(http, "GET", f"{_url(scheduler_service_name, namespace)}/api/v1/adaptive_target")
    workers = answer.get("workers") if isinstance(answer, dict) else None
    if type(workers) is not int:
        raise SchedulerCommError("the scheduler does not say how many workers it wants")
    return workers


async def retire_workers(
    n_workers: int,
    scheduler_service_name: str,
    worker_group_name: str,
    namespace: str | None,
    logger: logging.Logger,
) -> list[str]:
    """Return the Deployments to delete of a worker group that shrinks, as the controller's own function does.

    The scheduler chooses, among the group's own: the controller deletes whatever is named here.
    """
    selector = {"dask.org/workergroup-name": worker_group_name}
    found: list[Any] = [each async for each in Deployment.list(namespace=namespace, label_selector=selector)]
    own = [each.name for each in found]
    async with client() as http:
        url = f"{_url(scheduler_service_name, namespace)}/api/v1/retire_workers"
        answer = await ask(http, "POST", url, json={"n": n_workers})
    if not isinstance(answer, dict):
        logger.warning("the scheduler does not say which workers of %s may go: the last ones", worker_group_name)
        return own[-n_workers:]
    chosen = [each.get("name") for each in answer.values() if isinstance(each, dict)]
    return [each for each in own if each in chosen][:n_workers]


def _url(service: str, namespace: str | None) -> str:
    return f"http://{service}.{namespace}:{HTTP_PORT}"
