"""Decisions about flow runs: each state with each thing that Kubernetes may have of it."""

# ruff: noqa: E501 - rows of a table

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from tidepool.operate.sweep import drivers, flow_run_loop, flow_runs
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.operate.sweep.observation import Observation
from tidepool.operate.sweep.prefect_api import FlowRuns
from tidepool.operate.sweep.records import Decision, FlowRun, Job, Policy, State, policy

Object = dict[str, Any]

NOW = datetime(2026, 11, 27, 6, 0, 0, tzinfo=UTC)
RUN = "0190-run"


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def text(seconds: float) -> str:
    return f"{ago(seconds):%Y-%m-%dT%H:%M:%SZ}"


def state(kind: str, name: str = "", message: str = "", *, since: float = 60, identity: str = "s1") -> State:
    return State(identity, kind, name or kind.capitalize(), message, ago(since))


def run(of: State, infrastructure: str = "runs:blue-heron", identity: str = RUN, **more: Any) -> FlowRun:
    values = {
        "id": identity, "name": "blue-heron", "state": of, "policy": Policy(), "infrastructure": infrastructure,
        "deployment": "d1", "schedule": "", "expected": ago(300), "history": (), **more,
    }  # fmt: skip
    return FlowRun(**values)


def job(
    ended: str = "", *, created: float = 120, at: float = 30, reason: str = "BackoffLimitExceeded", name: str = "blue-heron",
    namespace: str = "runs", identity: str = RUN, deleting: bool = False,
) -> Object:  # fmt: skip
    metadata = {
        "name": name, "namespace": namespace, "uid": f"uid-{name}", "creationTimestamp": text(created),
        "labels": {"prefect.io/flow-run-id": identity},
    }  # fmt: skip
    if deleting:
        metadata["deletionTimestamp"] = text(1)
    conditions = [{"type": ended, "status": "True", "reason": reason, "lastTransitionTime": text(at)}] if ended else []
    return {"metadata": metadata, "spec": {"activeDeadlineSeconds": 900}, "status": {"conditions": conditions}}


def pod(phase: str, container: Object | None = None, *, name: str = "blue-heron", identity: str = RUN) -> Object:
    return {
        "metadata": {
            "name": f"{name}-abcde", "uid": f"uid-{name}-pod", "creationTimestamp": text(119),
            "labels": {"prefect.io/flow-run-id": identity},
            "ownerReferences": [{"kind": "Job", "name": name, "uid": f"uid-{name}"}],
        },
        "spec": {"nodeName": "node-a", "containers": [{"image": "x", "resources": {"limits": {"memory": "1Gi"}}}]},
        "status": {"phase": phase, "containerStatuses": [{"state": container}] if container else []},
    }  # fmt: skip


def running(seconds: float = 100) -> Object:
    return pod("Running", {"running": {"startedAt": text(seconds)}})


OOM = pod("Failed", {"terminated": {"exitCode": 137, "reason": "OOMKilled"}})
PULL = pod("Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "x: not found"}})
STARTS = pod("Pending", {"waiting": {"reason": "ContainerCreating"}})
NO_IMAGE = "image x cannot be pulled: not found"
OURS = (Job("runs", "blue-heron", "uid-blue-heron"),)


def decide(runs: FlowRun | list[FlowRun], *objects: Object, also: Observation | None = None) -> list[Decision]:
    jobs = tuple(each for each in objects if "activeDeadlineSeconds" in each["spec"])
    pods = tuple(each for each in objects if each not in jobs)
    observations = [Observation("runs", jobs, pods), *([also] if also else [])]
    return flow_runs.decisions(observations, runs if isinstance(runs, list) else [runs], NOW)


def said(decided: list[Decision]) -> list[str]:
    return [f"{each.state.name}: {each.state.message}" if each.state else "" for each in decided]


# --- the driver is gone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [
        state("RUNNING"),
        state("RUNNING", "Retrying"),
        state("PENDING", "InfrastructurePending"),
        state("PENDING", "Pending", since=121),
        state("PAUSED", "Paused"),
    ],
    ids=lambda each: each.name,
)
def test_a_run_whose_driver_has_ended_is_crashed_with_the_cause(of: State) -> None:
    [decision] = decide(run(of), job("Failed"), OOM)
    assert decision.state
    assert (decision.state.type, decision.state.name) == ("CRASHED", "Crashed")
    assert decision.state.message == "driver out of memory (limit 1Gi); raise memory_limit"
    assert decision.jobs == (), "the Job and its log stay for their TTL"


