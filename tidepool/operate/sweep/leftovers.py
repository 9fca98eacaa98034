"""The decision about what is left behind: from an observation, without an API."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes.names import (
    ANNOTATION_DEADLINE,
    ANNOTATION_DRIVER,
    LABEL_CLUSTER,
    LABEL_RUN,
    LABEL_SHARED,
    OURS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tidepool.operate.sweep.observation import Object, Observation

# A younger object may not be complete: its creator has just made it.
_YOUNG = timedelta(seconds=5)
# A driver closes its cluster after its run's state is final: it sends logs and events first. This is the default of
# TIDEPOOL_COMPUTE_CLOSE_SECONDS, which bounds that.
_CLOSING = timedelta(seconds=60)
# A node that works removes a pod a moment after its grace period.
_OVERDUE = timedelta(seconds=15)


@dataclass(frozen=True)
class Leftover:
    """An object to delete.

    Attributes:
        kind: DaskCluster, or a kind of `observation.PARTS`.
        namespace: Its namespace.
        name: Its name.
        uid: Its uid: another object of the same name is not meant.
        reason: A sentence without a subject: `its driver pod x is gone`.
        run: Id of the flow run of a cluster, as its label has it; empty for a part, and for a cluster without a run.
    """

    kind: str
    namespace: str
    name: str
    uid: str
    reason: str
    run: str = ""


def leftovers(observation: Observation, finished: Mapping[str, datetime], now: datetime) -> list[Leftover]:
    """Return what is left behind in a namespace: clusters first, then parts without a cluster.

    Only the labels and annotations that a run writes itself say to which run and driver a cluster belongs. A wrong one
    costs that run its own cluster and no other.

    Args:
        observation: All of the namespace.
        finished: When a flow run has ended Completed, Failed or Cancelled, by id, as the Prefect server says; empty if
            that cannot be read. Crashed is not an end: it may be a presumption about a driver that lives.
        now: The time, with a time zone.
    """
    drivers = _Drivers(observation, finished, now)
    clusters = (
        _leftover("DaskCluster", observation.namespace, each, reason)
        for each in _judged(observation.clusters, now)
        if (reason := _deadline(each, now) or drivers.end(each))
    )
    uids = {each["metadata"]["name"]: each["metadata"]["uid"] for each in observation.clusters}
    parts = (
        _leftover(kind, observation.namespace, each, f"its Dask cluster {_cluster_of(each)} is gone")
        for kind, found in observation.parts.items()
        for each in _judged(found, now)
        if not _belongs(each, uids)
    )
    return [*clusters, *parts]


class _Drivers:
    """The drivers of a namespace's clusters."""

    def __init__(self, observation: Observation, finished: Mapping[str, datetime], now: datetime) -> None:
        self._jobs = {each["metadata"]["uid"]: each for each in observation.jobs}
        self._pods = {each["metadata"]["name"]: each for each in observation.drivers}
        self._finished = finished
        self._now = now

    def end(self, cluster: Object) -> str:
        """Return how the driver of a cluster has ended; empty while it lives. A shared cluster has none."""
        if LABEL_SHARED in _labels(cluster):
            return ""
        return self._end_of_pod(cluster) or self._end_of_job(cluster) or self._end_of_run(cluster)

    def _end_of_pod(self, cluster: Object) -> str:
        name = _annotations(cluster).get(ANNOTATION_DRIVER)
        if not name:
            return ""  # outside of Kubernetes
        pod = self._pods.get(name)
        if pod is None:
            return f"its driver pod {name} is gone"
        phase = pod.get("status", {}).get("phase")
        if phase in {"Succeeded", "Failed"}:
            return f"its driver pod {name} has ended ({phase})"
        # The time at which its grace period ends.
        due = pod["metadata"].get("deletionTimestamp")
        if due and self._now > _time(due) + _OVERDUE:
            return f"its driver pod {name} should have ended by {due}; does node {pod['spec'].get('nodeName')} answer?"
        return ""

    def _end_of_job(self, cluster: Object) -> str:
        owners = [each for each in cluster["metadata"].get("ownerReferences") or () if each["kind"] == "Job"]
        ends = [_end_of_job(each["name"], self._jobs.get(each["uid"])) for each in owners]
        return ends[0] if ends and all(ends) else ""

    def _end_of_run(self, cluster: Object) -> str:
        run = _labels(cluster).get(LABEL_RUN, "")
        end = self._finished.get(run)
        # A run that was executed again may have a cluster that is younger than the end that the server told.
        if end is None or end < _created(cluster) or self._now < end + _CLOSING:
            return ""
        return f"its flow run {run} has ended"


def _end_of_job(name: str, job: Object | None) -> str:
    if job is None:
        return f"its Job {name} is gone"
    conditions = job.get("status", {}).get("conditions") or ()
    for each in conditions:
        if each["type"] in {"Complete", "Failed"} and each["status"] == "True":
            return f"its Job {name} has ended ({each.get('reason') or each['type']})"
    return ""


def _deadline(cluster: Object, now: datetime) -> str:
    seconds = _annotations(cluster).get(ANNOTATION_DEADLINE, "")
    # A run writes it: any text.
    if re.fullmatch("[0-9]{1,9}", seconds) and (now - _created(cluster)).total_seconds() > int(seconds):
        return f"its deadline of {seconds} s is over"
    return ""


def _judged(objects: tuple[Object, ...], now: datetime) -> Iterator[Object]:
    for each in objects:
        ours = OURS.items() <= _labels(each).items()
        if ours and "deletionTimestamp" not in each["metadata"] and now - _created(each) > _YOUNG:
            yield each


def _belongs(part: Object, uids: Mapping[str, str]) -> bool:
    """Return whether the cluster of a part is there: that one, not another one of its name."""
    uid = uids.get(_cluster_of(part))
    owners = {each["uid"] for each in part["metadata"].get("ownerReferences") or () if each["kind"] == "DaskCluster"}
    return uid is not None and (not owners or uid in owners)


def _cluster_of(part: Object) -> str:
    """Return the name of a part's cluster; an autoscaler has the same."""
    return str(_labels(part).get(LABEL_CLUSTER) or part["metadata"]["name"])


def _leftover(kind: str, namespace: str, found: Object, reason: str) -> Leftover:
    metadata, run = found["metadata"], "" if kind != "DaskCluster" else _labels(found).get(LABEL_RUN, "none")
    return Leftover(kind, namespace, metadata["name"], metadata["uid"], reason, "" if run == "none" else run)


def _labels(found: Object) -> dict[str, str]:
    return found["metadata"].get("labels") or {}


def _annotations(found: Object) -> dict[str, str]:
    return found["metadata"].get("annotations") or {}


def _created(found: Object) -> datetime:
    return _time(found["metadata"]["creationTimestamp"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
