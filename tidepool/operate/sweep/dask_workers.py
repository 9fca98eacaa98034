"""The Dask workers of flow runs, as the operator sees them: for the report of a driver that can no longer write one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes.names import ANNOTATION_WORKERS, LABEL_RUN, LABEL_SHARED
from tidepool.operate.allocation import requested
from tidepool.operate.sweep.causes import is_over
from tidepool.operate.sweep.drivers import LABEL_FLOW_RUN
from tidepool.report import exits
from tidepool.report.run_record import RunRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from tidepool.operate.sweep.observation import Object, Observation

_GIB = 2**30
_ASKED = re.compile(r"([0-9]{1,5}) x ")
# A report is written within seconds of the end of a driver; after a server that was away, later.
_KEPT = timedelta(hours=1)
# Of one run; of a label that it writes itself.
_MOST_CLUSTERS = 20


@dataclass
class _Run:
    """The workers of one flow run.

    Attributes:
        namespace: Where its driver is.
        last: When something of the run was last seen.
        record: The figures, with no others.
        clusters: Names of its Dask clusters.
        until: Until when its workers' pods are counted, by uid.
        ends: How often their processes have ended, by uid.
    """

    namespace: str
    last: datetime
    record: RunRecord = field(default_factory=RunRecord)
    clusters: set[str] = field(default_factory=set)
    until: dict[str, datetime] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)


class DaskWorkers:
    """The Dask workers of all flow runs that have a driver.

    Args:
        since: The operator's start, with a time zone.
    """

    def __init__(self, since: datetime) -> None:
        self.since = since
        self._runs: dict[str, _Run] = {}

    def of(self, run: str) -> RunRecord | None:
        """Return the figures of a flow run's workers; None if none was seen."""
        found = self._runs.get(run)
        return found.record if found and (found.clusters or found.record.workers.had) else None

    def see_clusters(self, observation: Observation, now: datetime) -> None:
        """Note the drivers and Dask clusters of a namespace, and forget what is long gone.

        Args:
            observation: The namespace.
            now: The time.
        """
        for each in observation.drivers:
            # The label is the Prefect worker's: a run cannot invent another one.
            if run := _labels(each).get(LABEL_FLOW_RUN):
                self._runs.setdefault(run, _Run(observation.namespace, now)).last = now
        for each in observation.clusters:
            found, name = self._run(each), each["metadata"]["name"]
            if found and name not in found.clusters and len(found.clusters) < _MOST_CLUSTERS:
                found.clusters.add(name)
                asked = _ASKED.match((each["metadata"].get("annotations") or {}).get(ANNOTATION_WORKERS, ""))
                found.record.workers.asked += int(asked[1]) if asked else 0
                began = datetime.fromisoformat(each["metadata"]["creationTimestamp"]).timestamp()
                found.record.events.append((began, f"Dask cluster {name} created"))
        self._runs = {run: each for run, each in self._runs.items() if now - each.last < _KEPT}

    def see_pods(self, drivers: Iterable[Object], dask_pods: Iterable[Object], now: datetime) -> None:
        """Note the pods of a namespace's Dask clusters.

        Args:
            drivers: The drivers, listed before the others.
            dask_pods: Schedulers and workers.
            now: The time.
        """
        alive = {_labels(each).get(LABEL_FLOW_RUN, "") for each in drivers if not _ends(each)}
        workers: dict[str, list[Object]] = {}
        for each in dask_pods:
            if _labels(each).get("dask.org/component") == "worker" and self._run(each):
                workers.setdefault(_labels(each)[LABEL_RUN], []).append(each)
        for run, pods in workers.items():
            _count(self._runs[run], pods, now, alive=run in alive)

    def _run(self, found: Object) -> _Run | None:
        """Return the run that an object of a cluster of its own belongs to; a run writes this label itself."""
        run = self._runs.get(_labels(found).get(LABEL_RUN, ""))
        own = LABEL_SHARED not in _labels(found)
        return run if run and own and found["metadata"]["namespace"] == run.namespace else None


def _count(found: _Run, pods: Iterable[Object], now: datetime, *, alive: bool) -> None:
    running = 0
    before, found.until = found.until, {}
    ends, found.ends = found.ends, {}
    for pod in pods:
        uid, status = pod["metadata"]["uid"], pod.get("status") or {}
        if status.get("startTime") and status.get("phase") == "Running":
            running += 1
            begun = before.get(uid) or datetime.fromisoformat(status["startTime"])
            seconds = max(0.0, (now - begun).total_seconds())
            cores, memory = requested(pod, "cpu"), requested(pod, "memory")
            found.record.use(core_seconds=cores * seconds, gib_seconds=memory / _GIB * seconds)
        found.until[uid] = now
        found.ends[uid] = max(_ends_of(pod), ends.get(uid, 0))
        # Without its driver a cluster goes, and its workers with it: none of them is lost.
        if alive and not _is_deleted(pod) and (lost := found.ends[uid] - ends.get(uid, 0)):
            found.record.workers.lost += lost
            times = f" {lost} times" if lost > 1 else ""
            found.record.event(f"worker {pod['metadata']['name']} lost{times}: {_cause(pod)}")
    found.record.see_workers(running)


def _ends_of(pod: Object) -> int:
    """Return how often a worker's process has ended: Kubernetes starts it again, unless the pod itself is over."""
    return sum(int(each.get("restartCount", 0)) for each in _statuses(pod)) + is_over(pod)


def _cause(pod: Object) -> str:
    if is_over(pod) and (reason := pod["status"].get("reason")):
        return str(reason).lower()  # such as Evicted
    for each in _statuses(pod):
        for part in ("state", "lastState"):
            if ended := (each.get(part) or {}).get("terminated"):
                return exits.container(ended)
    return "cause unknown"


def _statuses(pod: Object) -> Sequence[Mapping[str, Any]]:
    return (pod.get("status") or {}).get("containerStatuses") or ()


def _labels(found: Object) -> Mapping[str, str]:
    return found["metadata"].get("labels") or {}


def _is_deleted(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _ends(driver: Object) -> bool:
    return is_over(driver) or _is_deleted(driver)