@pytest.mark.parametrize(
    ("of", "objects"),
    [
        (state("RUNNING"), [job(), running()]),
        # Its Job has not ended, whatever its pod looks like.
        (state("RUNNING"), [job()]),
        (state("RUNNING"), [job(), OOM]),
        # Its Job was deleted; its pod has until the end of its grace period.
        (state("RUNNING"), [running()]),
        # A second Job of the run works.
        (state("RUNNING"), [job("Failed"), job(name="second", created=20)]),
        # What the driver said last may not be on the server yet.
        (state("RUNNING"), [job("Failed", at=2)]),
        (state("RUNNING", since=5), []),
        (state("PENDING", "Pending", since=20), [job(), running()]),
        (state("PENDING", "InfrastructurePending"), [job(), running()]),
        (state("PAUSED", "Suspended"), []),
        (state("PAUSED", "Suspended"), [job("Complete")]),
        (state("SCHEDULED"), []),
        (state("SCHEDULED", "AwaitingRetry"), [job("Failed"), OOM]),
        (state("COMPLETED"), [job("Complete")]),
        (state("COMPLETED"), [job(), running()]),
        (state("CRASHED"), [job("Failed"), OOM]),
        (state("CRASHED"), [job(), running()]),
        (state("FAILED"), [job(), running()]),
    ],
)
def test_nothing_is_decided_about(of: State, objects: list[Object]) -> None:
    assert decide(run(of), *objects) == []


def test_a_run_whose_job_is_gone_is_crashed() -> None:
    assert said(decide(run(state("RUNNING")))) == ["Crashed: its Job was deleted"]
    assert said(decide(run(state("PENDING", "InfrastructureWaiting")))) == ["Crashed: its Job was deleted"]


def test_a_job_of_an_earlier_attempt_is_not_this_ones() -> None:
    """The second attempt began after the first one's Job had ended, and its own Job is gone."""
    assert said(decide(run(state("RUNNING", since=20)), job("Failed", at=60), OOM)) == ["Crashed: its Job was deleted"]


def test_kubernetes_whole_seconds_do_not_make_a_job_an_earlier_one() -> None:
    for of in (state("RUNNING", since=28), state("PENDING", "Submitting", since=118)):
        [decision] = decide(run(of), job("Failed", created=120, at=30), OOM)
        assert decision.state
        assert decision.state.message.startswith("driver out of memory")


@pytest.mark.parametrize("where", ["", "elsewhere:blue-heron"])
def test_a_run_without_a_job_here_is_left_alone(where: str) -> None:
    """Executed by hand, or in a namespace that is not one of ours."""
    assert decide(run(state("RUNNING"), where)) == []


def test_a_job_in_another_of_our_namespaces_counts() -> None:
    other = Observation("media", (job(namespace="media"),), (running(),))
    assert decide(run(state("RUNNING"), "media:blue-heron"), also=other) == []


