"""What on-call reads of one incident is one sentence: in state, report, message, `tidepool status` and alert."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.unit.test_incidents import deployment
from tests.unit.test_incidents import run as exported
from tests.unit.test_status import run, status_of
from tests.unit.test_sweep_causes import FAILED, job, pod
from tidepool.errors import InputError, StorageError
from tidepool.operate.exporter.incidents import Failure, Told
from tidepool.operate.exporter.notifications import _sentence, message
from tidepool.operate.flow_run import cause
from tidepool.operate.memory import Memory
from tidepool.operate.status import picture, schedules
from tidepool.operate.sweep import causes, reports
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.report.reason import reason, sentence
from tidepool.report.run_page import Run, page
from tidepool.report.run_record import Item, RunRecord
from tidepool.upstream.prefect_runner import Ending

if TYPE_CHECKING:
    from collections.abc import Callable

TOP = Path(__file__).parents[2]
NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
RULES = yaml.safe_load((TOP / "helm/tidepool/files/alerts.yaml").read_text())["groups"][0]["rules"]
SUMMARIES = {rule["alert"]: rule["annotations"]["summary"] for rule in RULES}
OUT_OF_MEMORY = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}


def raised(error: Exception) -> str:
    """The message that Prefect's engine gives the state of a flow with this error."""
    return f"Flow run encountered an exception: {type(error).__name__}: {error}"


def record(error: Exception | None = None) -> RunRecord:
    """Figures of a run, one of whose items has this error."""
    found = RunRecord()
    found.submit(3)
    found.end(Item("frame-1"))
    if error:
        found.end(Item("frame-3", error=f"{type(error).__name__}: {error}; item: index=3"))
    return found


BAD_CELL = InputError("integers.csv:2:2: 'x7' is not an integer")
POISONED = ValueError("frame 3 is not an image")
AWAY = StorageError("s3://flows/x.csv: the store does not answer")
STALE = InputError("the last week is 6 weeks old, more than max_age_weeks=2")
QUOTA = {
    "reason": "FailedCreate",
    "message": "pods is forbidden: exceeded quota: runs, requested: pods=1, used: pods=11, limited: pods=11",
    "involvedObject": {"uid": "uid-blue-heron-x7k2p"},
}
NO_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": 'failed: "docker.io/x": not found'}}
# Of each incident that ends a run: the kind of its state, and its message as the one who sets it makes it.
STATES: dict[str, tuple[str, Callable[[], str]]] = {
    "driver out of memory, its supervisor": ("CRASHED", lambda: cause(Ending(-9), Memory(1, "1Gi"))),
    "driver out of memory, operator": (
        "CRASHED",
        lambda: causes.cause(job(FAILED), [pod(OUT_OF_MEMORY, "Failed")], []),
    ),
    "quota": ("CRASHED", lambda: f"did not start within 600 s: {causes.cause(job(), [], [QUOTA])}"),
    "image": ("CRASHED", lambda: f"did not start within 600 s: {causes.cause(job(), [pod(NO_IMAGE)], [])}"),
    "bad input": ("FAILED", lambda: sentence("FAILED", raised(BAD_CELL), record())),
    "store away": ("FAILED", lambda: sentence("FAILED", raised(AWAY), record(AWAY))),
    "stale data": ("FAILED", lambda: sentence("FAILED", raised(STALE), record())),
    "poisoned item": ("FAILED", lambda: sentence("FAILED", raised(POISONED), record(POISONED))),
}


@pytest.mark.parametrize("incident", STATES)
def test_the_end_of_a_run_is_one_sentence_everywhere(incident: str) -> None:
    kind, written = STATES[incident]
    said = written()
    assert said
    # Its report: whatever is known of its items when it is written.
    for known in (record(), record(POISONED)):
        found = reason(kind, said, known)
        text = page(Run("i", "n", "d", kind.capitalize(), found, 1.0, 2.0, known))
        assert text.splitlines()[0].replace("\\", "") == f"# {kind.capitalize()}: {said}"
        assert found.advice
    # `tidepool status`, of the run and of everything.
    status = status_of(run(kind, message=said))
    assert (status.why, status.advice) == (said, found.advice)
    (failing,) = picture.failing([run(kind, message=said)] * 2, {"d1": "nightly"}, NOW)
    assert failing.text == f"the last 2 flow runs failed or crashed, the newest 1 min 0 s ago: {said}"
    # The message, without the arguments of an item.
    ended = exported(1, 0, kind.capitalize(), text=said)
    failure = Failure(ended, deployment(), _sentence(ended), None)
    sent = message(Told((failure,), causes=1, attempts=1), lambda _: None, 0)
    expected = said.replace(" (frame-3: index=3)", "")
    assert sent.body.splitlines()[0].replace("\u200b", "") == f"`{expected.replace('`', chr(39))}`"
    assert failure.sentence == expected


