"""The requests to the Kubernetes API that a Dask cluster needs; kr8s finds and renews the credentials.

By kr8s' `call_api` and not by its objects: they hide the statuses that are answers here (404, 409), and take more code.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx
import kr8s
import kr8s.asyncio

from tidepool.compute.clusters.kubernetes.names import GROUP, REFUSED
from tidepool.errors import ClusterError
from tidepool.upstream import kr8s as upstream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

# One request. The API of a healthy cluster answers in milliseconds.
TIMEOUT_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_ABSENT = (HTTPStatus.NOT_FOUND,)


class KubernetesApi:
    """Requests in one namespace; an empty one becomes the pod's own or the kubeconfig's. Of one event loop only.

    Attributes:
        unsure: Whether the last request was made again because its first answer was lost: it may have created what the
            second one found.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._connection: kr8s.asyncio.Api | None = None
        self._give_up = 0.0
        self._created: set[str] = set()
        self.unsure = False

    async def connect(self, seconds: float) -> None:
        """Find the credentials and try them, with `retry_for` so many seconds.

        Raises:
            ClusterError: there are no credentials, they are refused or not readable, or the API does not answer.
        """
        self.retry_for(seconds)
        try:
            self._connection = await self._retry("GET version", lambda: asyncio.wait_for(upstream.connect(), seconds))
        except ValueError as error:
            raise ClusterError(str(error)) from error
        self.namespace = self.namespace or self._connection.namespace

    def retry_for(self, seconds: float) -> None:
        """Retry requests that get no answer, for so many seconds from now."""
        self._give_up = monotonic() + seconds

    async def close(self) -> None:
        """Close the connections."""
        if self._connection is not None:
            await upstream.close_connection(self._connection)

    async def create(self, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        """Create an object and return it; None when one of that name exists already."""
        url, version = f"{manifest['kind'].lower()}s", manifest["apiVersion"]
        created = await self._object("POST", url, version, (HTTPStatus.CONFLICT,), content=json.dumps(manifest))
        if created:
            self._created.add(created["metadata"].get("uid", ""))
        return created

    async def cluster(self, name: str) -> dict[str, Any] | None:
        """Return the DaskCluster of that name, or None."""
        return await self._object("GET", f"daskclusters/{name}", GROUP, _ABSENT)

    async def delete_cluster(self, name: str) -> None:
        """Ask for the deletion of a DaskCluster and what it owns, without waiting for it."""
        options = {"propagationPolicy": "Background"}
        await self._request("DELETE", f"daskclusters/{name}", GROUP, _ABSENT, params=options)

    async def pod(self, name: str) -> dict[str, Any]:
        """Return the pod of that name.

        Raises:
            ClusterError: it does not exist.
        """
        pod = await self._object("GET", f"pods/{name}", absent=_ABSENT)
        if pod is None:
            raise ClusterError(f"no pod {name} in namespace {self.namespace}; check TIDEPOOL_KUBERNETES_POD_NAME")
        return pod

    async def pods(self, cluster: str) -> list[dict[str, Any]]:
        """Return the pods of a Dask cluster."""
        return await self._list("pods", labelSelector=f"dask.org/cluster-name={cluster}")

    async def warnings(self, cluster: str) -> list[str]:
        """Return the Warning events of a cluster's objects, newest last."""
        events = await self._list("events", fieldSelector="type=Warning")
        events.sort(key=lambda each: each.get("lastTimestamp") or each.get("eventTime") or "")
        return [
            f"{each['reason']}: {each['message']}"
            for each in events
            # A pod that is starting is Unhealthy for its probe until it has started: not a reason for anything.
            if each["involvedObject"].get("name", "").startswith(cluster) and each["reason"] != "Unhealthy"
        ]

    async def refusal(self) -> str:
        """Return why the operator refused an object that was created here; empty when it refused none."""
        events = await self._list("events", fieldSelector=f"type=Warning,reason={REFUSED}")
        # By uid: a shared cluster may have had a predecessor of the same name.
        ours = (each["message"] for each in events if each["involvedObject"].get("uid") in self._created)
        return next((f"the Dask operator refused it: {message}" for message in ours), "")

    async def log(self, pod: str, lines: int) -> str:
        """Return the last lines that a pod printed; empty when its container does not run (400) or is gone."""
        absent = (HTTPStatus.NOT_FOUND, HTTPStatus.BAD_REQUEST)
        return await self._request("GET", f"pods/{pod}/log", absent=absent, params={"tailLines": str(lines)}) or ""

    async def _object(self, *request: Any, **options: Any) -> dict[str, Any] | None:
        body = await self._request(*request, **options)
        return None if body is None else dict(json.loads(body))

    async def _list(self, url: str, **selector: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(await self._request("GET", url, params=selector))["items"]
        return items

    async def _request(
        self, method: str, url: str, version: str = "v1", absent: tuple[HTTPStatus, ...] = (), **options: Any
    ) -> Any:
        """Return the body of the answer as text; None for a status in `absent`."""

        async def request() -> str:
            if self._connection is None:
                raise RuntimeError("not connected to the Kubernetes API")
            async with self._connection.call_api(
                method, version=version, namespace=self.namespace, url=url, timeout=TIMEOUT_SECONDS, **options
            ) as response:
                return response.text

        return await self._retry(f"{method} {url}", request, absent)

    async def _retry(
        self, what: str, request: Callable[[], Awaitable[Any]], absent: tuple[HTTPStatus, ...] = ()
    ) -> Any:
        """Make a request, again while it gets no answer and `retry_for` lasts.

        Raises:
            ClusterError: refused, with the API's own sentence; or no answer, or the API's own failure.
        """
        self.unsure = False
        while True:
            try:
                return await request()
            except (httpx.TransportError, kr8s.APITimeoutError, kr8s.ServerError, TimeoutError) as error:
                response = error.response if isinstance(error, kr8s.ServerError) else None
                status = HTTPStatus.SERVICE_UNAVAILABLE if response is None else response.status_code
                if status in absent:
                    return None
                if status < HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.TOO_MANY_REQUESTS:
                    where = f"{what} in namespace {self.namespace}"
                    raise ClusterError(f"Kubernetes refused {where}: {error}") from error
                if monotonic() > self._give_up:
                    reason = str(error) or type(error).__name__
                    raise ClusterError(f"no answer from the Kubernetes API to {what}: {reason}") from error
            self.unsure = True
            await asyncio.sleep(_RETRY_SECONDS)