def test_the_reason_of_a_driver_that_is_gone_is_that_of_its_last_state() -> None:
    """A drained pod is gone by the time its Job has failed."""
    drained = pod("Running", {"running": {"startedAt": text(100)}})
    drained["metadata"]["deletionTimestamp"] = text(-60)
    drained["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    ]
    before = Observation("runs", (job(),), (drained,))
    assert decide(run(state("RUNNING")), job(), drained) == []
    seen = drivers.being_deleted([before])
    after = drivers.with_gone(Observation("runs", (job("Failed"),)), seen)
    [decision] = flow_runs.decisions([after], [run(state("RUNNING"))], NOW)
    assert said([decision]) == ["Crashed: driver pod evicted: its node was drained"]
    assert drivers.being_deleted([after]) == seen | {
        key: {**pod, "status": {**pod["status"], "phase": "Failed"}} for key, pod in seen.items()
    }
    assert drivers.with_gone(before, seen) == before, "it is still there"
    assert drivers.with_gone(Observation("runs"), seen).drivers == (), "its Job is gone, too"


def test_the_newest_job_and_its_pod_count() -> None:
    second = pod("Failed", {"terminated": {"exitCode": 1}}, name="second")
    of = run(state("RUNNING", since=40))
    [decision] = decide(of, job("Failed", at=50), OOM, job("Failed", name="second", created=45, at=30), second)
    assert said([decision]) == ["Crashed: driver ended with exit code 1"]
    [decision] = decide(of, second, job("Failed", name="second", created=45, at=30), OOM, job("Failed", at=50))
    assert said([decision]) == ["Crashed: driver ended with exit code 1"]


def test_a_pod_that_ended_long_after_its_deletion_says_nothing_of_its_node() -> None:
    ended = pod("Failed", {"terminated": {"exitCode": 143}})
    ended["metadata"]["deletionTimestamp"] = text(100)
    assert said(decide(run(state("RUNNING")), job("Failed"), ended)) == ["Crashed: driver pod deleted"]


def test_a_node_that_does_not_answer_keeps_no_run_running() -> None:
    lost = pod("Running", {"running": {"startedAt": text(100)}})
    failing = job()
    failing["status"]["conditions"] = [{"type": "FailureTarget", "status": "True"}]
    for due, crashed in ((14, False), (16, True)):
        lost["metadata"]["deletionTimestamp"] = text(due)
        found = decide(run(state("RUNNING")), failing, lost)
        assert bool(found) is crashed, due
    message = "Crashed: node node-a not ready: driver pod deleted, and its end not reported"
    assert said(found) == [message]
    assert decide(run(state("RUNNING")), job(), lost) == [], "its Job may start another pod"


def test_the_last_lines_of_a_driver_that_could_send_none_are_kept() -> None:
    ended = pod("Failed", {"terminated": {"exitCode": 1, "message": "Traceback\nImportError: no flows\n"}})
    [decision] = decide(run(state("PENDING", "InfrastructurePending")), job("Failed"), ended)
    assert decision.output == "Traceback\nImportError: no flows"
    [decision] = decide(run(state("RUNNING")), job("Failed"), ended)
    assert decision.output == "", "a run that was Running has sent its log"


# --- it does not start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "objects", "expected"),
    [
        (state("PENDING", "Submitting", since=121), [job(), STARTS], "InfrastructurePending: its pod starts"),
        (state("PENDING", "Submitting", since=121), [job(), PULL], f"InfrastructurePending: {NO_IMAGE}"),
        (
            state("PENDING", "InfrastructurePending", "its pod starts"),
            [job(), PULL],
            f"InfrastructureWaiting: {NO_IMAGE}",
        ),
        (state("PENDING", "InfrastructureWaiting", "quota x"), [job(), PULL], f"InfrastructurePending: {NO_IMAGE}"),
        (state("PENDING", "InfrastructureWaiting", NO_IMAGE), [job(), STARTS], "InfrastructurePending: its pod starts"),
    ],
)
def test_a_run_that_waits_for_its_pod_says_why(of: State, objects: list[Object], expected: str) -> None:
    [decision] = decide(run(of), *objects)
    assert said([decision]) == [expected]
    assert decision.state
    assert decision.state.type == "PENDING"
    assert decision.jobs == ()


def test_a_reason_is_told_once() -> None:
    assert decide(run(state("PENDING", "InfrastructureWaiting", NO_IMAGE)), job(), PULL) == []


def test_a_first_failure_is_not_told() -> None:
    assert decide(run(state("PENDING", "InfrastructurePending", "its pod starts")), job(created=4), PULL) == []


def test_a_run_that_does_not_start_is_crashed_with_the_reason_and_its_job_goes() -> None:
    late = run(state("PENDING", "InfrastructureWaiting", NO_IMAGE), policy=Policy(start_timeout=timedelta(seconds=119)))
    [decision] = decide(late, job(), PULL)
    assert said([decision]) == [f"Crashed: did not start within 119 s: {NO_IMAGE}"]
    assert decision.jobs == OURS
    in_time = replace(late, policy=Policy(start_timeout=timedelta(seconds=121)))
    assert decide(in_time, job(), PULL) == []


def test_a_flow_that_does_not_begin_is_ended_too() -> None:
    slow = run(state("PENDING", "InfrastructurePending"), policy=Policy(start_timeout=timedelta(seconds=100)))
    assert said(decide(slow, job(), running())) == [
        "Crashed: did not start within 100 s: its driver runs, its flow has not begun"
    ]
    assert said(decide(slow, job(), STARTS)) == ["Crashed: did not start within 100 s: its pod starts"]


# --- no Prefect worker makes its Job ----------------------------------------------------------------------------------


