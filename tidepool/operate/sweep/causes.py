"""The reason that a driver has ended or does not start, in words, from what Kubernetes reports."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from tidepool.operate.rules import quantity
from tidepool.report.exits import driver_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidepool.operate.sweep.observation import Object

# Of a message that is not tidepool's own, such as the last line of a log.
_LONGEST = 300
_SIGNALLED = 128
# A node that works removes a pod a moment after its grace period.
_OVERDUE = timedelta(seconds=15)
# Reasons of a container that waits because all is well.
_STARTING = {"ContainerCreating", "PodInitializing"}
_CANNOT_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
# Why a registry did not give an image: what containerd's sentence has in it, and the word for it.
_PULL_ERRORS = {
    "denied": "access denied; check image.pullSecrets",
    "authorization failed": "access denied; check image.pullSecrets",
    "unauthorized": "access denied; check image.pullSecrets",
    "no basic auth": "access denied; check image.pullSecrets",
    "not found": "not found",
    "NotFound": "not found",
    "no such host": "its registry has no address",
    "connection refused": "its registry does not answer",
    "i/o timeout": "its registry does not answer",
    "deadline exceeded": "its registry does not answer",
}
# Reasons of a pod's condition DisruptionTarget.
_DISRUPTIONS = {
    "PreemptionByScheduler": "driver pod preempted by a pod of a higher priority",
    "EvictionByEvictionAPI": "driver pod evicted: its node was drained",
    "DeletionByTaintManager": "driver pod deleted: node {node} not ready or tainted",
    "DeletionByPodGC": "driver pod deleted: node {node} is gone",
}
_QUOTA = re.compile(
    r"exceeded quota: (?P<name>[^,\s]+), requested: (?P<asked>.*), used: (?P<used>.*), limited: (?P<cap>.*)"
)
_UNITS = {"cpu": "CPU", "memory": "memory", "ephemeral-storage": "disk"}
_GIB = 2**30


def cause(
    job: Object | None,
    pods: Sequence[Object],
    events: Iterable[Object],
    nodes: Sequence[Object] | None = None,
    now: datetime | None = None,
) -> str:
    """Return why a driver has ended, or why it does not start; empty while nothing keeps it from starting or running.

    Args:
        job: The run's Job; None if it is gone.
        pods: The Job's pods.
        events: Warning events of its namespace.
        nodes: The nodes; None if they are unknown.
        now: The time, with a time zone; None if a pod that should have ended by now does not matter.
    """
    pod = max(pods, key=_created, default=None)
    if pod is not None and now is not None and overdue(pod, now):
        return f"node {pod['spec'].get('nodeName')} not ready: driver pod deleted, and its end not reported"
    if ended(job):
        return _end(job, pod, events, nodes)
    return _obstacle(job, pod, events, nodes) if job else ""


def overdue(pod: Object, now: datetime) -> bool:
    """Return whether a pod should have ended: its deletion's grace period is over, and its node reports nothing."""
    due = pod["metadata"].get("deletionTimestamp")
    return bool(due) and not is_over(pod) and now > datetime.fromisoformat(due) + _OVERDUE


def is_over(pod: Object) -> bool:
    """Return whether no container of a pod runs or will run."""
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}


def ended(job: Object | None) -> str:
    """Return how a Job has ended: `Complete`, `Failed`, or `deleted` if it is gone; empty while it has not.

    A Job that fails has the condition FailureTarget first, while its pod may still run.
    """
    if job is None:
        return "deleted"
    return next((kind for kind in ("Complete", "Failed") if _condition(job, kind)), "")


def fails(job: Object) -> bool:
    """Return whether a Job will be Failed as soon as its pod has ended."""
    return _condition(job, "FailureTarget") is not None


def over_deadline(job: Object | None) -> bool:
    """Return whether Kubernetes has ended a Job because of its deadline."""
    return bool(job) and (_condition(job, "Failed") or {}).get("reason") == "DeadlineExceeded"


def began(pods: Iterable[Object]) -> bool:
    """Return whether the container of one of these pods runs or has run."""
    return any("running" in each or "terminated" in each for pod in pods for each in _states(pod))


def last_lines(pods: Iterable[Object]) -> str:
    """Return the last lines that a driver with an error printed, at most 2 KiB: Kubernetes keeps them in its status."""
    texts = [(each.get("terminated") or {}).get("message", "") for pod in pods for each in _states(pod)]
    return next((each.strip() for each in texts if each), "")


# --- it has ended -----------------------------------------------------------------------------------------------------


def _end(job: Object | None, pod: Object | None, events: Iterable[Object], nodes: Sequence[Object] | None) -> str:
    if job and over_deadline(job):
        return f"deadline of {job['spec']['activeDeadlineSeconds']} s over"
    if pod is not None:
        return _disruption(pod) or _end_of_pod(pod, nodes)
    if job is None:
        return "its Job was deleted"
    return _told(job, events) or "driver pod deleted"


