"""The state of the platform, or of one flow run, and what is wrong in it. Pure: no requests."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from tidepool.report import exits
from tidepool.report.reason import plain, reason, why
from tidepool.report.run_page import duration
from tidepool.report.run_record import RunRecord
from tidepool.report.run_report import runbooks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Json = dict[str, Any]

# A Prefect worker takes up a run within 15 s; the server calls it late after as long.
_LATE = timedelta(seconds=60)
# As the automations and alerts: run-stuck-pending, run-stuck-cancelling, WorkerSilent.
_STUCK = {"PENDING": timedelta(minutes=20), "CANCELLING": timedelta(minutes=3)}
_SILENT = timedelta(seconds=120)
_DRIFT_OLD = timedelta(hours=3)
_FAILURES = 2
# As the automation crash-loop: from the third crash on, its pods take capacity from others for nothing.
_CRASHES = 3
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_BAD = {"FAILED", "CRASHED"}


@dataclass(frozen=True)
class Finding:
    """Something that on-call should know.

    Attributes:
        kind: A word of a fixed set, such as `late`.
        subject: The thing: a deployment, a run, a work pool.
        text: What is the matter.
        runbook: Path of the runbook.
        wrong: A person has to act; otherwise it is meant so.
        since: When it began, in ISO 8601; empty if that is unknown.
    """

    kind: str
    subject: str
    text: str
    runbook: str = ""
    wrong: bool = True
    since: str = ""


@dataclass(frozen=True)
class Overview:
    """The whole platform.

    Attributes:
        findings: What is wrong, or meant to be different.
        unknown: Sources that did not answer, with the reason.
    """

    findings: list[Finding] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """True if something is wrong, or the Prefect server does not answer."""
        return any(each.wrong for each in self.findings) or "prefect" in self.unknown


@dataclass(frozen=True)
class RunStatus:
    """One flow run.

    Attributes:
        id: Its id.
        name: Its name.
        deployment: Its deployment, or its flow without one.
        deployment_id: Id of the deployment; None without one.
        state: Name of its state.
        kind: Type of its state.
        why: Why it is in it, in one sentence.
        advice: What to do; empty for nothing.
        links: Addresses by title.
        seconds: Duration, so far or in all.
        timeline: Seconds after its creation, state and message.
        items: Number of task runs by type of state.
        failed: Failed task runs: name and error.
        objects: Job, pods and Dask clusters in words.
        warnings: The last warnings of its log.
        mismatches: Contradictions between the server and Kubernetes.
        unknown: Sources that did not answer, with the reason.
    """

    id: str
    name: str
    deployment: str
    deployment_id: str | None
    state: str
    kind: str
    why: str
    advice: str
    links: dict[str, str]
    seconds: float
    timeline: list[tuple[float, str, str]]
    items: dict[str, int]
    failed: list[tuple[str, str]]
    objects: list[str]
    warnings: list[str]
    mismatches: list[str]
    unknown: dict[str, str]

    @property
    def ended(self) -> bool:
        """True if its state is final."""
        return self.kind in _FINAL

    @property
    def wrong(self) -> bool:
        """True if it has failed or crashed, or server and Kubernetes contradict each other."""
        return self.kind in _BAD or bool(self.mismatches)


@dataclass(frozen=True)
class Kubernetes:
    """The objects of one flow run on Kubernetes.

    Attributes:
        jobs: Its Jobs.
        pods: Its driver pods.
        clusters: Its Dask clusters.
        dask_pods: Pods of these.
    """

    jobs: Sequence[Json] = ()
    pods: Sequence[Json] = ()
    clusters: Sequence[Json] = ()
    dask_pods: Sequence[Json] = ()


# --- now --------------------------------------------------------------------------------------------------------------


def waiting(runs: Iterable[Json], names: Mapping[str, str], now: datetime) -> list[Finding]:
    """Return the runs that are late or stuck.

    Args:
        runs: Flow runs that have not ended, or are due.
        names: Names of deployments by id.
        now: The time.
    """
    late: dict[str, list[datetime]] = defaultdict(list)
    found = []
    for run in runs:
        state, subject = run["state"], names.get(run["deployment_id"] or "", run["name"])
        since = _time(state["timestamp"])
        if state["type"] == "SCHEDULED" and state["name"] != "AwaitingConcurrencySlot":
            due = _time(run["next_scheduled_start_time"] or run["expected_start_time"])
            if now > due + _LATE:
                late[subject].append(due)
        elif (limit := _STUCK.get(state["type"])) and now > since + limit:
            text = f"has been {state['name']} for {_ago(now, since)}: {_waits_for(run)}"
            runbook = f"run-stuck-{state['type'].lower()}.md"
            found.append(Finding("stuck", f"{subject} ({run['id'][:8]})", text, runbook, since=since.isoformat()))
    for subject, times in late.items():
        text = "a flow run has been due" if len(times) == 1 else f"{len(times)} flow runs have been due, the first"
        first = min(times)
        words = f"{text} for {_ago(now, first)}"
        found.append(Finding("late", subject, words, "runs-late.md", since=first.isoformat()))
    return found


def _waits_for(run: Json) -> str:
    """Return why a run is in its state, or what has to end for it to leave it."""
    if message := plain(run["state"]["message"]):
        return message
    if run["state"]["type"] != "CANCELLING":
        return "no reason recorded"
    place, name = _place(run)
    if not place:
        return "no process of it is recorded"
    kind = f"process {name} on {place}" if is_process(run) else f"Job {name} in namespace {place}"
    return f"its {kind} has not ended, or has not told the server"


def is_process(run: Json) -> bool:
    """Return whether a run has a process of a machine (`host:1234`), and not a Job (`namespace:name`)."""
    return _place(run)[1].isdigit()


def _place(run: Json) -> tuple[str, str]:
    """Return namespace and Job of a run, or machine and process id; empty where none is recorded."""
    place, _, name = str(run["infrastructure_pid"] or "").rpartition(":")
    return place, name


def failing(ended: Iterable[Json], names: Mapping[str, str], now: datetime) -> list[Finding]:
    """Return the deployments whose last two runs or more have failed or crashed.

    Args:
        ended: Completed, Failed and Crashed runs, those that ended last first.
        names: Names of deployments by id.
        now: The time.
    """
    by_deployment: dict[str, list[Json]] = defaultdict(list)
    for run in ended:
        if run["deployment_id"]:
            by_deployment[run["deployment_id"]].append(run)
    found = []
    for identity, runs in by_deployment.items():
        row = next((at for at, run in enumerate(runs) if run["state"]["type"] not in _BAD), len(runs))
        if row >= _FAILURES:
            last = runs[0]["state"]
            ago = _ago(now, _time(last["timestamp"]))
            text = f"the last {row} flow runs failed or crashed, the newest {ago} ago"
            words, since = why(last["type"], last["message"]), runs[row - 1]["state"]["timestamp"]
            name = names.get(identity, identity)
            loops = row >= _CRASHES and all(each["state"]["type"] == "CRASHED" for each in runs[:_CRASHES])
            runbook = "crash-loop.md" if loops else "run-failed.md"
            words += f"; `tidepool pause {shlex.quote(name)} --until 4h --reason crashes`" if loops else ""
            found.append(Finding("failing", name, f"{text}: {words}", runbook, since=since))
    return found


def paused(deployments: Iterable[Json], pauses: Iterable[Json], now: datetime) -> list[Finding]:
    """Return the deployments that are paused, with who paused them.

    Args:
        deployments: Paused deployments.
        pauses: Recorded pauses: `deployment` (flow/name), `by`, `reason`, `until`.
        now: The time.
    """
    known = {each["deployment"].rpartition("/")[2]: each for each in pauses}
    found = []
    for each in deployments:
        pause = known.get(each["name"])
        if pause is None:
            found.append(Finding("paused", each["name"], "no reason recorded", wrong=False))
            continue
        until = _time(pause["until"])
        over = now > until
        text = f"by {pause['by']} until {until:%Y-%m-%d %H:%M} UTC: {pause['reason']}"
        text += f"; that is over: `tidepool resume {shlex.quote(each['name'])}`" if over else ""
        found.append(Finding("paused", each["name"], text, wrong=over))
    return found


def pools(found: Iterable[Json], workers: Mapping[str, Sequence[Json]], now: datetime) -> list[Finding]:
    """Return the work pools that are paused, or that no Prefect worker polls.

    Args:
        found: Work pools.
        workers: Prefect workers by pool.
        now: The time.
    """
    findings = []
    for each in found:
        if each["is_paused"]:
            # The server does not record who paused it.
            text = f"no run of it starts; when that is over: `prefect work-pool resume {shlex.quote(each['name'])}`"
            findings.append(Finding("paused", f"work pool {each['name']}", text, "runs-late.md"))
        if str(each["type"]).endswith((":push", ":managed")):
            continue
        told = [one["last_heartbeat_time"] for one in workers.get(each["name"], ())]
        beats = [_time(one) for one in told if one]
        if not beats or now > max(beats) + _SILENT:
            said = f"the last was {_ago(now, max(beats))} ago" if beats else "none has polled it"
            text = f"no Prefect worker sends heartbeats: {said}"
            since = max(beats).isoformat() if beats else ""
            subject, runbook = f"work pool {each['name']}", "work-pool-not-ready.md"
            findings.append(Finding("worker silent", subject, text, runbook, since=since))
    return findings


def drift(reports: Sequence[Json], now: datetime) -> list[Finding]:
    """Return what the last drift report says; nothing without one.

    Args:
        reports: The newest artifact of the key `drift-report`.
        now: The time.
    """
    for each in reports:
        summary, age = str(each["description"] or ""), now - _time(each["updated"])
        if "as in Git" not in summary or "to resume" in summary:
            text = f"{summary} ({_ago(now, now - age)} ago)"
            return [Finding("drift", "server", text, "drift-found.md", since=each["updated"])]
        if age > _DRIFT_OLD:
            old = f"the last report is {_ago(now, now - age)} old"
            return [Finding("drift", "drift-report", old, "drift-report.md")]
    return []


def orphans(left: Iterable[Any]) -> list[Finding]:
    """Return what flow runs have left behind on Kubernetes; the operator deletes it within seconds."""
    named = [(f"{each.kind} {each.namespace}/{each.name}", each.reason) for each in left]
    return [Finding("orphan", name, why, "cluster-removed.md") for name, why in named]


# --- one run ----------------------------------------------------------------------------------------------------------


def mismatches(run: Json, kubernetes: Kubernetes | None) -> list[str]:
    """Return the contradictions between the server's state of a run and what Kubernetes has.

    Args:
        run: The flow run.
        kubernetes: None if Kubernetes was not read.
    """
    if kubernetes is None or not run["infrastructure_pid"]:
        return []  # it does not run on this Kubernetes cluster
    kind, name = run["state"]["type"], run["state"]["name"]
    running = [each for each in kubernetes.jobs if not _job_end(each)]
    found = []
    if kind in {"RUNNING", "CANCELLING"} and not running and not _alive(kubernetes.pods):
        ended = next((_job_end(each) for each in kubernetes.jobs if _job_end(each)), "")
        found.append(f"the server says {name}, and its Job {f'is {ended}' if ended else 'is gone'}")
    if kind in _FINAL:
        found += [f"the server says {name}, and Job {_name(each)} has not ended" for each in running]
        alive = [each for each in kubernetes.clusters if "deletionTimestamp" not in each["metadata"]]
        found += [f"the server says {name}, and Dask cluster {_name(each)} is still there" for each in alive]
    return found


def run_status(
    run: Json,
    deployment: Json,
    history: Sequence[Json],
    items: Mapping[str, int],
    failed: Sequence[Json],
    warnings: Sequence[Json],
    kubernetes: Kubernetes | None,
    unknown: Mapping[str, str],
    now: datetime,
) -> RunStatus:
    """Return the status of a flow run.

    Args:
        run: The flow run, as the API returns it.
        deployment: Its deployment, or its flow without one.
        history: Its states, oldest first.
        items: Number of its task runs by type of state.
        failed: Some of its failed task runs.
        warnings: The last lines of its log from WARNING on.
        kubernetes: What Kubernetes has of it; None if that is unknown.
        unknown: Sources that did not answer, with the reason.
        now: The time.
    """
    state = run["state"]
    kind = state["type"]
    record = RunRecord(done=items.get("COMPLETED", 0), failed=items.get("FAILED", 0) + items.get("CRASHED", 0))
    ended = reason(kind, state["message"], record) if kind in _FINAL else None
    said = ended.sentence if ended else _waits_for(run)
    if kind == "COMPLETED" and state["message"]:
        said = plain(state["message"])  # a warning that the run has written into it
    created = _time(run["created"])
    begun, end = run["start_time"], run["end_time"]
    seconds = (_time(end) if end else now) - _time(begun) if begun else timedelta()
    contradictions = mismatches(run, kubernetes)
    stuck = kind in _STUCK and now > _time(state["timestamp"]) + _STUCK[kind]
    advice = ended.advice if ended else _go_on(run, stuck=stuck, contradictory=bool(contradictions))
    links = runbooks(deployment.get("description"), kind)
    if stuck:
        links[f"Runbook of runs that stay {state['name']}"] = f"docs/runbooks/run-stuck-{kind.lower()}.md"
    elif contradictions:
        links["Runbook of lost runs"] = "docs/runbooks/run-without-heartbeat.md"
    return RunStatus(
        id=run["id"],
        name=run["name"],
        deployment=deployment["name"],
        deployment_id=run["deployment_id"],
        state=state["name"],
        kind=kind,
        why=said,
        advice=advice,
        links=links,
        seconds=max(seconds.total_seconds(), 0.0),
        timeline=[
            ((_time(each["timestamp"]) - created).total_seconds(), each["name"], plain(each["message"]))
            for each in history
        ],
        items=dict(items),
        failed=[(each["name"], plain((each["state"] or {}).get("message"))) for each in failed],
        objects=_objects(kubernetes),
        warnings=[plain(each["message"]) for each in warnings],
        mismatches=contradictions,
        unknown=dict(unknown),
    )


def _go_on(run: Json, *, stuck: bool, contradictory: bool) -> str:
    """Return what to do about a run that has not ended; empty: nothing."""
    place, name = _place(run)
    if stuck and run["state"]["type"] == "PENDING":
        return f"Remove what it waits for, or end it: `prefect flow-run cancel {run['id']}`"
    if stuck and place and not contradictory and not is_process(run):
        return f"Delete its Job, and its pods go with it: `kubectl -n {place} delete job {name}`"
    if stuck:
        return "See that nothing of it runs, then end it by hand: the command is in the runbook."
    return "Server and Kubernetes disagree: see the runbook." if contradictory else ""


def _objects(kubernetes: Kubernetes | None) -> list[str]:
    if kubernetes is None:
        return []
    found = [f"Job {_name(each)}: {_job_end(each) or 'has not ended'}" for each in kubernetes.jobs]
    found += [f"driver pod {_name(each)}: {_pod(each)}" for each in kubernetes.pods]
    for each in kubernetes.clusters:
        going = ", being deleted" if "deletionTimestamp" in each["metadata"] else ""
        found.append(f"Dask cluster {_name(each)}{going}")
    found += [f"Dask pod {_name(each)}: {_pod(each)}" for each in kubernetes.dask_pods]
    return found or ["nothing of it on Kubernetes"]


def _pod(pod: Json) -> str:
    status = pod.get("status") or {}
    words = [str(status.get("phase", "Unknown"))]
    for each in status.get("containerStatuses") or ():
        for part in (each.get("state") or {}, each.get("lastState") or {}):
            ended = part.get("terminated") or {}
            if ended and ended.get("reason") != "Completed":
                words.append(exits.container(ended))
            if waits := (part.get("waiting") or {}).get("reason"):
                words.append(waits)
        if restarts := each.get("restartCount"):
            words.append(f"{restarts} restarts")
    return ", ".join(words)


def _alive(pods: Iterable[Json]) -> bool:
    return any((each.get("status") or {}).get("phase") not in {"Succeeded", "Failed"} for each in pods)


def _job_end(job: Json) -> str:
    conditions = (job.get("status") or {}).get("conditions") or ()
    true = [each["type"] for each in conditions if each["status"] == "True"]
    return next((each for each in true if each in {"Complete", "Failed"}), "")


def _name(each: Json) -> str:
    return str(each["metadata"]["name"])


def _ago(now: datetime, then: datetime) -> str:
    return duration((now - then).total_seconds())


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