def test_a_run_whose_job_was_not_made_is_scheduled_again() -> None:
    waits = run(state("PENDING", "Submitting", since=59), "", history=(state("SCHEDULED"), state("PENDING")))
    assert decide(waits) == []
    [decision] = decide(replace(waits, state=state("PENDING", "Pending", since=61)))
    assert decision.state
    assert (decision.state.type, decision.state.since) == ("SCHEDULED", NOW)
    assert decision.state.message == "no Prefect worker made its Job within 60 s; attempt 1 of 3"


def test_a_job_of_the_attempt_before_is_not_that_of_this_one() -> None:
    again = run(state("PENDING", "Pending", since=20))
    assert decide(again, job("Failed", created=120, at=18), OOM) == [], "the next Job is being made"


def test_it_is_scheduled_again_three_times() -> None:
    again = state("SCHEDULED", message="no Prefect worker made its Job within 60 s; attempt 1 of 3")
    history = (state("PENDING"), again, state("PENDING"), again, state("PENDING"), again, state("PENDING"))
    waits = run(state("PENDING", since=61), "", history=history)
    assert said(decide(waits)) == ["Crashed: no Prefect worker made its Job in 4 attempts"]
    assert said(decide(replace(waits, history=history[:-2])))[0].endswith("attempt 3 of 3")


# --- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since", "objects", "expected"),
    [
        (1, [job(), PULL], OURS),
        (1, [job()], OURS),
        (39, [job(), running()], None),
        (41, [job(), running()], OURS),
        (41, [job(deleting=True), running()], None),
        (4, [], None),
    ],
)
def test_a_driver_that_has_not_begun_or_takes_too_long_loses_its_job(
    since: float, objects: list[Object], expected: tuple[Job, ...] | None
) -> None:
    found = decide(run(state("CANCELLING", since=since)), *objects)
    assert [each.jobs for each in found] == ([expected] if expected else [])
    assert all(each.state is None for each in found)


@pytest.mark.parametrize("objects", [[], [job("Failed"), OOM], [job("Complete")]])
def test_a_cancelling_run_without_a_driver_is_cancelled(objects: list[Object]) -> None:
    [decision] = decide(run(state("CANCELLING")), *objects)
    assert said([decision]) == ["Cancelled: cancelled; its driver has ended"]
    assert decision.jobs == (OURS if objects else ())


@pytest.mark.parametrize(
    ("of", "objects", "gone"),
    [
        (state("CANCELLED", since=6), [job("Complete")], True),
        (state("CANCELLED", since=4), [job("Complete")], False),
        (state("CANCELLED", since=39), [job(), running()], False),
        (state("CANCELLED", since=41), [job(), running()], True),
        # Made after the run was cancelled.
        (state("CANCELLED", since=6), [job(), PULL], True),
        (state("CRASHED", since=6), [job(), PULL], True),
        (state("CRASHED", since=600), [job(), running()], False),
        (state("FAILED", since=600), [job("Failed"), OOM], False),
    ],
)
def test_no_job_is_left_of_a_cancelled_run(of: State, objects: list[Object], *, gone: bool) -> None:
    assert [each.jobs for each in decide(run(of), *objects)] == ([OURS] if gone else [])


# --- policies ---------------------------------------------------------------------------------------------------------

CRASH = state("CRASHED", "Crashed", "driver pod deleted", since=12, identity="crash")
RETRY = Policy(crash_retries=3)
BEGUN = (state("SCHEDULED"), state("PENDING"), state("RUNNING"))


def test_a_crashed_run_is_executed_again_with_growing_delays() -> None:
    crashed = run(CRASH, policy=RETRY, history=(*BEGUN, CRASH))
    [decision] = decide(crashed, job("Failed"), OOM)
    assert decision.state
    assert (decision.state.type, decision.state.name) == ("SCHEDULED", "AwaitingRetry")
    assert decision.state.message == "retry 1 of 3 after a crash: driver pod deleted"
    assert decision.state.since == CRASH.since + timedelta(seconds=10)
    history = (*BEGUN, CRASH, *BEGUN, CRASH, *BEGUN, CRASH)
    [decision] = decide(replace(crashed, history=history))
    assert decision.state
    assert decision.state.message.startswith("retry 3 of 3")
    assert decision.state.since == CRASH.since + timedelta(seconds=40)
    assert decide(replace(crashed, history=(*history, *BEGUN, CRASH))) == [], "three retries are over"


