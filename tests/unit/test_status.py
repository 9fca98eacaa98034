"""What `tidepool status` concludes and prints, from answers of server and Kubernetes. Without either."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tidepool.operate.status import picture, schedules, sources, view
from tidepool.operate.status.picture import Finding, Kubernetes, Overview, RunStatus, run_status
from tidepool.operate.sweep.leftovers import Leftover

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
ID = "750895ca-0000-4000-8000-000000000000"
NAMES = {"d1": "nightly-scoring", "d2": "csv-etl"}


def at(**ago: float) -> str:
    return (NOW - timedelta(**ago)).isoformat()


def run(kind: str, name: str = "", message: str = "", deployment: str = "d1", **more: Any) -> dict[str, Any]:
    state = {"type": kind, "name": name or kind.capitalize(), "message": message, "timestamp": at(minutes=1)}
    return {
        "id": ID,
        "name": "2026-11-27 11:00 · 60 items",
        "deployment_id": deployment,
        "state": {**state, **more.pop("state", {})},
        "created": at(minutes=6),
        "start_time": at(minutes=5),
        "end_time": None,
        "expected_start_time": at(minutes=6),
        "next_scheduled_start_time": None,
        "infrastructure_pid": "flows:nightly-x7k",
        **more,
    }


def job(*conditions: str) -> dict[str, Any]:
    found = [{"type": each, "status": "True"} for each in conditions]
    return {"metadata": {"name": "nightly-x7k"}, "status": {"conditions": found}}


def pod(phase: str, **container: Any) -> dict[str, Any]:
    statuses = [container] if container else []
    return {"metadata": {"name": "driver"}, "status": {"phase": phase, "containerStatuses": statuses}}


def status_of(found: dict[str, Any], kubernetes: Kubernetes | None = None, **more: Any) -> RunStatus:
    history = [
        {"timestamp": at(minutes=6), "name": "Scheduled", "message": ""},
        {"timestamp": at(minutes=5), "name": "Running", "message": ""},
        {"timestamp": at(minutes=1), "name": found["state"]["name"], "message": found["state"]["message"]},
    ]
    values: dict[str, Any] = {
        "deployment": {"name": "nightly-scoring", "description": "[docs/runbooks/x.md](https://h/docs/runbooks/x.md)"},
        "history": history,
        "items": {"COMPLETED": 58, "FAILED": 2},
        "failed": [{"name": "score-7", "state": {"message": "Task run encountered an exception ValueError: bad"}}],
        "warnings": [{"message": "one partition was empty"}],
        "unknown": {},
        **more,
    }
    return run_status(found, kubernetes=kubernetes, now=NOW, **values)


# --- now --------------------------------------------------------------------------------------------------------------


def test_late_runs_of_a_deployment_are_one_finding() -> None:
    late = [run("SCHEDULED", "Late", expected_start_time=at(minutes=ago)) for ago in (5, 10)]
    not_yet = run("SCHEDULED", deployment="d2", expected_start_time=at(seconds=20))
    waits = run("SCHEDULED", "AwaitingConcurrencySlot", deployment="d2")
    (found,) = picture.waiting([*late, not_yet, waits], NAMES, NOW)
    assert found == Finding(
        "late",
        "nightly-scoring",
        "2 flow runs have been due, the first for 10 min 0 s",
        "runs-late.md",
        since=at(minutes=10),
    )


def test_a_stuck_run_has_its_reason_and_its_runbook() -> None:
    pending = run("PENDING", "InfrastructureWaiting", "quota: pods 11 of 11", state={"timestamp": at(minutes=30)})
    cancelling = run("CANCELLING", state={"timestamp": at(minutes=4)}, deployment="d2")
    found = picture.waiting([pending, cancelling, run("PENDING"), run("RUNNING")], NAMES, NOW)
    assert [(each.kind, each.subject, each.runbook) for each in found] == [
        ("stuck", "nightly-scoring (750895ca)", "run-stuck-pending.md"),
        ("stuck", "csv-etl (750895ca)", "run-stuck-cancelling.md"),
    ]
    assert found[0].text == "has been InfrastructureWaiting for 30 min 0 s: quota: pods 11 of 11"
    waits = "its Job nightly-x7k in namespace flows has not ended, or has not told the server"
    assert found[1].text == f"has been Cancelling for 4 min 0 s: {waits}"


@pytest.mark.parametrize(
    ("infrastructure", "words"),
    [
        ("flows:nightly-x7k", "its Job nightly-x7k in namespace flows has not ended, or has not told the server"),
        ("build-1:4711", "its process 4711 on build-1 has not ended, or has not told the server"),
        (None, "no process of it is recorded"),
    ],
)
def test_a_run_that_is_being_cancelled_says_what_has_to_end(infrastructure: str | None, words: str) -> None:
    found = run("CANCELLING", infrastructure_pid=infrastructure)
    assert status_of(found).why == words
    assert picture.is_process(found) == (infrastructure == "build-1:4711")


def test_two_failures_in_a_row_are_a_finding_and_one_is_not() -> None:
    ended = [
        run("FAILED", message="Flow run encountered an exception: ValueError: bad"),
        run("FAILED", deployment="d2"),
        run("CRASHED"),
        run("COMPLETED", deployment="d2"),
        run("COMPLETED"),
    ]
    ended[2]["state"]["timestamp"] = at(hours=2)
    (found,) = picture.failing(ended, NAMES, NOW)
    text = "the last 2 flow runs failed or crashed, the newest 1 min 0 s ago: ValueError: bad"
    assert (found.subject, found.text, found.since) == ("nightly-scoring", text, at(hours=2))


def test_crashes_again_and_again_are_to_be_paused() -> None:
    def failing(*states: str) -> Finding:
        (found,) = picture.failing([run(each, message="killed by SIGKILL (137)") for each in states], NAMES, NOW)
        return found

    found = failing("CRASHED", "CRASHED", "CRASHED", "COMPLETED")
    assert found.runbook == "crash-loop.md"
    assert found.text.endswith("(137); `tidepool pause nightly-scoring --until 4h --reason crashes`")
    for states in (("CRASHED", "CRASHED", "COMPLETED"), ("CRASHED", "CRASHED", "FAILED")):
        assert failing(*states).runbook == "run-failed.md"
        assert "pause" not in failing(*states).text


@pytest.mark.parametrize(
    ("kind", "minutes", "infrastructure", "jobs", "advice", "runbook"),
    [
        ("CANCELLING", 4, "flows:x-1", 1, "go with it: `kubectl -n flows delete job x-1`", "run-stuck-cancelling.md"),
        ("CANCELLING", 4, "flows:x-1", 0, "See that nothing of it runs, then end it", "run-stuck-cancelling.md"),
        ("CANCELLING", 4, "build-1:4711", 0, "See that nothing of it runs, then end it", "run-stuck-cancelling.md"),
        ("PENDING", 30, "flows:x-1", 1, f"or end it: `prefect flow-run cancel {ID}`", "run-stuck-pending.md"),
        ("RUNNING", 1, "flows:x-1", 0, "disagree", "run-without-heartbeat.md"),
        ("CANCELLING", 1, "flows:x-1", 1, "", ""),
        ("RUNNING", 90, "flows:x-1", 1, "", ""),
    ],
)
def test_a_run_that_does_not_go_on_says_what_to_do(
    kind: str, minutes: int, infrastructure: str, jobs: int, advice: str, runbook: str
) -> None:
    found = run(kind, infrastructure_pid=infrastructure, state={"timestamp": at(minutes=minutes)})
    status = status_of(found, None if picture.is_process(found) else Kubernetes(jobs=[job()] * jobs))
    assert advice in status.advice
    assert bool(status.advice) == bool(advice)
    own = [each for each in status.links.values() if "runbooks/run-" in each]
    assert own == ([f"docs/runbooks/{runbook}"] if runbook else [])


def test_a_pause_names_who_made_it_and_is_wrong_when_it_is_over() -> None:
    deployments = [{"name": "csv-etl"}, {"name": "image-etl"}, {"name": "by-hand"}]
    pauses = [
        {"deployment": "csv-etl/csv-etl", "by": "kim", "reason": "bad data", "until": at(hours=-2)},
        {"deployment": "image-etl/image-etl", "by": "lee", "reason": "store away", "until": at(hours=2)},
    ]
    meant, over, unknown = picture.paused(deployments, pauses, NOW)
    assert (meant.wrong, over.wrong, unknown.wrong) == (False, True, False)
    assert meant.text == "by kim until 2026-11-27 14:00 UTC: bad data"
    assert over.text.endswith("that is over: `tidepool resume image-etl`")
    assert unknown.text == "no reason recorded"


def test_a_pool_without_a_sign_of_a_worker_is_a_finding() -> None:
    types = {
        "fresh": "kubernetes",
        "silent": "kubernetes",
        "never": "process",
        "cloud": "ecs:push",
        "stopped": "ecs:push",
    }
    found = [{"name": name, "type": kind, "is_paused": name == "stopped"} for name, kind in types.items()]
    workers = {
        "fresh": [{"last_heartbeat_time": at(seconds=30)}, {"last_heartbeat_time": at(hours=3)}],
        "silent": [{"last_heartbeat_time": at(minutes=10)}],
    }
    assert [(each.kind, each.subject, each.text) for each in picture.pools(found, workers, NOW)] == [
        ("worker silent", "work pool silent", "no Prefect worker sends heartbeats: the last was 10 min 0 s ago"),
        ("worker silent", "work pool never", "no Prefect worker sends heartbeats: none has polled it"),
        ("paused", "work pool stopped", "no run of it starts; when that is over: `prefect work-pool resume stopped`"),
    ]


@pytest.mark.parametrize(
    ("summary", "ago", "kinds"),
    [
        ("production: as in Git", 30, []),
        ("production: 2 differ from Git", 30, ["drift"]),
        ("production: as in Git, 1 to resume, as their pause expired", 30, ["drift"]),
        ("production: as in Git", 300, ["drift"]),
    ],
)
def test_drift_is_what_the_last_report_says(summary: str, ago: float, kinds: list[str]) -> None:
    reports = [{"description": summary, "updated": at(minutes=ago)}]
    assert [each.kind for each in picture.drift(reports, NOW)] == kinds
    assert picture.drift([], NOW) == []


def test_what_is_left_behind_is_a_finding() -> None:
    left = Leftover("DaskCluster", "flows", "x-1", "uid", "its driver pod x is gone")
    (found,) = picture.orphans([left])
    assert (found.subject, found.text) == ("DaskCluster flows/x-1", "its driver pod x is gone")


# --- schedules --------------------------------------------------------------------------------------------------------

ALERTS = yaml.safe_load((Path(__file__).parents[2] / "helm/tidepool/files/alerts.yaml").read_text())


def alert(name: str) -> dict[str, Any]:
    return next(each for group in ALERTS["groups"] for each in group["rules"] if each["alert"] == name)


def deployment(name: str, *, active: bool = True, **updated: float) -> dict[str, Any]:
    schedules = [{"active": False}, {"active": active}]
    return {"id": name, "name": name, "schedules": schedules, "updated": at(**updated or {"hours": 1})}


def test_a_deployment_has_a_next_run_if_a_schedule_of_it_is_active_and_known_to_the_scheduler() -> None:
    found = [deployment("a"), deployment("b", active=False), deployment("c", minutes=1), deployment("d", minutes=3)]
    assert list(schedules.scheduled(found, NOW)) == ["a", "d"]


def test_a_stopped_scheduler_is_one_finding_with_sentence_runbook_and_share_of_its_alert() -> None:
    names = {each: each for each in "abcdefgh"}
    assert len(schedules.without_next_run(names, set("abcd"))) == 4, "half of them: they are looked at one by one"
    (found,) = schedules.without_next_run(names, set("abcde"))
    rule = alert("TidepoolSchedulerStopped")
    assert f"{found.text}." == rule["annotations"]["summary"].replace("{{ $value | humanizePercentage }}", "62.5%")
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{found.runbook}"
    assert rule["expr"].endswith(f"> {schedules.STOPPED_SHARE}")
    assert (found.kind, found.wrong) == ("scheduler", True)


def test_a_schedule_without_a_next_run_is_a_finding_with_sentence_and_runbook_of_its_alert() -> None:
    assert schedules.without_next_run({}, set()) == schedules.without_next_run({"a": "csv-etl"}, set()) == []
    (found,) = schedules.without_next_run({"a": "csv-etl", "b": "image-etl"}, {"a"})
    summary = alert("TidepoolNothingScheduled")["annotations"]["summary"]
    subject = "{{ $labels.flow }}/{{ $labels.deployment }}"
    assert f"{found.text}." == summary.replace(subject, "it")
    assert alert("TidepoolNothingScheduled")["annotations"]["runbook_url"] == f"docs/runbooks/{found.runbook}"
    assert (found.kind, found.subject) == ("unscheduled", "csv-etl")


class Server:
    """Answers about schedules: `pages` are the deployments of the runs ahead, in the order of their requests."""

    def __init__(self, every: int, ahead: int, *pages: list[str]) -> None:
        self.counts = {"every": every, "ahead": ahead}
        self.pages = list(pages)
        self.asked: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        body, path = json.loads(request.content), request.url.path
        self.asked.append(path)
        if path == "/deployments/count":
            assert body["deployments"] == {"paused": {"eq_": False}}
            return httpx.Response(200, json=self.counts["ahead" if "flow_runs" in body else "every"])
        if path == "/deployments/filter":
            return httpx.Response(200, json=[deployment(each) for each in "abc"])
        wanted = body["deployments"]["id"]["any_"]
        page = [{"deployment_id": each} for each in self.pages.pop(0)]
        assert all(each["deployment_id"] in wanted for each in page), "those that are known are not asked for again"
        assert body["flow_runs"]["expected_start_time"]["after_"] == NOW.isoformat()
        return httpx.Response(200, json=page)

    def findings(self) -> tuple[list[str], dict[str, str]]:
        async def scenario() -> tuple[list[Finding], dict[str, str]]:
            async with httpx.AsyncClient(base_url="http://h", transport=httpx.MockTransport(self.answer)) as client:
                opened = sources.Sources(client, NOW)
                return await opened._schedules(), opened.unknown

        found, unknown = asyncio.run(scenario())
        return [f"{each.kind} {each.subject}" for each in found], unknown


def test_schedules_are_counted_and_read_only_if_some_have_no_next_run() -> None:
    server = Server(3, 3)
    assert server.findings() == ([], {})
    assert server.asked == ["/deployments/count"] * 2
    assert Server(3, 2, ["a", "b"]).findings() == (["unscheduled c"], {})
    assert Server(3, 0, []).findings() == (["scheduler server"], {})


def test_schedules_behind_many_runs_are_looked_for_and_otherwise_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PAGE", 2)
    assert Server(3, 2, ["a", "a"], ["b", "b"], []).findings()[0] == ["unscheduled c"]
    assert Server(3, 2, ["a", "a"], ["b", "c"]).findings() == ([], {})
    monkeypatch.setattr(sources, "_PAGES", 1)
    assert Server(9, 2, ["a", "a"]).findings() == (
        [],
        {"schedules": "too many runs are ahead to look at the 2 schedules behind them"},
    )
    assert Server(9, 2, ["a"]).findings()[1] == {
        "schedules": "only those of 3 of 9 deployments were looked at",
    }


# --- one run ----------------------------------------------------------------------------------------------------------

_CLUSTER = {"metadata": {"name": "x-1"}}


@pytest.mark.parametrize(
    ("found", "kubernetes", "words"),
    [
        (run("RUNNING"), Kubernetes(), ["the server says Running, and its Job is gone"]),
        (
            run("RUNNING"),
            Kubernetes([job("Failed")], [pod("Failed")]),
            ["the server says Running, and its Job is Failed"],
        ),
        (run("RUNNING"), Kubernetes([job()], [pod("Running")]), []),
        (run("RUNNING"), Kubernetes([job("Failed")], [pod("Running")]), []),
        (run("COMPLETED"), Kubernetes([job()]), ["the server says Completed, and Job nightly-x7k has not ended"]),
        (
            run("FAILED"),
            Kubernetes([job("Failed")], clusters=[_CLUSTER]),
            ["the server says Failed, and Dask cluster x-1 is still there"],
        ),
        (run("COMPLETED"), Kubernetes([job("Complete")]), []),
        (run("RUNNING", infrastructure_pid=None), Kubernetes(), []),
        (run("RUNNING"), None, []),
    ],
)  # fmt: skip
def test_a_contradiction_between_server_and_kubernetes_is_named(
    found: dict[str, Any], kubernetes: Kubernetes | None, words: list[str]
) -> None:
    assert picture.mismatches(found, kubernetes) == words
    assert status_of(found, kubernetes).wrong == (bool(words) or found["state"]["type"] == "FAILED")


def test_the_text_of_a_failed_run_says_why_and_what_to_do_first() -> None:
    message = "Flow run encountered an exception: ValueError: bad"
    killed = {"restartCount": 2, "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    status = status_of(run("FAILED", message=message), Kubernetes([job("Failed")], [pod("Failed", **killed)]))
    lines = view.as_text(status, 160).splitlines()
    assert lines[0].split("  ")[:2] == ["FAILED", "nightly-scoring / 2026-11-27 11:00 · 60 items"]
    assert lines[1] == "why           ValueError: bad"
    assert lines[2].startswith("do            Find the message in the runbook")
    assert lines[2].endswith(f"`prefect flow-run retry {ID}`")
    text = "\n".join(lines)
    for part in (
        "Runbook: https://h/docs/runbooks/x.md",
        "timeline           +0.0 s  Scheduled",
        "+300.0 s  Failed: ValueError: bad",
        "items         60 task runs: 58 completed, 2 failed",
        "failed        score-7: ValueError: bad",
        "kubernetes    Job nightly-x7k: Failed",
        "driver pod driver: Failed, out of memory (137), 2 restarts",
        "warnings      one partition was empty",
    ):
        assert part in text, text


def test_a_state_of_just_before_the_run_was_recorded_is_at_zero_and_begins_the_timeline() -> None:
    status = dataclasses.replace(status_of(run("RUNNING"), Kubernetes()), timeline=[(-0.004, "Scheduled", "")])
    assert "timeline           +0.0 s  Scheduled" in view.as_text(status, 120)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_text_fits_the_terminal(width: int) -> None:
    status = status_of(run("RUNNING"), Kubernetes(), warnings=[{"message": "a warning of many words " * 20}])
    lines = view.as_text(status, width).splitlines()
    assert all(len(line) <= width for line in lines[1:] if "docs/" not in line and ID not in line), lines


def test_the_longest_word_is_apart_from_its_subject() -> None:
    silent = picture.pools([{"name": "p", "type": "process", "is_paused": False}], {}, NOW)
    lines = view.as_text(picture.Overview(silent), 160).splitlines()
    assert lines[1].startswith("worker silent work pool p: no Prefect worker")


def test_a_source_that_does_not_answer_is_named() -> None:
    text = view.as_text(status_of(run("COMPLETED"), None, unknown={"kubernetes": "no credentials"}), 120)
    assert "unknown       kubernetes: no credentials" in text


def test_the_overview_counts_what_is_wrong_and_lists_what_is_meant_last() -> None:
    meant, wrong = Finding("paused", "a", "by kim", wrong=False), Finding("late", "b", "a run is late", "runs-late.md")
    lines = view.as_text(Overview([meant, wrong]), 120).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "late", "paused"]
    assert lines[0].strip() == "1 thing wrong, 1 paused"
    assert lines[1].endswith("docs/runbooks/runs-late.md")
    assert not Overview([meant]).wrong
    assert Overview([wrong]).wrong
    assert Overview([], {"prefect": "no answer"}).wrong
    assert "the Prefect server does not answer" in view.as_text(Overview([], {"prefect": "no answer"}), 120)


def test_what_is_paused_for_the_same_reason_is_one_line() -> None:
    found = [Finding("paused", name, "no reason recorded", wrong=False) for name in ("a", "b")]
    lines = view.as_text(Overview([*found, Finding("paused", "c", "by kim", wrong=False)]), 120).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == ["a, b: no reason recorded", "c: by kim"]
    assert lines[0].strip() == "nothing is wrong, 3 paused"


def test_the_newest_trouble_is_first() -> None:
    found = [Finding("late", name, "", since=at(hours=ago)) for name, ago in (("old", 9), ("new", 1), ("middle", 3))]
    lines = view.as_text(Overview([Finding("orphan", "timeless", ""), *found]), 120).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["new:", "middle:", "old:", "timeless:"]


def test_json_says_what_the_exit_code_says() -> None:
    found = json.loads(view.as_json(status_of(run("FAILED", message="x"))))
    assert (found["wrong"], found["state"], found["items"]) == (True, "Failed", {"COMPLETED": 58, "FAILED": 2})
    assert json.loads(view.as_json(Overview())) == {"findings": [], "unknown": {}, "wrong": False}
