"""Deployments, work pools and flow runs, as the exporter reads them from the Prefect server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

Json = dict[str, Any]

FINAL = {"COMPLETED": "Completed", "FAILED": "Failed", "CRASHED": "Crashed", "CANCELLED": "Cancelled"}
UNFINISHED = {"PENDING": "Pending", "RUNNING": "Running", "CANCELLING": "Cancelling", "PAUSED": "Paused"}
# Names of states of type SCHEDULED that mean something else than a run that is due.
_WAITING = ("Late", "AwaitingRetry", "AwaitingConcurrencySlot")


@dataclass(frozen=True)
class Deployment:
    """A deployment.

    Attributes:
        labels: Its flow, name, tier, team and work pool: the values of `metrics.RUN`.
        schedules: Its active schedules, as the server stores them; empty if the deployment is paused.
        scheduled: It has schedules, active or not.
        changed: Time of its last change, which of a paused one is the pause, or later.
        description: Its description, with the link to its runbook.
    """

    labels: tuple[str, str, str, str, str]
    schedules: tuple[Json, ...]
    scheduled: bool
    changed: float
    description: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Flow and name."""
        return self.labels[:2]

    @property
    def tier(self) -> str:
        """Its tag `tier:`; empty without one."""
        return self.labels[2]

    @property
    def pool(self) -> str:
        """Name of its work pool."""
        return self.labels[4]


# Runs without a deployment, such as subflows, and those of deployments above the limit.
OTHER = Deployment(("other", "other", "", "", ""), (), scheduled=False, changed=0)


@dataclass(frozen=True)
class Pool:
    """A work pool.

    Attributes:
        name: Its name.
        limit: Its concurrency limit; None if there is none.
        paused: It is paused.
        has_workers: Prefect workers poll it; a push pool has none.
    """

    name: str
    limit: int | None
    paused: bool
    has_workers: bool


@dataclass(frozen=True)
class Run:
    """A flow run.

    Attributes:
        id: Its id.
        deployment: Id of its deployment; empty without one.
        pool: Name of its work pool; empty without one.
        state: One word of a fixed set: the label `state`.
        since: When it got this state, or, of one that has not begun, its scheduled time; Unix time.
        expected: Its scheduled time.
        started: Its first start; None if it has not begun.
        ended: Its end; None if it has not ended.
        seconds: How long it was Running, in all attempts.
        message: The message of its state.
        attempts: How often it was Running.
    """

    id: str
    deployment: str
    pool: str
    state: str
    since: float
    expected: float
    started: float | None
    ended: float | None
    seconds: float
    message: str = ""
    attempts: int = 0


def deployment(found: Json, flow: str) -> Deployment:
    """Return a deployment of the server's answer, of a flow of that name."""
    tags = dict(each.split(":", 1) for each in found["tags"] if ":" in each)
    active = () if found["paused"] else tuple(each["schedule"] for each in found["schedules"] if each["active"])
    return Deployment(
        (flow, found["name"], tags.get("tier", ""), tags.get("owner", ""), found["work_pool_name"] or ""),
        active,
        bool(found["schedules"]),
        _time(found["updated"]),
        found["description"] or "",
    )


def pool(found: Json) -> Pool:
    """Return a work pool of the server's answer."""
    has_workers = not str(found["type"]).endswith((":push", ":managed"))
    return Pool(found["name"], found["concurrency_limit"], bool(found["is_paused"]), has_workers)


def run(found: Json) -> Run:
    """Return a flow run of the server's answer."""
    state, expected = found["state"], _time(found["expected_start_time"] or found["created"])
    started, ended = (_time(found[each]) if found[each] else None for each in ("start_time", "end_time"))
    word = FINAL.get(state["type"]) or UNFINISHED.get(state["type"])
    return Run(
        id=found["id"],
        deployment=found["deployment_id"] or "",
        pool=found["work_pool_name"] or "",
        state=word or (state["name"] if state["name"] in _WAITING else "Scheduled"),
        since=_time(state["timestamp"]) if word else expected,
        expected=expected,
        # A run that ends without having begun gets its end as its start.
        started=None if started is None or (ended is not None and started >= ended) else started,
        ended=ended,
        seconds=float(found["total_run_time"]),
        message=state["message"] or "",
        attempts=int(found["run_count"]),
    )


def time(text: str) -> float:
    """Return the Unix time of a time of the server."""
    return datetime.fromisoformat(text).timestamp()


_time = time
