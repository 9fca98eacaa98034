"""Why a Dask pod does not run, in words, from what the Kubernetes API says about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Waiting longer does not help with these.
_HOPELESS = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"}
_CRASHES = 2


def component(pod: Mapping[str, Any]) -> str:
    """`scheduler` or `worker`."""
    label: str = pod["metadata"]["labels"].get("dask.org/component", "")
    return label


def why(pods: Iterable[Mapping[str, Any]]) -> str:
    """What keeps pods from running, one sentence part per distinct reason; empty when nothing does."""
    reasons: dict[str, None] = {}
    for pod in pods:
        status = pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                reasons[f"{component(pod)} not scheduled: {condition.get('message', condition.get('reason', ''))}"] = (
                    None
                )
        for container in status.get("containerStatuses", []):
            if (sentence := _container(container)) is not None:
                reasons[f"{component(pod)} {sentence}"] = None
    return "; ".join(reasons)


def hopeless(pods: Iterable[Mapping[str, Any]]) -> str:
    """A reason that time does not heal: an image name that is none, a container that ends each time. Empty: none."""
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses", []):
            waiting = container.get("state", {}).get("waiting", {}).get("reason", "")
            crashes = container.get("restartCount", 0) >= _CRASHES and waiting == "CrashLoopBackOff"
            if waiting in _HOPELESS or crashes:
                return why([pod])
    return ""


def last_end(pod: Mapping[str, Any]) -> str:
    """How a pod's container ended the last time: `OOMKilled (137)`; empty when it never did."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        for when in ("state", "lastState"):
            if ended := container.get(when, {}).get("terminated"):
                return f"{ended.get('reason', 'ended')} ({ended.get('exitCode')})"
    return ""


def _container(status: Mapping[str, Any]) -> str | None:
    waiting = status.get("state", {}).get("waiting", {})
    ended = status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated")
    if ended and ended.get("exitCode"):
        last = (ended.get("message") or "").strip().splitlines()[-1:]
        said = f", last line: {last[0]}" if last else ""
        return f"ended: {ended.get('reason', 'Error')} ({ended['exitCode']}){said}"
    if waiting and waiting.get("reason") not in {"ContainerCreating", "PodInitializing"}:
        return f"waits: {waiting['reason']} {waiting.get('message', '')}".strip()
    return None