def test_both_who_see_a_driver_killed_for_its_memory_say_the_same() -> None:
    first, second = (STATES[f"driver out of memory, {each}"][1]() for each in ("its supervisor", "operator"))
    assert first == second == "driver out of memory (limit 1Gi); raise memory_limit"
    unlimited = pod(OUT_OF_MEMORY, "Failed")
    del unlimited["spec"]["containers"][0]["resources"]["limits"]
    assert causes.cause(job(FAILED), [unlimited], []) == cause(Ending(-9), Memory(1, ""))


def test_the_operators_report_has_the_sentence_of_the_state_that_it_has_set() -> None:
    said = STATES["quota"][1]()
    ended = {"type": "CRASHED", "name": "Crashed", "message": said, "timestamp": NOW.isoformat()}
    found = {"id": "i", "name": "n", "state": ended, "start_time": None, "end_time": None}
    failed = {"name": "a", "state": {"type": "FAILED", "name": "Failed", "message": "bad"}}
    task_runs = [{**failed, "start_time": None, "total_run_time": 1.0, "run_count": 1}]
    data = reports.artifact("d", {}, found, task_runs, [], 200, DaskWorkers(NOW))["data"]
    assert data.splitlines()[0] == f"# Crashed: {said}"


def at(**ago: float) -> str:
    return (NOW - timedelta(**ago)).isoformat()


def late() -> list[picture.Finding]:
    return picture.waiting([run("SCHEDULED", "Late", expected_start_time=at(minutes=10))], {}, NOW)


def stuck() -> list[picture.Finding]:
    return picture.waiting([run("PENDING", state={"timestamp": at(minutes=30)})], {}, NOW)


def silent() -> list[picture.Finding]:
    return picture.pools([{"name": "p", "type": "process", "is_paused": False}], {}, NOW)


# Of each alert: the finding of the same thing, and the words that both have between their figures and names.
FINDINGS: dict[str, tuple[Callable[[], list[picture.Finding]], tuple[str, ...]]] = {
    "TidepoolRunsLate": (late, ("flow run", "has been due for ")),
    "TidepoolRunStuck": (stuck, ("has been ", " for ")),
    "TidepoolWorkerSilent": (silent, ("o Prefect worker", " sends heartbeats")),
    "TidepoolRunsFailing": (
        lambda: picture.failing([run("FAILED")] * 2, {}, NOW),
        ("he last ", " flow runs ", "failed or crashed"),
    ),
    "TidepoolSchedulerStopped": (
        lambda: schedules.without_next_run({"a": "a"}, {"a"}),
        (" of the active schedules have no next flow run: Prefect's scheduler does not run",),
    ),
    "TidepoolNothingScheduled": (
        lambda: schedules.without_next_run({"a": "a", "b": "b"}, {"a"}),
        (" has an active schedule and no next flow run",),
    ),
}


@pytest.mark.parametrize("alert", FINDINGS)
def test_status_has_the_sentence_of_the_alert_and_the_alert_leads_to_its_runbook(alert: str) -> None:
    find, words = FINDINGS[alert]
    (found,) = find()
    for text in (SUMMARIES[alert], found.text):
        assert re.search(".*".join(map(re.escape, words)), text), text
    own = TOP / "docs" / "runbooks" / f"{alert}.md"
    assert found.runbook == own.name or f"({found.runbook})" in own.read_text()


def test_drift_is_in_status_and_message_as_the_report_says_it() -> None:
    summary = "production: 2 differ from Git"
    (found,) = picture.drift([{"description": summary, "updated": NOW.isoformat()}], NOW)
    assert found.text.startswith(summary)
    automations = yaml.safe_load((TOP / "automations.yaml").read_text())["automations"]
    (told,) = (each for each in automations if each["name"] == "drift-found")
    assert told["actions"][0]["subject"] == "drift: {{ event.payload.summary }}"
    assert f"Runbook: docs/runbooks/{found.runbook}" in told["actions"][0]["body"]
    flow = (TOP / "flows" / "operations" / "flow.py").read_text()
    assert 'payload={"summary": found.summary' in flow
    assert "found.summary)" in flow
