"""The decision about flow runs: from what Kubernetes and the Prefect server say, without an API.

| a flow run is | and | so |
|---|---|---|
| Running, Pending, Paused | its Job has ended or is gone, and no pod of it is left | Crashed, with the cause |
| Pending | its pod waits | InfrastructurePending or InfrastructureWaiting, with the reason |
| Pending | it did not begin within `start_timeout_seconds` of its Job | Crashed, with the reason; its Job is deleted |
| Pending | the Prefect worker made no Job | Scheduled again, three times at most; then Crashed |
| Running, Paused | its driver runs for longer than `max_runtime_seconds` | Failed; its Job is deleted |
| Suspended, Scheduled, ended | the same | its Job is deleted |
| Cancelling | its driver has not begun, or takes too long | its Job is deleted |
| Cancelling | its driver has ended | Cancelled |
| Cancelled | its Job is still there | its Job is deleted |
| Crashed | `on_crash: retry N`, and it was not cancelled or at its deadline | Scheduled again, N times at most |
| late | `after_outage: latest` and a newer one is due, or `none` | Skipped |

A flow run with a pod that may run is never Crashed: what Kubernetes says is believed, and silence is not.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

from tidepool.operate.sweep import causes
from tidepool.operate.sweep.drivers import Driver, Drivers, created, ended_at, running_since
from tidepool.operate.sweep.records import Decision, FlowRun, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from tidepool.operate.sweep.observation import Observation

WAITING = ("InfrastructurePending", "InfrastructureWaiting")
"""Names of the state of a run that waits for its pod. The server refuses to go from one state to another of the same
name, so that they take turns; to force it could overwrite a Running that has come in between."""
SKIPPED = "Skipped"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

# What the driver reported before its end is on the server by then.
_REPORTED = timedelta(seconds=5)
# A pod's first failures are often gone at its next attempt.
_SETTLED = timedelta(seconds=5)
# A Prefect worker makes a Job within seconds, three attempts included.
_JOB_MADE = timedelta(seconds=60)
_RESUBMISSIONS = 3
# Prefect's own cancellation of a hung flow: the driver knows at once, and kills the flow after 30 s.
_CANCELLED_BY_DRIVER = timedelta(seconds=40)
# Kubernetes counts whole seconds; the clocks of its API and of the Prefect server differ by less.
_SKEW = timedelta(seconds=3)
_LATE = timedelta(seconds=15)
_MISSED = timedelta(seconds=60)
_FIRST_RETRY = timedelta(seconds=10)
_LAST_RETRY = timedelta(minutes=10)
_STARTS = "its pod starts"
_RESUBMITTED = "no Prefect worker made its Job"
_NOT_STARTED = "did not start within"


def needs_history(run: FlowRun, now: datetime) -> bool:
    """Return whether a decision about this run depends on its earlier states."""
    match run.state.type:
        case "CRASHED":
            return run.policy.crash_retries > 0 and bool(run.deployment)
        case "PENDING":
            skips = run.policy.after_outage != "all" and bool(run.schedule) and now > run.expected + _LATE
            return skips or now > run.state.since + _JOB_MADE
    return False


def decisions(observations: Sequence[Observation], runs: Iterable[FlowRun], now: datetime) -> list[Decision]:
    """Return what to do, at most one decision for each flow run.

    Args:
        observations: All namespaces of flow runs, observed after the runs were read.
        runs: The flow runs of the work pools that have not ended, that have crashed lately, or that a Job belongs to.
        now: The time at which the observation began, with a time zone.
    """
    runs = list(runs)
    drivers = Drivers(observations, now)
    skipped = _skipped(runs, now)
    found = []
    for run in runs:
        made = drivers.of(run)
        try:
            decision = _skip(run, made, skipped.get(run.id, ""), now) or _decision(run, made, now)
        except Exception as error:  # noqa: BLE001 - an object of one run must not keep all others
            decision = Decision(run, problem=f"{type(error).__name__}: {error}")
        if decision is not None:
            found.append(decision)
    return found


def ended(runs: Iterable[FlowRun]) -> dict[str, datetime]:
    """Return when flow runs have ended Completed, Failed or Cancelled, by id, as `leftovers` needs it."""
    return {run.id: run.state.since for run in runs if run.state.type in FINAL - {"CRASHED"}}


# --- a flow run that has not ended, or whose Job has not --------------------------------------------------------------


def _decision(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    if not made.here:
        return None
    if overrun := _overrun(run, made, now):
        return overrun
    decide = {
        "PENDING": _pending,
        "RUNNING": _lost,
        "PAUSED": _lost,
        "CANCELLING": _cancelling,
        "CRASHED": _crashed,
    }.get(run.state.type, _cancelled)
    # A suspended run has no process, and needs none.
    return None if _is_suspended(run) else decide(run, made, now)


def _is_suspended(run: FlowRun) -> bool:
    """Return whether a run is to have no process; another type of state may have that name, too."""
    return run.state.type == "PAUSED" and run.state.name == "Suspended"


def _pending(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    job = made.job
    # A Job of this attempt is younger than Pending and Submitting.
    earlier = run.state.name not in WAITING and (job is None or created(job) + _SKEW < run.state.since)
    if made.may_run:
        if job is None or causes.ended(job):
            return None  # an earlier pod ends
        if not earlier:
            return _waiting(run, made, created(job), now)
        late = now > run.state.since + run.policy.start_timeout
        return _not_started(run, made, "the driver of an earlier attempt has not ended", now) if late else None
    if earlier:
        return _without_job(run, now)
    return _lost(run, made, now)


def _waiting(run: FlowRun, made: Driver, since: datetime, now: datetime) -> Decision | None:
    """Decide about a run whose Job has not ended, and whose flow has not begun."""
    reason, begun = made.cause(), causes.began(made.own_pods())
    if now > since + run.policy.start_timeout:
        why = reason or ("its driver runs, its flow has not begun" if begun else _STARTS)
        return _not_started(run, made, why, now)
    if begun or (reason and now < since + _SETTLED):
        return None
    message = reason or _STARTS
    if run.state.message == message:
        return None
    name = next(each for each in WAITING if each != run.state.name)
    return _set(run, "PENDING", name, message, now)


def _not_started(run: FlowRun, made: Driver, why: str, now: datetime) -> Decision:
    message = f"{_NOT_STARTED} {_seconds(run.policy.start_timeout)} s: {why}"
    return _set(run, "CRASHED", "Crashed", message, now, made)


def _without_job(run: FlowRun, now: datetime) -> Decision | None:
    """Decide about a run that a Prefect worker has picked up, and for which it has made no Job."""
    # It became due between the readings: its history, which has one state at least, is read in the next pass.
    if now < run.state.since + _JOB_MADE or not run.history:
        return None
    before = sum(each.type == "SCHEDULED" and each.message.startswith(_RESUBMITTED) for each in run.history)
    if before < _RESUBMISSIONS:
        message = f"{_RESUBMITTED} within {_seconds(_JOB_MADE)} s; attempt {before + 1} of {_RESUBMISSIONS}"
        return _set(run, "SCHEDULED", "Scheduled", message, now)
    return _set(run, "CRASHED", "Crashed", f"{_RESUBMITTED} in {_RESUBMISSIONS + 1} attempts", now)


def _overrun(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    """Decide about a driver that runs too long, whatever state its flow has set.

    Not about one that has not begun or is cancelled, which have limits of their own.
    """
    limit = run.policy.max_runtime
    began = max((each for pod in made.own_pods() for each in running_since(pod)), default=None)
    if not limit or not began or now <= began + limit or run.state.type in {"PENDING", "CANCELLING"}:
        return None
    if run.state.type in {"RUNNING", "PAUSED"} and not _is_suspended(run):
        return _set(run, "FAILED", "Failed", f"ran longer than max_runtime_seconds ({_seconds(limit)})", now, made)
    if now < run.state.since + _REPORTED:
        return None  # it is about to exit
    return Decision(run, jobs=jobs) if (jobs := made.to_delete()) else None


def _lost(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    """Decide about a run that should have a process: Crashed if it has none."""
    if made.may_run:
        return None
    job = made.job
    # Of an earlier attempt: that of this one is gone.
    if job is not None and causes.ended(job) and ended_at(job) + _SKEW < run.state.since:
        job = None
    if job is None:
        # Without a Prefect worker's word that it made a Job, or one seen here, it may be executed elsewhere, by hand.
        had = bool(run.infrastructure) or run.state.name in WAITING
        known = had and now > run.state.since + 2 * _REPORTED
        return _set(run, "CRASHED", "Crashed", "its Job was deleted", now) if known else None
    if now < ended_at(job) + _REPORTED:
        return None
    output = causes.last_lines(made.own_pods()) if run.state.type == "PENDING" else ""
    return _set(run, "CRASHED", "Crashed", made.cause(), now, output=output)


def _cancelling(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    if made.may_run:
        if causes.began(made.pods) and now < run.state.since + _CANCELLED_BY_DRIVER:
            return None
        return Decision(run, jobs=jobs) if (jobs := made.to_delete()) else None
    if now < run.state.since + _REPORTED:
        return None
    return _set(run, "CANCELLED", "Cancelled", "cancelled; its driver has ended", now, made)


def _cancelled(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    """Decide about the Jobs of a run that has ended: those that a cancelled one left, and those that never began."""
    if run.state.type not in FINAL or now < run.state.since + _REPORTED:
        return None
    # Its Job should be gone, and the API may have refused that: such a driver may never end by itself.
    hung = run.state.type == "CRASHED" and run.state.message.startswith(_NOT_STARTED)
    stuck = made.may_run and (hung or not causes.began(made.pods))
    closing = now < run.state.since + _CANCELLED_BY_DRIVER
    if stuck or (run.state.type == "CANCELLED" and (not made.may_run or not closing)):
        return Decision(run, jobs=jobs) if (jobs := made.to_delete()) else None
    return None


# --- policies ---------------------------------------------------------------------------------------------------------


def _crashed(run: FlowRun, made: Driver, now: datetime) -> Decision | None:
    if made.may_run:
        return _cancelled(run, made, now)
    before = crash_retries(run.history)
    if not run.deployment or before >= run.policy.crash_retries or not run.history:
        return None
    if causes.over_deadline(made.job) or cancelled_by_person(run.history):
        return None
    delay = min(_FIRST_RETRY * 2**before, _LAST_RETRY)
    message = f"retry {before + 1} of {run.policy.crash_retries} after a crash: {run.state.message}"
    return _set(run, "SCHEDULED", "AwaitingRetry", message, run.state.since + delay)


def crash_retries(history: Iterable[State]) -> int:
    """Return how many times a run has been scheduled again after a crash."""
    types = [each.type for each in history]
    return sum(pair == ("CRASHED", "SCHEDULED") for pair in pairwise(types))


def cancelled_by_person(history: Sequence[State]) -> bool:
    """Return whether the current attempt of a run was to be cancelled."""
    for each in reversed(history):
        if each.type == "CANCELLING":
            return True
        if each.type == "SCHEDULED":
            return False
    return False


def _skipped(runs: Iterable[FlowRun], now: datetime) -> dict[str, str]:
    """Return the ids of the runs that are not to be executed because they are late, with the reason."""
    by_schedule: dict[tuple[str, str], list[FlowRun]] = defaultdict(list)
    for run in runs:
        if run.schedule and run.expected <= now:
            by_schedule[run.deployment, run.schedule].append(run)
    found = {}
    for due in by_schedule.values():
        newest = max(each.expected for each in due)
        for run in due:
            late = run.expected + _LATE < _picked_up(run, now)
            missed = run.expected + _MISSED < _picked_up(run, now)
            if run.policy.after_outage == "latest" and late and run.expected < newest:
                found[run.id] = f"late, and a newer run of its schedule is due since {newest:%Y-%m-%d %H:%M:%S} UTC"
            if run.policy.after_outage == "none" and missed:
                found[run.id] = f"late by more than {_seconds(_MISSED)} s"
    return found


def _picked_up(run: FlowRun, now: datetime) -> datetime:
    """Return when a Prefect worker took a run up for the first time; now, if none has."""
    if run.state.type == "SCHEDULED":
        return now
    return next((each.since for each in run.history if each.type == "PENDING"), run.expected)


def _skip(run: FlowRun, made: Driver, reason: str, now: datetime) -> Decision | None:
    waits = run.state.type == "SCHEDULED" and run.state.name != "AwaitingRetry"
    if not reason or not (waits or (run.state.type == "PENDING" and not causes.began(made.pods))):
        return None
    if run.begun or any(each.type == "RUNNING" for each in run.history):
        return None  # a later attempt, or one that was suspended
    return _set(run, "CANCELLED", SKIPPED, f"skipped by after_outage: {run.policy.after_outage}: {reason}", now, made)


# --- shared -----------------------------------------------------------------------------------------------------------


def _set(
    run: FlowRun, kind: str, name: str, message: str, when: datetime, delete: Driver | None = None, *, output: str = ""
) -> Decision:
    return Decision(run, State("", kind, name, message, when), delete.to_delete() if delete else (), output)


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():g}"
