"""A Kubernetes node without a machine: an object in the API, and a kubelet that starts nothing.

Its pods become Running as soon as they are bound to it, and go as soon as they are deleted. A real kubelet writes a
pod's status two or three times more often, and probes it.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

import httpx
import kr8s

from tidepool.upstream.kr8s import connect

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "tidepool.dev/fake"
"""Key of the node's label and of its taint."""
IMAGE = f"localhost:5000/tidepool@sha256:{'0' * 64}"
"""An image that is never pulled."""
_NAME = "tidepool-fake"
_HEARTBEAT_SECONDS = 10.0
_REQUESTS_AT_A_TIME = 20
_MERGE = {"Content-Type": "application/merge-patch+json"}
# For benchmarks of networks (RFC 2544): nothing answers there.
_ADDRESS = "198.18.{}.{}"
_ROOM = {"cpu": "100000", "memory": "100Ti", "ephemeral-storage": "100Ti", "pods": "20000"}


class Kubernetes:
    """Requests to the Kubernetes API, with the rights of the kubeconfig."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._few = asyncio.Semaphore(_REQUESTS_AT_A_TIME)

    @classmethod
    async def connect(cls) -> Self:
        """Find the credentials, and try them."""
        return cls(await connect())

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        absent: tuple[HTTPStatus, ...] = (),
        headers: dict[str, str] | None = None,
        **params: str,
    ) -> dict[str, Any] | None:
        """Send a request, `path` as `apps/v1/namespaces/NAME/deployments`; return the answer, None if `absent`."""
        version, _, url = path.partition("/") if path.startswith("v1/") else _split(path)
        content = None if body is None else json.dumps(body)
        options = {"headers": headers, "params": params, "timeout": 120}
        async with self._few:
            try:
                async with self._api.call_api(method, version=version, url=url, content=content, **options) as answer:
                    return dict(answer.json())
            except kr8s.ServerError as error:
                if error.response is not None and error.response.status_code in absent:
                    return None
                raise

    async def watch(self, path: str, see: Callable[[str, dict[str, Any]], None], **params: str) -> None:
        """Call `see` for what exists and for each change, also of what went while the connection was lost."""
        version, _, url = path.partition("/") if path.startswith("v1/") else _split(path)
        known: dict[str, dict[str, Any]] = {}
        while True:
            listed = await self.ask("GET", path, **params) or {}
            there = {each["metadata"]["uid"]: each for each in listed["items"]}
            for uid in known.keys() - there.keys():
                see("DELETED", known[uid])
            for each in there.values():
                see("MODIFIED", each)
            known = there
            since = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"], **params}
            with suppress(httpx.TransportError):
                stream = self._api.call_api(
                    version=version, url=url, params=since, stream=True, timeout=httpx.Timeout(30, read=None)
                )
                async with stream as response:
                    async for line in response.aiter_lines():
                        event = json.loads(line)
                        if event["type"] == "ERROR":  # too old: the list is read again
                            break
                        known[event["object"]["metadata"]["uid"]] = event["object"]
                        see(event["type"], event["object"])


def _split(path: str) -> tuple[str, str, str]:
    group, version, url = path.split("/", 2)
    return f"{group}/{version}", "/", url


class FakeNode:
    """The node.

    Args:
        kubernetes: The Kubernetes API.
        scheduler_address: Where something answers as a Dask scheduler does.

    Attributes:
        pods: The pods that exist on it, by uid.
        changed: Called with each pod when it runs or is gone.
    """

    def __init__(self, kubernetes: Kubernetes, scheduler_address: str) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.changed: Callable[[dict[str, Any]], None] = lambda _: None
        self._kubernetes = kubernetes
        self._scheduler_address = scheduler_address
        self._told: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._addresses = 0

    async def __aenter__(self) -> Self:
        meta = {"name": _NAME, "labels": {KEY: "yes", "kubernetes.io/hostname": _NAME}}
        taints = [{"key": KEY, "value": "yes", "effect": "NoSchedule"}]
        node = {"apiVersion": "v1", "kind": "Node", "metadata": meta, "spec": {"taints": taints}}
        found = await self._kubernetes.ask("POST", "v1/nodes", node)
        uid = (found or {})["metadata"]["uid"]
        owner = {"apiVersion": "v1", "kind": "Node", "name": _NAME, "uid": uid}
        lease = {"metadata": {"name": _NAME, "ownerReferences": [owner]}, "spec": {"holderIdentity": _NAME}}
        conflict = (HTTPStatus.CONFLICT,)
        await self._kubernetes.ask("POST", _LEASES, lease, absent=conflict)
        await self._renew()
        self._start(self._beat())
        where = {"fieldSelector": f"spec.nodeName={_NAME}"}
        self._start(self._kubernetes.watch("v1/pods", self._see, **where))
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in [*self.pods.values()]:  # pods whose owner is not deleted stay on a node that is gone
            await self._remove(each)
        for task in self._tasks:
            task.cancel()
        absent = (HTTPStatus.NOT_FOUND,)
        await self._kubernetes.ask("DELETE", f"v1/nodes/{_NAME}", absent=absent)
        await self._kubernetes.ask("DELETE", f"{_LEASES}/{_NAME}", absent=absent)

    def end(self, pod: dict[str, Any]) -> None:
        """Let a pod end with exit code 0."""
        ended = {"exitCode": 0, "reason": "Completed", "startedAt": _now(), "finishedAt": _now()}
        self._start(self._status(pod, "Succeeded", {"terminated": ended}, pod["status"].get("podIP", "")))

    def _start(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            await self._renew()

    async def _renew(self) -> None:
        spec = {"renewTime": _now(micro=True), "leaseDurationSeconds": 40}
        await self._kubernetes.ask("PATCH", f"{_LEASES}/{_NAME}", {"spec": spec}, headers=_MERGE)
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": _now()}
        status = {"conditions": [ready], "capacity": _ROOM, "allocatable": _ROOM}
        await self._kubernetes.ask("PATCH", f"v1/nodes/{_NAME}/status", {"status": status}, headers=_MERGE)

    def _see(self, what: str, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        if what == "DELETED":
            self.pods.pop(uid, None)
            self._told -= {(uid, "begun"), (uid, "deleted")}
            self.changed(pod | {"status": {**pod["status"], "phase": "gone"}})
            return
        self.pods[uid] = pod
        if "deletionTimestamp" in pod["metadata"]:
            if (uid, "deleted") not in self._told:
                self._told.add((uid, "deleted"))
                self._start(self._remove(pod))
        elif pod["status"]["phase"] == "Pending" and (uid, "begun") not in self._told:
            self._told.add((uid, "begun"))
            self._start(self._status(pod, "Running", {"running": {"startedAt": _now()}}, self._address(pod)))
        self.changed(pod)

    def _address(self, pod: dict[str, Any]) -> str:
        if pod["metadata"]["labels"].get("dask.org/component") == "scheduler":
            return self._scheduler_address
        self._addresses += 1
        return _ADDRESS.format(self._addresses // 250 % 250, self._addresses % 250 + 1)

    async def _status(self, pod: dict[str, Any], phase: str, state: dict[str, Any], address: str) -> None:
        running = phase == "Running"
        true = [
            {"type": each, "status": "True", "lastTransitionTime": _now()} for each in ("PodScheduled", "Initialized")
        ]
        ready = [
            {"type": each, "status": str(running), "lastTransitionTime": _now()}
            for each in ("ContainersReady", "Ready")
        ]
        containers = [
            {
                "name": each["name"], "image": each["image"], "imageID": each["image"], "ready": running,
                "started": running, "restartCount": 0, "state": state,
            }
            for each in pod["spec"]["containers"]
        ]  # fmt: skip
        status = {
            "phase": phase, "conditions": true + ready, "containerStatuses": containers, "podIP": address,
            "podIPs": [{"ip": address}], "startTime": pod["status"].get("startTime") or _now(),
        }  # fmt: skip
        await self._ask_about("PATCH", pod, "/status", {"status": status}, headers=_MERGE)

    async def _remove(self, pod: dict[str, Any]) -> None:
        uid = {"uid": pod["metadata"]["uid"]}
        await self._ask_about("DELETE", pod, "", {"gracePeriodSeconds": 0, "preconditions": uid})

    async def _ask_about(self, method: str, pod: dict[str, Any], part: str, body: Any, **options: Any) -> None:
        path = f"v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}{part}"
        absent = (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)
        while True:
            try:
                await self._kubernetes.ask(method, path, body, absent=absent, **options)
            except (httpx.TransportError, kr8s.APITimeoutError):
                pass
            except kr8s.ServerError as error:
                if error.response is not None and error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise
            else:
                return
            await asyncio.sleep(1)  # as a kubelet, which never gives up


_LEASES = "coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


def _now(*, micro: bool = False) -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")