@pytest.mark.parametrize(
    ("changes", "objects"),
    [
        ({"policy": Policy()}, []),
        ({"history": ()}, []),
        ({"deployment": ""}, []),
        ({"history": (*BEGUN, state("CANCELLING"), CRASH)}, []),
        ({}, [job("Failed", reason="DeadlineExceeded")]),
        # It was presumed to be lost, and runs.
        ({}, [job(), running()]),
        ({}, [running()]),
    ],
)
def test_a_crashed_run_is_not_executed_again(changes: dict[str, Any], objects: list[Object]) -> None:
    crashed = run(CRASH, policy=RETRY, history=(*BEGUN, CRASH))
    assert decide(replace(crashed, **changes), *objects) == []


def test_an_earlier_attempt_that_was_cancelled_does_not_count() -> None:
    history = (*BEGUN, state("CANCELLING"), state("CANCELLED"), *BEGUN, CRASH)
    assert len(decide(run(CRASH, policy=RETRY, history=history))) == 1


def test_a_run_is_ended_at_its_maximum_runtime() -> None:
    limited = run(state("RUNNING"), policy=Policy(max_runtime=timedelta(seconds=99)))
    [decision] = decide(limited, job(), running(100))
    assert said([decision]) == ["Failed: ran longer than max_runtime_seconds (99)"]
    assert decision.jobs == OURS
    assert decide(limited, job(), running(98)) == []


@pytest.mark.parametrize(
    ("of", "fails"),
    [
        (state("RUNNING", "Suspended"), True),
        (state("RUNNING", "Completed"), True),
        (state("PAUSED"), True),
        (state("PAUSED", "Suspended"), False),
        (state("SCHEDULED", "AwaitingRetry"), False),
        (state("COMPLETED"), False),
        (state("COMPLETED", "Suspended"), False),
    ],
)
def test_no_state_that_a_flow_sets_lets_its_driver_run_longer(of: State, *, fails: bool) -> None:
    limited = run(of, policy=Policy(max_runtime=timedelta(seconds=99)))
    [decision] = decide(limited, job(), running(100))
    assert (decision.state is not None) is fails
    assert decision.jobs == OURS
    assert decide(limited, job(), running(98)) == []


def test_a_run_is_not_taken_for_suspended_because_its_state_is_named_so() -> None:
    [decision] = decide(run(state("RUNNING", "Suspended")), job("Failed"), OOM)
    assert said([decision])[0].startswith("Crashed: ")


LATEST, NONE = Policy(after_outage="latest"), Policy(after_outage="none")
LATE = state("SCHEDULED", "Late")


def scheduled(
    number: int, of: State = LATE, *, wants: Policy = LATEST, schedule: str = "every-minute", **more: Any
) -> FlowRun:
    """The run that was due `number` minutes and five seconds ago."""
    return run(of, "", f"run-{number}", policy=wants, schedule=schedule, expected=ago(60 * number + 5), **more)


def skipped(runs: list[FlowRun], *objects: Object) -> list[str]:
    found = decide(runs, *objects)
    assert all(each.state and (each.state.type, each.state.name) == ("CANCELLED", "Skipped") for each in found)
    return [each.run.id for each in found]


def test_of_twenty_late_runs_the_newest_is_executed() -> None:
    runs = [scheduled(number) for number in range(20)]
    decided = decide(runs)
    assert skipped(runs) == [f"run-{number}" for number in range(1, 20)]
    assert said(decided)[0] == (
        "Skipped: skipped by after_outage: latest: late, and a newer run of its schedule is due since 2026-11-27 05:59:55 UTC"
    )


def test_all_late_runs_are_executed_by_default() -> None:
    assert decide([scheduled(number, wants=Policy()) for number in range(20)]) == []


def test_none_of_the_late_runs_is_executed() -> None:
    runs = [scheduled(number, wants=NONE) for number in range(3)]
    assert skipped(runs) == ["run-1", "run-2"], "five seconds are not an outage"


def test_each_schedule_has_its_newest_run() -> None:
    of_a_person = [scheduled(4, schedule=""), scheduled(5, schedule="")]
    runs = [scheduled(1), scheduled(2), scheduled(3, schedule="hourly"), *of_a_person]
    assert skipped(runs) == ["run-2"], "and the runs that a person asked for are executed"


def test_a_run_that_waits_for_its_concurrency_limit_is_skipped_too() -> None:
    runs = [scheduled(1), scheduled(2, state("SCHEDULED", "AwaitingConcurrencySlot"))]
    assert skipped(runs) == ["run-2"]


