"""The Jobs and pods of flow runs, and whether a process of a run may exist."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from tidepool.operate.sweep import causes
from tidepool.operate.sweep.records import Job

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tidepool.operate.sweep.observation import Object, Observation
    from tidepool.operate.sweep.records import FlowRun

LABEL_FLOW_RUN = "prefect.io/flow-run-id"
"""Label that the Prefect worker writes on Jobs and their pods; admission keeps flow runs from making either."""


@dataclass(frozen=True)
class Driver:
    """The Jobs and pods of one flow run.

    Attributes:
        here: Whether this cluster's namespaces are where the run's Job is or would be.
        jobs: Its Jobs, newest first.
        pods: Its pods.
        observation: Of the namespace of its newest Job.
        now: When that was observed.
    """

    here: bool
    jobs: tuple[Object, ...]
    pods: tuple[Object, ...]
    observation: Observation | None
    now: datetime

    @property
    def job(self) -> Object | None:
        """The newest Job."""
        return self.jobs[0] if self.jobs else None

    @property
    def may_run(self) -> bool:
        """True if a process of the run may exist, now or later."""
        return any(map(self._may_run, self.pods)) or any(map(self._may_start, self.jobs))

    def _may_run(self, pod: Object) -> bool:
        return not causes.is_over(pod) and not causes.overdue(pod, self.now)

    def _may_start(self, job: Object) -> bool:
        if causes.ended(job):
            return False
        # A Job whose pod's node does not answer waits for that pod, and starts no other.
        overdue = any(causes.overdue(each, self.now) for each in self.pods if _owner(each) == job["metadata"]["uid"])
        return not (overdue and causes.fails(job))

    def own_pods(self) -> list[Object]:
        """Return the pods of the newest Job."""
        uid = self.job["metadata"]["uid"] if self.job else ""
        return [each for each in self.pods if _owner(each) == uid]

    def cause(self) -> str:
        """Return why the newest driver has ended or does not start."""
        if self.observation is None:
            return causes.cause(None, self.pods, ())
        return causes.cause(self.job, self.own_pods(), self.observation.warnings, self.observation.nodes, self.now)

    def to_delete(self) -> tuple[Job, ...]:
        """Return its Jobs that are not being deleted."""
        return tuple(
            Job(meta["namespace"], meta["name"], meta["uid"])
            for meta in (each["metadata"] for each in self.jobs)
            if "deletionTimestamp" not in meta
        )


class Drivers:
    """The Jobs and pods of all flow runs."""

    def __init__(self, observations: Sequence[Observation], now: datetime) -> None:
        self._now = now
        self._namespaces = {each.namespace: each for each in observations}
        self._jobs: dict[str, list[Object]] = defaultdict(list)
        self._pods: dict[str, list[Object]] = defaultdict(list)
        for observation in observations:
            for found, objects in ((self._jobs, observation.jobs), (self._pods, observation.drivers)):
                for each in objects:
                    found[(each["metadata"].get("labels") or {}).get(LABEL_FLOW_RUN, "")].append(each)

    def of(self, run: FlowRun) -> Driver:
        """Return what Kubernetes has of a flow run."""
        jobs = sorted(self._jobs.get(run.id, ()), key=created, reverse=True)
        where = run.infrastructure.partition(":")[0]
        observation = self._namespaces.get(jobs[0]["metadata"]["namespace"] if jobs else where)
        here = bool(jobs) or not where or where in self._namespaces
        return Driver(here, tuple(jobs), tuple(self._pods.get(run.id, ())), observation, self._now)


def _owner(pod: Object) -> str:
    owners = pod["metadata"].get("ownerReferences") or ()
    return next((each["uid"] for each in owners if each["kind"] == "Job"), "")


def with_gone(observation: Observation, seen: Mapping[str, Object]) -> Observation:
    """Return an observation with the drivers that are gone and whose Jobs are not: the reason was in their last state.

    Args:
        observation: A namespace.
        seen: Earlier drivers that were being deleted, by uid.
    """
    there = {each["metadata"]["uid"] for each in observation.drivers}
    jobs = {each["metadata"]["uid"] for each in observation.jobs}
    gone = [
        {**pod, "status": {**pod.get("status", {}), "phase": "Failed"}}
        for uid, pod in seen.items()
        if uid not in there and _owner(pod) in jobs
    ]
    return replace(observation, drivers=(*observation.drivers, *gone))


def being_deleted(observations: Iterable[Observation]) -> dict[str, Object]:
    """Return the drivers that are being deleted, or were when they were last seen, by uid."""
    drivers = (pod for each in observations for pod in each.drivers)
    return {pod["metadata"]["uid"]: pod for pod in drivers if "deletionTimestamp" in pod["metadata"]}


def running_since(pod: Object) -> Iterator[datetime]:
    """Yield since when each container of a pod runs."""
    for each in pod.get("status", {}).get("containerStatuses") or ():
        if running := (each.get("state") or {}).get("running"):
            yield _time(running["startedAt"])


def ended_at(job: Object) -> datetime:
    """Return when a Job has ended; when it was created, if it has not."""
    found = [
        each["lastTransitionTime"]
        for each in job.get("status", {}).get("conditions") or ()
        if each["type"] in {"Complete", "Failed"} and each["status"] == "True"
    ]
    return _time(found[0]) if found else created(job)


def created(job: Object) -> datetime:
    """Return when a Job was created."""
    return _time(job["metadata"]["creationTimestamp"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
