"""The state of Dask pods in words, from what the Kubernetes API reports about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidepool.report import exits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Waiting longer does not help with these.
_PERMANENT = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"}
_CRASHES = 2


def component(pod: Mapping[str, Any]) -> str:
    """Return `scheduler` or `worker`."""
    return str(pod["metadata"]["labels"].get("dask.org/component", ""))


def reasons(pods: Iterable[Mapping[str, Any]]) -> str:
    """Return what keeps pods from running, each distinct reason once; empty when nothing does."""
    found: dict[str, None] = {}
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                said = condition.get("message", condition.get("reason", ""))
                found[f"{component(pod)} not scheduled: {said}"] = None
        for container in _containers(pod):
            if reason := _reason(container):
                found[f"{component(pod)} {reason}"] = None
    return "; ".join(found)


def permanent_failure(pods: Iterable[Mapping[str, Any]]) -> str:
    """Return the reason that a pod will never become ready (invalid image name, crash loop, …); empty for none."""
    for pod in pods:
        for container in _containers(pod):
            waiting = container.get("state", {}).get("waiting", {}).get("reason", "")
            crashes = container.get("restartCount", 0) >= _CRASHES and waiting == "CrashLoopBackOff"
            if waiting in _PERMANENT or crashes:
                return reasons([pod])
    return ""


def last_exit(pod: Mapping[str, Any]) -> str:
    """Return how a pod's container last terminated, such as `out of memory (137)`; empty when it never did."""
    for container in _containers(pod):
        for when in ("state", "lastState"):
            if ended := container.get(when, {}).get("terminated"):
                return exits.container(ended)
    return ""


def restarts(pod: Mapping[str, Any]) -> int:
    """Return how often a pod's containers were restarted."""
    return sum(container["restartCount"] for container in _containers(pod))


def _containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    statuses: list[Mapping[str, Any]] = pod.get("status", {}).get("containerStatuses", [])
    return statuses


def _reason(container: Mapping[str, Any]) -> str:
    waiting = container.get("state", {}).get("waiting", {})
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
    if ended and ended.get("exitCode"):
        last = (ended.get("message") or "").strip().splitlines()[-1:]
        said = f", last line: {last[0]}" if last else ""
        return f"terminated: {exits.container(ended)}{said}"
    if waiting and waiting.get("reason") not in {"ContainerCreating", "PodInitializing"}:
        return f"waiting: {waiting['reason']} {waiting.get('message', '')}".strip()
    return ""
