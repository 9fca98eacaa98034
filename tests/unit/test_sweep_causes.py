"""Reasons of drivers, from Jobs, pods and events as a real Kubernetes 1.34 gives them."""

# ruff: noqa: E501 - rows of a table

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tidepool.operate.sweep import causes

Object = dict[str, Any]

IMAGE = "registry.example.com/tidepool@sha256:" + "1" * 64
LIMIT = "2Gi"


def job(*conditions: Object, name: str = "blue-heron-x7k2p") -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": "runs",
            "uid": f"uid-{name}",
            "creationTimestamp": "2026-11-27T05:00:00Z",
        },
        "spec": {"activeDeadlineSeconds": 900},
        "status": {
            "conditions": [
                {"status": "True", "lastTransitionTime": "2026-11-27T05:01:00Z", **each} for each in conditions
            ]
        },
    }


FAILED = {"type": "Failed", "reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
COMPLETE = {"type": "Complete", "reason": "CompletionsReached"}
DEADLINE = {"type": "Failed", "reason": "DeadlineExceeded", "message": "Job was active longer than specified deadline"}


def pod(state: Object | None = None, phase: str = "Pending", *conditions: Object, **more: Any) -> Object:
    resources = {"requests": more.pop("requests", {"cpu": "250m", "memory": "512Mi"}), "limits": {"memory": "1Gi"}}
    metadata = {
        "name": "blue-heron-x7k2p-abcde",
        "uid": "uid-blue-heron-x7k2p-abcde",
        "creationTimestamp": "2026-11-27T05:00:01Z",
    }
    if more.pop("deleted", False):
        metadata["deletionTimestamp"] = "2026-11-27T05:01:00Z"
    statuses = [{"name": "prefect-job", "restartCount": 0, "state": state}] if state else []
    return {
        "metadata": metadata,
        "spec": {
            "nodeName": "node-a",
            "containers": [{"name": "prefect-job", "image": IMAGE, "resources": resources}],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": LIMIT}}],
        },
        "status": {"phase": phase, "containerStatuses": statuses, "conditions": list(conditions), **more},
    }


def terminated(code: int, reason: str = "Error", message: str = "") -> Object:
    return {
        "terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-11-27T05:01:00Z"}
    }


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def disrupted(reason: str, message: str = "") -> Object:
    return {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}


def event(reason: str, message: str, name: str = "blue-heron-x7k2p", kind: str = "Job", at: str = "05:00:05") -> Object:
    return {
        "type": "Warning", "reason": reason, "message": message, "lastTimestamp": f"2026-11-27T{at}Z",
        "involvedObject": {"kind": kind, "name": name, "uid": f"uid-{name}"},
    }  # fmt: skip


def node(name: str = "node-a", cpu: str = "2", *, ready: str = "True") -> Object:
    status = {"allocatable": {"cpu": cpu, "memory": "8131964Ki"}, "conditions": [{"type": "Ready", "status": ready}]}
    return {"metadata": {"name": name}, "status": status}