def _end_of_pod(pod: Object, nodes: Sequence[Object] | None) -> str:
    terminated = _terminated(pod) or {}
    if terminated.get("reason") == "OOMKilled":
        return driver_out_of_memory(_limit(pod))
    if _unreachable(pod, nodes):
        return f"node {pod['spec']['nodeName']} not ready"
    return "driver pod deleted" if "deletionTimestamp" in pod["metadata"] else _exit(terminated)


def _disruption(pod: Object) -> str:
    """Return what Kubernetes did to a pod; empty if it did nothing."""
    status = pod.get("status", {})
    if status.get("reason") == "Evicted":
        return _eviction(pod, status.get("message", ""))
    disruption = _condition(pod, "DisruptionTarget") or {}
    reason = disruption.get("reason", "")
    if reason == "TerminationByKubelet":
        return _eviction(pod, disruption.get("message", ""))
    return _DISRUPTIONS.get(reason, "").format(node=pod["spec"].get("nodeName", ""))


def _exit(terminated: Mapping[str, Any]) -> str:
    code = terminated.get("exitCode")
    if code is None:
        return "driver ended without an exit code"
    if code == 0:
        return "driver ended with exit code 0, without a final state of the run"
    if code > _SIGNALLED:
        # Its last line was written before anyone ended it.
        with suppress(ValueError):
            return f"driver ended with exit code {code} ({signal.Signals(code - _SIGNALLED).name})"
    lines = (terminated.get("message") or "").strip().splitlines()
    return f"driver ended with exit code {code}" + (f": {_short(lines[-1])}" if lines else "")


def _eviction(pod: Object, message: str) -> str:
    if found := re.search(r"low on resource: ([a-z-]+)", message):
        return f"driver pod evicted: node low on {_UNITS.get(found[1], found[1])}"
    if "EmptyDir" in message or "ephemeral" in message:
        limits = (each.get("emptyDir", {}).get("sizeLimit") for each in pod["spec"].get("volumes", []))
        limit = next((each for each in limits if each), "")
        return "driver pod evicted: its /tmp is full" + (f" (limit {limit}); raise tmp_size_limit" if limit else "")
    return f"driver pod evicted: {_short(message or 'its node ends')}"


def _limit(pod: Object) -> str:
    limits = (each.get("resources", {}).get("limits", {}).get("memory") for each in pod["spec"]["containers"])
    return next((each for each in limits if each), "")


def _told(job: Object, events: Iterable[Object]) -> str:
    """Return why the pod of a Job is gone, as the events about it say; empty if they do not."""
    said = {each.get("reason"): each.get("message", "") for each in _about(job, events)}
    if "Evicted" in said:
        found = re.search(r"low on resource: ([a-z-]+)", said["Evicted"])
        return "driver pod evicted" + (f": node low on {_UNITS.get(found[1], found[1])}" if found else "")
    if "Preempted" in said:
        return _DISRUPTIONS["PreemptionByScheduler"]
    if "NodeNotReady" in said:
        return "driver pod deleted: its node was not ready"
    return ""


# --- it does not start ------------------------------------------------------------------------------------------------


def _obstacle(job: Object, pod: Object | None, events: Iterable[Object], nodes: Sequence[Object] | None) -> str:
    if pod is None:
        return _refused(job, events)
    if scheduled := _condition(pod, "PodScheduled", "False"):
        return _unschedulable(pod, scheduled.get("message", ""), nodes)
    return _container(pod) or ("" if began([pod]) else _warned(pod, events))


def _container(pod: Object) -> str:
    """Return why the container of a pod waits; empty if it does not, or because it starts."""
    for waiting in (each["waiting"] for each in _states(pod) if each.get("waiting")):
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _CANNOT_PULL:
            return _not_pulled(pod, reason, message)
        if reason not in _STARTING:
            return f"driver container cannot start: {_short(f'{reason}: {message}' if message else reason)}"
    return ""


def _warned(pod: Object, events: Iterable[Object]) -> str:
    """Return the last warning about a pod: a volume or a sandbox that cannot be made, or the first pull of an image."""
    about = _about(pod, events)
    last = max(about, key=_last_seen, default=None)
    if last is None:
        return ""
    # Both are optional in an event of another controller.
    messages = [each.get("message") or "" for each in about]
    pulls = [each for each in messages if each.startswith("Failed to pull image")]
    reason, message = last.get("reason") or "", last.get("message") or ""
    if pulls and reason == "Failed":
        return _not_pulled(pod, "", pulls[-1])
    return f"driver pod cannot start: {_short(message or reason or 'a warning without a reason')}"