def test_a_retry_is_not_skipped() -> None:
    assert skipped([scheduled(1), scheduled(2, state("SCHEDULED", "AwaitingRetry"))]) == []


def test_a_late_run_that_a_worker_took_first_is_skipped_until_its_driver_begins() -> None:
    taken = state("PENDING", "Submitting", since=1)
    late = scheduled(2, taken, history=(LATE, taken))
    newest = scheduled(0)
    made = job(identity="run-2", created=1)
    [decision] = decide([newest, late], made, pod("Pending", identity="run-2"))
    assert decision.run is late
    assert decision.jobs == OURS
    begun = pod("Running", {"running": {"startedAt": text(1)}}, identity="run-2")
    assert skipped([newest, late], made, begun) == []
    running_now = scheduled(2, state("RUNNING", since=1))
    assert skipped([newest, running_now], made, begun) == []


def test_a_run_that_was_taken_in_time_and_starts_slowly_is_not_skipped() -> None:
    slow = scheduled(
        2, state("PENDING", "InfrastructurePending", "its pod starts"), history=(state("PENDING", since=123),)
    )
    made = job(identity="run-2", created=120)
    assert decide([scheduled(0), slow], made, pod("Pending", identity="run-2")) == []


def test_a_late_run_that_is_retried_is_not_skipped() -> None:
    taken = state("PENDING", "Pending", since=1)
    again = scheduled(2, taken, history=(LATE, state("PENDING"), state("RUNNING"), CRASH, state("SCHEDULED"), taken))
    assert skipped([scheduled(0), again]) == []


def test_history_is_read_where_a_decision_needs_it() -> None:
    needs = flow_runs.needs_history
    assert needs(run(CRASH, policy=RETRY), NOW)
    assert not needs(run(CRASH), NOW)
    assert needs(run(state("PENDING", since=61), ""), NOW)
    assert not needs(run(state("PENDING", since=59), ""), NOW)
    assert needs(scheduled(2, state("PENDING", since=1)), NOW)
    assert not needs(scheduled(2, state("PENDING", since=1), wants=Policy()), NOW)
    assert not needs(run(state("RUNNING"), policy=RETRY), NOW)


def test_the_last_layer_of_job_variables_counts() -> None:
    pool = {"on_crash": "none", "after_outage": "all", "start_timeout_seconds": 600, "max_runtime_seconds": None}
    deployment = {"on_crash": "retry 2", "after_outage": "latest", "max_runtime_seconds": 60}
    found = policy(pool, deployment, {"after_outage": "none", "on_crash": None, "start_timeout_seconds": 30})
    assert found == Policy(2, "none", timedelta(seconds=60), timedelta(seconds=30))


@pytest.mark.parametrize("wrong", ["retry", "retry x", "retry 100", 3, None, ["retry 1"]])
def test_a_value_that_the_pool_would_refuse_is_left_out(wrong: object) -> None:
    assert policy({"on_crash": wrong, "after_outage": wrong, "max_runtime_seconds": "60"}) == Policy()