# --- it has ended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "pods", "events", "expected"),
    [
        (job(FAILED), [pod(terminated(137, "OOMKilled"), "Failed")], [], "driver out of memory (limit 1Gi); raise memory_limit"),
        # The container's first process was left and ended by itself.
        (job(COMPLETE), [pod(terminated(0, "OOMKilled"), "Succeeded")], [], "driver out of memory (limit 1Gi); raise memory_limit"),
        (job(FAILED), [pod(terminated(137), "Failed")], [], "driver ended with exit code 137 (SIGKILL)"),
        (
            job(FAILED),
            [pod(terminated(137, message="INFO | the Dask dashboard is at …"), "Failed")],
            [],
            "driver ended with exit code 137 (SIGKILL)",
        ),
        (job(FAILED), [pod(terminated(143), "Failed")], [], "driver ended with exit code 143 (SIGTERM)"),
        (job(FAILED), [pod(terminated(200), "Failed")], [], "driver ended with exit code 200"),
        (
            job(FAILED),
            [pod(terminated(1, message="Traceback …\n\nModuleNotFoundError: No module named 'flows'\n"), "Failed")],
            [],
            "driver ended with exit code 1: ModuleNotFoundError: No module named 'flows'",
        ),
        (job(COMPLETE), [pod(terminated(0, "Completed"), "Succeeded")], [], "driver ended with exit code 0, without a final state of the run"),
        (job(DEADLINE), [], [], "deadline of 900 s over"),
        (job(DEADLINE), [pod(terminated(143), "Failed")], [], "deadline of 900 s over"),
        (
            job(FAILED),
            [
                pod(
                    None, "Failed", reason="Evicted",
                    message="The node was low on resource: memory. Threshold quantity: 100Mi, available: 51424Ki. Container "
                    "prefect-job was using 812456Ki, request is 512Mi, has larger consumption of memory. ",
                )
            ],
            [],
            "driver pod evicted: node low on memory",
        ),
        (
            job(FAILED),
            [pod(None, "Failed", reason="Evicted", message='Usage of EmptyDir volume "tmp" exceeds the limit "2Gi". ')],
            [],
            "driver pod evicted: its /tmp is full (limit 2Gi); raise tmp_size_limit",
        ),
        (
            job(FAILED),
            [pod(terminated(143), "Failed", disrupted("EvictionByEvictionAPI", "Eviction API: evicting"))],
            [],
            "driver pod evicted: its node was drained",
        ),
        (
            job(FAILED),
            [pod(terminated(143), "Failed", disrupted("PreemptionByScheduler", "default-scheduler: preempting"))],
            [],
            "driver pod preempted by a pod of a higher priority",
        ),
        (
            job(FAILED),
            [pod({"running": {}}, "Failed", disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"))],
            [],
            "driver pod deleted: node node-a not ready or tainted",
        ),
        (
            job(FAILED),
            [pod(None, "Failed", disrupted("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."))],
            [],
            "driver pod evicted: Pod was terminated in response to imminent node shutdown.",
        ),
        (job(FAILED), [pod(terminated(143), "Failed", deleted=True)], [], "driver pod deleted"),
        (job(FAILED), [], [], "driver pod deleted"),
        (
            job(FAILED),
            [],
            [event("Evicted", "The node was low on resource: ephemeral-storage.", "blue-heron-x7k2p-abcde", "Pod")],
            "driver pod evicted: node low on disk",
        ),
        # Of another run whose Job's name begins in the same way.
        (job(FAILED), [], [event("Evicted", "The node was low on resource: memory.", "blue-heron-x7k2p-abcde-fghij", "Pod")], "driver pod deleted"),
        (None, [], [], "its Job was deleted"),
    ],
)  # fmt: skip
def test_a_driver_that_has_ended(given: Object | None, pods: list[Object], events: list[Object], expected: str) -> None:
    assert causes.cause(given, pods, events) == expected


def test_the_node_of_a_pod_that_cannot_report_is_named() -> None:
    lost = pod({"running": {}}, "Failed", deleted=True)
    assert causes.cause(job(FAILED), [lost], [], [node(ready="Unknown")]) == "node node-a not ready"
    assert causes.cause(job(FAILED), [lost], [], [node()]) == "driver pod deleted"


def test_the_newest_pod_counts() -> None:
    first = pod(terminated(1), "Failed")
    second = pod(terminated(137, "OOMKilled"), "Failed")
    second["metadata"]["creationTimestamp"] = "2026-11-27T05:00:30Z"
    assert causes.cause(job(FAILED), [second, first], []).startswith("driver out of memory")


def test_a_job_that_fails_has_not_ended_while_its_pod_may_run() -> None:
    assert not causes.ended(job({"type": "FailureTarget", "reason": "DeadlineExceeded"}))
    assert causes.ended(job({"type": "FailureTarget"}, FAILED)) == "Failed"
    assert causes.ended(job({"type": "SuccessCriteriaMet"}, COMPLETE)) == "Complete"
    assert causes.ended(None) == "deleted"
    assert causes.over_deadline(job(DEADLINE))
    assert not causes.over_deadline(job(FAILED))
    assert not causes.over_deadline(None)


def test_the_last_lines_of_a_driver_are_those_of_its_status() -> None:
    assert causes.last_lines([pod(), pod(terminated(1, message=" a\nb\n"), "Failed")]) == "a\nb"
    assert causes.last_lines([pod({"running": {}}, "Running")]) == ""


# --- it does not start ------------------------------------------------------------------------------------------------

NOT_FOUND = (
    f'Back-off pulling image "{IMAGE}": ErrImagePull: rpc error: code = NotFound desc = failed to pull and unpack image '
    f'"{IMAGE}": failed to resolve reference "{IMAGE}": {IMAGE}: not found'
)
DENIED = (
    'failed to pull and unpack image "x": failed to resolve reference "x": pull access denied, repository does not exist '
    "or may require authorization: server message: insufficient_scope: authorization failed"
)
UNREACHABLE = 'failed to do request: Head "https://x/v2/": dial tcp 10.0.0.9:5000: connect: connection refused'


def unschedulable(message: str) -> Object:
    return {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}


NO_CPU = (
    "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are available: 1 No preemption victims found for "
    "incoming pod."
)
TAINTED = (
    "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) had untolerated taint {spot: true}. no new claims to deallocate, preemption: 0/3 nodes are "
    "available: 3 Preemption is not helpful for scheduling."
)
QUOTA = (
    'Error creating: pods "blue-heron-x7k2p-abcde" is forbidden: exceeded quota: tidepool-runs, requested: pods=1, used: '
    "pods=11, limited: pods=11"
)
QUOTA_OF_CPU = (
    'Error creating: pods "blue-heron-x7k2p-abcde" is forbidden: exceeded quota: tidepool-runs, requested: '
    "limits.memory=4Gi,requests.cpu=2, used: limits.memory=15Gi,requests.cpu=7, limited: limits.memory=16Gi,requests.cpu=8"
)
REFUSED = (
    "Error creating: pods \"blue-heron-x7k2p-abcde\" is forbidden: ValidatingAdmissionPolicy 'driver' denied request: no "
    "hostPath"
)


@pytest.mark.parametrize(
    ("pods", "events", "expected"),
    [
        ([pod(waiting("ImagePullBackOff", NOT_FOUND))], [], f"image {IMAGE} cannot be pulled: not found"),
        ([pod(waiting("ErrImagePull", DENIED))], [], f"image {IMAGE} cannot be pulled: access denied; check image.pullSecrets"),
        ([pod(waiting("ErrImagePull", UNREACHABLE))], [], f"image {IMAGE} cannot be pulled: its registry does not answer"),
        ([pod(waiting("ErrImagePull", "a: b: disk is gone"))], [], f"image {IMAGE} cannot be pulled: disk is gone"),
        ([pod(waiting("InvalidImageName"))], [], f"image {IMAGE} cannot be pulled: invalid name"),
        (
            [pod(waiting("CreateContainerConfigError", 'secret "tidepool-flow-run-api" not found'))],
            [],
            'driver container cannot start: CreateContainerConfigError: secret "tidepool-flow-run-api" not found',
        ),
        ([pod(None, "Pending", unschedulable(TAINTED))], [], "no node fits: 1 Insufficient cpu, 2 node(s) had untolerated taint {spot: true}"),
        ([], [event("FailedCreate", QUOTA)], "quota tidepool-runs: pods 11 of 11"),
        (
            [],
            [event("FailedCreate", QUOTA), event("FailedCreate", QUOTA_OF_CPU, at="05:00:30")],
            "quota tidepool-runs: limits.memory 15Gi of 16Gi (asked: 4Gi), requests.cpu 7 of 8 (asked: 2)",
        ),
        ([], [event("FailedCreate", REFUSED)], "driver pod refused: ValidatingAdmissionPolicy 'driver' denied request: no hostPath"),
        (
            [pod(waiting("ContainerCreating"))],
            [event("FailedMount", 'MountVolume.SetUp failed for volume "x": not found', "blue-heron-x7k2p-abcde", "Pod")],
            'driver pod cannot start: MountVolume.SetUp failed for volume "x": not found',
        ),
        (
            [pod(waiting("ContainerCreating"))],
            [event("FailedMount", each, "blue-heron-x7k2p-abcde", "Pod", at) for each, at in (("first", "05:00:05"), ("last", "05:00:30"))],
            "driver pod cannot start: last",
        ),
        ([pod(waiting("ContainerCreating"))], [], ""),
        ([pod()], [], ""),
        ([], [], ""),
        ([], [event("FailedCreate", QUOTA, name="red-fox-aaaaa")], ""),
        ([pod({"running": {"startedAt": "2026-11-27T05:00:04Z"}}, "Running")], [event("FailedMount", "late", "blue-heron-x7k2p-abcde", "Pod")], ""),
    ],
)  # fmt: skip
def test_a_driver_that_does_not_start(pods: list[Object], events: list[Object], expected: str) -> None:
    assert causes.cause(job(), pods, events) == expected


@pytest.mark.parametrize(
    ("lacks", "expected"),
    [
        ({"message"}, "driver pod cannot start: FailedMount"),
        ({"reason"}, "driver pod cannot start: x"),
        ({"reason", "message"}, "driver pod cannot start: a warning without a reason"),
    ],
)
def test_a_warning_may_lack_reason_and_message(lacks: set[str], expected: str) -> None:
    starts = pod(waiting("ContainerCreating"))
    about = event("FailedMount", "x", starts["metadata"]["name"], "Pod")
    found = {key: value for key, value in about.items() if key not in lacks}
    assert causes.cause(job(), [starts], [found]) == expected


@pytest.mark.parametrize(
    ("requests", "message", "nodes", "expected"),
    [
        ({"cpu": "7"}, NO_CPU, [node(), node(cpu="1500m")], "no node has 7 CPU free (asked: 7; largest node: 2)"),
        ({"cpu": "250m"}, NO_CPU, [node()], "no node has 0.25 CPU free (asked: 0.25; largest node: 2)"),
        ({"cpu": "7"}, NO_CPU, None, "no node has 7 CPU free (asked: 7)"),
        (
            {"memory": "64Gi"},
            NO_CPU.replace("cpu", "memory"),
            [node()],
            "no node has 64Gi memory free (asked: 64Gi; largest node: 7.76Gi)",
        ),
    ],
)
def test_what_no_node_has(requests: Object, message: str, nodes: list[Object] | None, expected: str) -> None:
    waits = pod(None, "Pending", unschedulable(message), requests=requests)
    assert causes.cause(job(), [waits], [], nodes) == expected


def test_a_long_sentence_of_another_is_cut() -> None:
    found = causes.cause(job(FAILED), [pod(terminated(1, message="x" * 1000), "Failed")], [])
    assert len(found) < 350
    assert found.endswith("…")


# --- recorded ---------------------------------------------------------------------------------------------------------

RECORDED = Path(__file__).parent / "recorded" / "drivers.json"


@pytest.mark.parametrize(
    "case", json.loads(RECORDED.read_text()) if RECORDED.is_file() else [], ids=lambda each: each["expected"]
)
def test_a_driver_as_a_cluster_recorded_it(case: Object) -> None:
    assert causes.cause(case["job"], case["pods"], case["events"], case["nodes"]) == case["expected"]