def _not_pulled(pod: Object, reason: str, message: str) -> str:
    return f"image {pod['spec']['containers'][0]['image']} cannot be pulled: {_pull_error(reason, message)}"


def _refused(job: Object, events: Iterable[Object]) -> str:
    """Return why a Job has no pod."""
    refusals = [each for each in _about(job, events) if each.get("reason") == "FailedCreate"]
    last = max(refusals, key=_last_seen, default=None)
    if last is None:
        return ""
    message = last.get("message", "")
    if found := _QUOTA.search(message):
        return f"quota {found['name']}: {_amounts(found)}"
    return f"driver pod refused: {_short(message.rpartition(' is forbidden: ')[2].removeprefix('Error creating: '))}"


def _amounts(found: re.Match[str]) -> str:
    asked, used, cap = (
        dict(each.split("=", 1) for each in found[part].split(",") if "=" in each) for part in ("asked", "used", "cap")
    )
    texts = []
    for name, limit in cap.items():
        counted = name == "pods" or name.startswith("count/")
        texts.append(f"{name} {used.get(name)} of {limit}" + ("" if counted else f" (asked: {asked.get(name)})"))
    return ", ".join(texts)


def _unschedulable(pod: Object, message: str, nodes: Sequence[Object] | None) -> str:
    """Return what the nodes lack: the scheduler's own sentence counts them and has no amounts."""
    said = message.partition("available: ")[2].partition(". ")[0].rstrip(".") or message
    missing = set(re.findall(r"Insufficient ([a-z-]+)", said))
    others = [each for each in re.split(r",\s+(?=\d)", said) if "Insufficient" not in each]
    if not missing or not missing <= _UNITS.keys() or others:
        return f"no node fits: {_short(said)}"
    texts = []
    for name in sorted(missing):
        asked = sum(_amount(each.get("resources", {}).get("requests", {}), name) for each in pod["spec"]["containers"])
        largest = max((_amount(each.get("status", {}).get("allocatable", {}), name) for each in nodes or ()), default=0)
        known = f"; largest node: {_written(name, largest)}" if largest else ""
        amount = _written(name, asked)
        texts.append(f"no node has {amount} {_UNITS[name]} free (asked: {amount}{known})")
    return "; ".join(texts)


def _amount(amounts: Mapping[str, Any], name: str) -> float:
    return quantity(amounts.get(name, 0)) or 0


def _written(name: str, amount: float) -> str:
    if name == "cpu":
        return f"{amount:g}"
    return f"{amount / _GIB:.3g}Gi" if amount >= _GIB else f"{amount / 2**20:.3g}Mi"


def _pull_error(reason: str, message: str) -> str:
    if reason == "InvalidImageName":
        return "invalid name"
    if reason == "ErrImageNeverPull":
        return "it is not on the node, and the pull policy is Never"
    for text, meaning in _PULL_ERRORS.items():
        if text in message:
            return meaning
    return _short(message.rpartition(": ")[2] or reason)


# --- reading ----------------------------------------------------------------------------------------------------------


def _states(pod: Object) -> list[Mapping[str, Any]]:
    return [each.get("state") or {} for each in pod.get("status", {}).get("containerStatuses") or ()]


def _terminated(pod: Object) -> Mapping[str, Any] | None:
    """Return how a pod's container has ended; an empty mapping if only the pod says that it has; None if it has not."""
    for each in _states(pod):
        if each.get("terminated"):
            return dict(each["terminated"])
    return {} if is_over(pod) else None


def _condition(found: Object | None, kind: str, status: str = "True") -> Mapping[str, Any] | None:
    listed = (found or {}).get("status", {}).get("conditions") or ()
    return next((each for each in listed if each["type"] == kind and each["status"] == status), None)


def _unreachable(pod: Object, nodes: Sequence[Object] | None) -> bool:
    """Return whether the node of a pod is known not to be ready."""
    node = next((each for each in nodes or () if each["metadata"]["name"] == pod["spec"].get("nodeName")), None)
    if node is not None:
        return _condition(node, "Ready") is None
    return bool(pod.get("status", {}).get("reason") == "NodeLost")


def _about(found: Object, events: Iterable[Object]) -> list[Object]:
    """Return the events about an object, or about the pods of a Job, whose names begin with the Job's."""
    name, uid = found["metadata"]["name"], found["metadata"]["uid"]
    return [
        each
        for each in events
        if (about := each.get("involvedObject", {})).get("uid") == uid
        or (about.get("kind") == "Pod" and re.fullmatch(rf"{re.escape(name)}-[a-z0-9]{{5}}", about.get("name", "")))
    ]


def _last_seen(event: Object) -> str:
    series = event.get("series") or {}
    return str(event.get("lastTimestamp") or series.get("lastObservedTime") or event.get("eventTime") or "")


def _created(found: Object) -> str:
    return str(found["metadata"]["creationTimestamp"])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
