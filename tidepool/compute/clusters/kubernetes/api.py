"""The few requests to the Kubernetes API that a Dask cluster needs; kr8s finds and renews the credentials."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx
import kr8s

from tidepool.compute.clusters.kubernetes.manifest import GROUP
from tidepool.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping

# One request. The API of a healthy cluster answers in milliseconds.
TIMEOUT_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_PLURAL = {"DaskCluster": "daskclusters", "DaskWorkerGroup": "daskworkergroups", "DaskAutoscaler": "daskautoscalers"}


class Unavailable(Exception):  # noqa: N818 - a state of the API, not of the request
    """The API did not answer, or not for a reason that lies in the request: try again."""


class KubernetesApi:
    """Requests in one namespace. Use it on one event loop only.

    Args:
        connection: An authenticated kr8s connection.
        namespace: The namespace.
    """

    def __init__(self, connection: kr8s.asyncio.Api, namespace: str) -> None:
        self._connection = connection
        self.namespace = namespace
        self._give_up = 0.0

    @classmethod
    async def connect(cls, namespace: str, patience: float) -> KubernetesApi:
        """Finds the credentials and tries them.

        Args:
            namespace: The namespace; empty for the pod's own or the kubeconfig's.
            patience: As of `be_patient`.

        Raises:
            ClusterError: there are no credentials.
            Unavailable: the API did not answer.
        """
        import kr8s.asyncio

        give_up = monotonic() + patience
        while True:
            try:
                connection = await kr8s.asyncio.api()
            except ValueError as error:
                raise ClusterError(
                    "no Kubernetes credentials: neither a pod's ServiceAccount nor a kubeconfig"
                ) from error
            except (httpx.TransportError, kr8s.APITimeoutError, kr8s.ServerError) as error:
                if monotonic() > give_up:
                    raise Unavailable(str(error) or type(error).__name__) from error
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            api = cls(connection, namespace or connection.namespace)
            api.be_patient(patience)
            return api

    def be_patient(self, seconds: float) -> None:
        """From now on for so many seconds, requests that get no answer are made again."""
        self._give_up = monotonic() + seconds

    async def close(self) -> None:
        """Ends the connections."""
        session = self._connection._session  # noqa: SLF001 - kr8s has no public way to end them
        if session is not None:
            await session.aclose()

    async def create(self, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        """Creates an object.

        Returns:
            The object, or None when one of that name exists already.
        """
        url = _PLURAL[manifest["kind"]]
        status, body = await self._request("POST", url, version=GROUP, content=json.dumps(manifest))
        return None if status == HTTPStatus.CONFLICT else json.loads(body)

    async def cluster(self, name: str) -> dict[str, Any] | None:
        """The DaskCluster of that name, or None."""
        status, body = await self._request("GET", f"daskclusters/{name}", version=GROUP)
        return None if status == HTTPStatus.NOT_FOUND else json.loads(body)

    async def delete_cluster(self, name: str) -> None:
        """Asks for the removal of a DaskCluster and what it owns, and does not wait for it."""
        await self._request("DELETE", f"daskclusters/{name}", version=GROUP, params={"propagationPolicy": "Background"})

    async def pod(self, name: str) -> dict[str, Any]:
        """The pod of that name.

        Raises:
            ClusterError: there is none.
        """
        status, body = await self._request("GET", f"pods/{name}")
        if status == HTTPStatus.NOT_FOUND:
            raise ClusterError(f"no pod {name} in namespace {self.namespace}; check TIDEPOOL_KUBERNETES_POD_NAME")
        found: dict[str, Any] = json.loads(body)
        return found

    async def pods(self, cluster: str) -> list[dict[str, Any]]:
        """The pods of a Dask cluster."""
        selector = {"labelSelector": f"dask.org/cluster-name={cluster}"}
        items: list[dict[str, Any]] = json.loads((await self._request("GET", "pods", params=selector))[1])["items"]
        return items

    async def warnings(self, cluster: str) -> list[str]:
        """What Kubernetes complained about of a cluster's objects, newest last."""
        selector = {"fieldSelector": "type=Warning"}
        items = json.loads((await self._request("GET", "events", params=selector))[1])["items"]
        # A pod that is starting is Unhealthy for its probe until it has started: no reason for anything.
        about = [
            each
            for each in items
            if each["involvedObject"].get("name", "").startswith(cluster) and each["reason"] != "Unhealthy"
        ]
        about.sort(key=lambda each: each.get("lastTimestamp") or each.get("eventTime") or "")
        return [f"{each['reason']}: {each['message']}" for each in about]

    async def log(self, pod: str, lines: int) -> str:
        """The last lines that a pod printed; empty when it printed none or is gone."""
        status, body = await self._request("GET", f"pods/{pod}/log", params={"tailLines": str(lines)})
        return body if status == HTTPStatus.OK else ""

    async def _request(self, method: str, url: str, version: str = "v1", **options: Any) -> tuple[int, str]:
        """One request, made again while patience lasts.

        Raises:
            Unavailable: no answer, or the server's own failure.
            ClusterError: refused, with the API's own sentence.
        """
        while True:
            try:
                return await self._try(method, url, version, **options)
            except Unavailable:
                if monotonic() > self._give_up:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)

    async def _try(self, method: str, url: str, version: str, **options: Any) -> tuple[int, str]:
        """One request; 404 and 409 are answers, and 400 to a GET (the log of a container that does not run)."""
        try:
            async with self._connection.call_api(
                method, version=version, namespace=self.namespace, url=url, timeout=TIMEOUT_SECONDS, **options
            ) as response:
                return response.status_code, response.text
        except kr8s.ServerError as error:
            status = error.response.status_code if error.response is not None else HTTPStatus.SERVICE_UNAVAILABLE
            if status in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT} or (method, status) == (
                "GET",
                HTTPStatus.BAD_REQUEST,
            ):
                return status, ""
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS:
                raise Unavailable(str(error)) from error
            raise ClusterError(f"Kubernetes refused {method} {url} in namespace {self.namespace}: {error}") from error
        except (httpx.TransportError, kr8s.APITimeoutError) as error:
            raise Unavailable(str(error) or type(error).__name__) from error
