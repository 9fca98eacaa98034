"""Everything that is read of one namespace of flow runs before anything in it is changed."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import kr8s
import kr8s.asyncio

from tidepool.compute.clusters.kubernetes.names import ANNOTATION_DRIVER, GROUP, LABEL_CLUSTER, LABEL_SHARED, OURS
from tidepool.errors import TidepoolError
from tidepool.settings import settings
from tidepool.upstream import kr8s as upstream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Object = dict[str, Any]

# One request. The API of a healthy cluster answers in milliseconds.
REQUEST_SECONDS = 10.0
# RuntimeError: another user of the connection has just replaced it, with a new token.
NO_ANSWER = (httpx.HTTPError, kr8s.APITimeoutError, kr8s.ConnectionClosedError, OSError, RuntimeError)
_OURS = ",".join(f"{name}={value}" for name, value in OURS.items())
DRIVERS = "app.kubernetes.io/component=flow-run"
# A pod that starts is Unhealthy for its probe.
_WARNINGS = "type=Warning,reason!=Unhealthy"
# Kind, API version and path of what belongs to a cluster, and the labels without which it is not read.
PARTS = {
    "DaskWorkerGroup": (GROUP, "daskworkergroups", _OURS),
    "DaskAutoscaler": (GROUP, "daskautoscalers", _OURS),
    "Deployment": ("apps/v1", "deployments", f"{_OURS},{LABEL_CLUSTER}"),
    "Service": ("v1", "services", f"{_OURS},{LABEL_CLUSTER}"),
}
_NAME = re.compile(r"[a-z0-9][-.a-z0-9]{0,252}")
# A name that is also the value of a label; another one in a selector fails the whole reading.
_LABEL_VALUE = re.compile(r"[a-z0-9]([-.a-z0-9]{0,61}[a-z0-9])?")
# Names in a selector: it is a part of the request's URL, of at most 64 KiB.
_MOST_NAMES = 800
# Without spec and status, which are most of an object.
_METADATA_ONLY = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}


class ReadingError(TidepoolError):
    """The Kubernetes API could not be read, so that nothing is known."""


@dataclass(frozen=True)
class Observation:
    """The objects of a namespace, as JSON has them; all of them, or none.

    Parts are read before what they belong to: a worker group whose cluster is missing here had none when it was read.

    Attributes:
        namespace: Its name.
        jobs: All Jobs.
        drivers: The pods of flow runs, and any other pod that a cluster names as its driver.
        clusters: All DaskClusters; metadata only.
        parts: By kind, what belongs to a cluster, with tidepool's labels; metadata only. Without the Deployments of
            clusters that are there. Empty if they were not asked for.
        warnings: Warning events, which Kubernetes keeps for an hour.
        nodes: The nodes, if a driver waits for one and the operator may read them.
    """

    namespace: str
    jobs: tuple[Object, ...] = ()
    drivers: tuple[Object, ...] = ()
    clusters: tuple[Object, ...] = ()
    parts: Mapping[str, tuple[Object, ...]] = field(default_factory=dict)
    warnings: tuple[Object, ...] = ()
    nodes: tuple[Object, ...] | None = None


async def connect() -> kr8s.asyncio.Api:
    """Find the credentials of the Kubernetes API: the pod's ServiceAccount, or the kubeconfig's.

    Raises:
        ReadingError: there are none, the kubeconfig is not one, or the API does not answer.
    """
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            return await upstream.connect()
    except ValueError as error:
        raise ReadingError(str(error)) from error
    except (kr8s.ServerError, *NO_ANSWER) as error:
        raise ReadingError(f"no answer from the Kubernetes API: {error or type(error).__name__}") from error


async def observe(api: kr8s.asyncio.Api, namespace: str, *, parts: bool = True) -> Observation:
    """Read a namespace.

    Args:
        api: The Kubernetes API.
        namespace: Its name.
        parts: Read the parts of clusters, too.

    Raises:
        ReadingError: one of the readings failed; the message says which, and why.
    """
    reader = _Reader(api, namespace)
    warnings = await reader.list("events", fieldSelector=_WARNINGS)
    of_clusters = await _parts(reader) if parts else {}
    clusters = await reader.metadata(GROUP, "daskclusters")
    drivers = await reader.list("pods", labelSelector=DRIVERS)
    drivers += await reader.pods(_named_drivers(clusters) - {each["metadata"]["name"] for each in drivers})
    jobs = await reader.list("jobs", "batch/v1")
    waiting = any("nodeName" not in each["spec"] for each in drivers)
    nodes = await reader.nodes() if waiting and settings().operator.read_nodes else None
    return Observation(namespace, jobs, drivers, clusters, of_clusters, warnings, nodes)


async def _parts(reader: _Reader) -> dict[str, tuple[Object, ...]]:
    """Read the parts of clusters.

    Each worker has a Deployment: of 160 clusters with 50 workers they are 50 MB. Those of a run's cluster that is there
    are left out; if it goes a moment later, the next reading has them. Those of a shared cluster are not: another one
    may have its name.
    """
    clusters = await reader.metadata(GROUP, "daskclusters")
    names = [
        each["metadata"]["name"] for each in clusters if LABEL_SHARED not in (each["metadata"].get("labels") or {})
    ]
    known = ",".join(each for each in names[:_MOST_NAMES] if _LABEL_VALUE.fullmatch(each))
    found = {}
    for kind, (version, path, labels) in PARTS.items():
        others = f"{labels},{LABEL_CLUSTER} notin ({known})" if kind == "Deployment" and known else labels
        found[kind] = await reader.metadata(version, path, others)
    return found


async def pods_with(api: kr8s.asyncio.Api, namespace: str, labels: str) -> tuple[Object, ...]:
    """Return the pods of a namespace that a label selector selects.

    Raises:
        ReadingError: they could not be read.
    """
    return await _Reader(api, namespace).list("pods", labelSelector=labels)


async def listed(api: kr8s.asyncio.Api, namespace: str, path: str, version: str, labels: str) -> tuple[Object, ...]:
    """Return the objects of a kind in a namespace that a label selector selects.

    Raises:
        ReadingError: they could not be read.
    """
    return await _Reader(api, namespace).list(path, version, labelSelector=labels)


def _named_drivers(clusters: Iterable[Object]) -> set[str]:
    named = {(each["metadata"].get("annotations") or {}).get(ANNOTATION_DRIVER, "") for each in clusters}
    # Another text would be another request.
    return {each for each in named if _NAME.fullmatch(each)}


class _Reader:
    """Reads one namespace. By kr8s' `call_api`: its objects cannot ask for metadata only."""

    def __init__(self, api: kr8s.asyncio.Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace

    async def metadata(self, version: str, path: str, labels: str = "") -> tuple[Object, ...]:
        """Return the metadata of all objects of a kind with some labels."""
        return await self.list(path, version, headers=_METADATA_ONLY, labelSelector=labels)

    async def list(
        self, path: str, version: str = "v1", headers: Mapping[str, str] | None = None, **selectors: str
    ) -> tuple[Object, ...]:
        """Return all objects of a kind."""
        answer = await self._read(path, version, self._namespace, headers=headers, params=selectors)
        return self._items(path, answer)

    async def nodes(self) -> tuple[Object, ...]:
        """Return the nodes of the Kubernetes cluster."""
        return self._items("nodes", await self._read("nodes", "v1", None))

    async def pods(self, names: Iterable[str]) -> tuple[Object, ...]:
        """Return those of these pods that exist."""
        found = [await self._read(f"pods/{each}", "v1", self._namespace) for each in sorted(names)]
        return tuple(each for each in found if each is not None)

    def _items(self, path: str, answer: Object | None) -> tuple[Object, ...]:
        whole = answer or {}
        # An empty list of custom resources is `null` when only metadata is asked for.
        items = (whole["items"] or []) if "items" in whole else None
        if not isinstance(items, list) or whole.get("metadata", {}).get("continue"):
            raise ReadingError(f"Kubernetes has no complete list of {path} for namespace {self._namespace}")
        return tuple(items)

    async def _read(self, path: str, version: str, namespace: str | None, **options: Any) -> Object | None:
        """Return an object or a list; None if there is none."""
        where = f"{path} for namespace {self._namespace}"
        try:
            async with self._api.call_api(
                "GET", version=version, namespace=namespace, url=path, timeout=REQUEST_SECONDS, **options
            ) as response:
                return _object(response.text)
        except kr8s.ServerError as error:
            if error.response is not None and error.response.status_code == HTTPStatus.NOT_FOUND:
                return None
            raise ReadingError(f"Kubernetes refused to read {where}: {error}") from error
        except (*NO_ANSWER, ValueError) as error:
            raise ReadingError(f"no answer from Kubernetes to read {where}: {error or type(error).__name__}") from error


def _object(text: str) -> Object:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"the answer is not an object: {text[:100]}")  # noqa: TRY004 - as an answer that is not JSON
    return found