def test_crashed_is_not_an_end_for_the_clusters_of_a_run() -> None:
    runs = [run(state(kind), identity=kind) for kind in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED", "RUNNING")]
    assert flow_runs.ended(runs) == dict.fromkeys(("COMPLETED", "FAILED", "CANCELLED"), ago(60))


# --- states and objects that are seldom seen --------------------------------------------------------------------------


def test_a_run_that_is_retried_while_its_last_driver_ends_has_its_own_start_timeout() -> None:
    again = run(state("PENDING", "Pending", since=5), policy=Policy(start_timeout=timedelta(seconds=600)))
    last = job(created=7200)
    assert decide(again, last, running(7100)) == [], "the process before closes; the next Job is being made"
    assert decide(again, last, PULL) == [], "what keeps the Job before is not the reason of this attempt"
    [decision] = decide(replace(again, state=state("PENDING", "Pending", since=601)), last, running(7100))
    assert decision.jobs == OURS
    assert said([decision])[0].startswith("Crashed: did not start within 600 s: ")


def test_a_run_that_waited_for_its_pod_is_not_stuck_without_it() -> None:
    waited = run(state("PENDING", "InfrastructurePending", "its pod starts"), "")
    assert said(decide(waited)) == ["Crashed: its Job was deleted"], "its worker died before it named the Job"
    assert decide(run(state("RUNNING"), "")) == [], "it may be executed elsewhere, by hand"


def test_a_run_without_a_job_is_not_judged_before_its_history_was_read() -> None:
    waits = state("PENDING", since=61)
    assert decide(run(waits, "", history=())) == []
    assert said(decide(run(waits, "", history=(waits,))))[0].endswith("attempt 1 of 3")


@pytest.mark.parametrize("name", ["Resuming", "Scheduled"])
def test_a_run_that_has_begun_and_is_scheduled_again_is_not_skipped(name: str) -> None:
    due = state("SCHEDULED", name, since=1)
    assert decide([scheduled(20, due, wants=NONE, begun=True), scheduled(19, due, begun=True), scheduled(0)]) == []


@pytest.mark.parametrize(("start", "begun"), [(None, False), ("2026-11-27T05:00:00Z", True)])
def test_a_run_with_a_start_time_has_begun(start: str | None, *, begun: bool) -> None:
    server = FlowRuns(cast("Any", None), ["k"], ["runs"])
    server._pools = {"k": {"base_job_template": {}}}
    at = "2026-11-27T05:00:00Z"
    found = {
        "id": RUN, "name": "x", "work_pool_name": "k", "deployment_id": None, "infrastructure_pid": None,
        "auto_scheduled": False, "expected_start_time": at, "start_time": start,
        "state": {"id": "s", "type": "SCHEDULED", "name": "Resuming", "message": None, "timestamp": at},
    }  # fmt: skip
    assert server._flow_run(found).begun is begun


@pytest.mark.parametrize("name", ["max_runtime_seconds", "start_timeout_seconds"])
def test_a_time_beyond_the_pools_limit_is_left_out(name: str) -> None:
    assert policy({name: 10**12}) == Policy(), "no date is that late"
    assert policy({name: 10**20}) == Policy()


def test_a_job_whose_run_did_not_start_in_time_is_deleted_later_if_it_could_not_be_at_once() -> None:
    crashed = state("CRASHED", message="did not start within 600 s: its driver runs, its flow has not begun", since=6)
    assert [each.jobs for each in decide(run(crashed), job(), running())] == [OURS]


def test_a_run_that_is_not_understood_keeps_no_other() -> None:
    bad = job(identity="bad", name="bad")
    bad["status"]["conditions"] = [{"type": "Failed", "status": "True"}]
    runs = [run(state("RUNNING"), identity="bad"), run(state("RUNNING"))]
    problem, decision = decide(runs, bad, job("Failed"), OOM)
    assert problem.problem.startswith("KeyError: ")
    assert said([decision]) == ["Crashed: driver out of memory (limit 1Gi); raise memory_limit"]


def test_a_decision_that_fails_in_an_unknown_way_keeps_no_other() -> None:
    class Server:
        told: tuple[str, ...] = ()

        async def set_state(self, decision: Decision) -> bool:
            self.told += (decision.run.id,)
            if decision.run.id == "bad":
                raise TypeError("'NoneType' object is not subscriptable")
            return False

    server: Any = Server()
    ends = state("CRASHED")
    decided = [Decision(run(state("RUNNING"), identity=each), ends) for each in ("bad", "good")]
    problem = Decision(run(state("RUNNING"), identity="odd"), problem="KeyError: 'spec'")

    async def carry_out() -> None:
        await flow_run_loop.carry_out(cast("Any", None), server, [problem, *decided], DaskWorkers(NOW))

    with pytest.raises(flow_run_loop.DecisionError, match=r"^2 decisions not carried out: flow run odd: K"):
        asyncio.run(carry_out())
    assert server.told == ("bad", "good")


def test_a_log_that_takes_no_line_costs_no_report() -> None:
    """A state that was set is not set again: what failed after it would be missing for good."""

    class Server:
        reported = False

        async def set_state(self, _: Decision) -> bool:
            return True

        async def report_end(self, _: FlowRun, __: DaskWorkers) -> None:
            self.reported = True

        async def log(self, _: Decision) -> None:
            raise TypeError("no line")

    server: Any = Server()
    decision = Decision(run(state("RUNNING")), state("CRASHED"))
    with pytest.raises(flow_run_loop.DecisionError, match="no line"):
        asyncio.run(flow_run_loop.carry_out(cast("Any", None), server, [decision], DaskWorkers(NOW)))
    assert server.reported
