"""Reasons of pods that do not run."""

from __future__ import annotations

from typing import Any

import pytest

from tidepool.compute.clusters.kubernetes import pod_status


def pod(component: str = "worker", *containers: dict[str, Any], **conditions: dict[str, str]) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "labels": {"dask.org/component": component}},
        "spec": {},
        "status": {
            "containerStatuses": list(containers),
            "conditions": [{"type": name, **value} for name, value in conditions.items()],
        },
    }


OOM = {
    "restartCount": 1,
    "state": {"running": {}},
    "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
}
LOOP = {
    "restartCount": 2,
    "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}},
    "lastState": {
        "terminated": {"reason": "Error", "exitCode": 1, "message": "Traceback …\nImportError: no module x\n"}
    },
}
STARTING = {"restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}}
PULL = {"restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
NAME = {"restartCount": 0, "state": {"waiting": {"reason": "InvalidImageName", "message": "couldn't parse"}}}


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pods", "sentence"),
    [
        ([], ""),
        ([pod("worker", STARTING)], ""),
        ([pod("worker", PULL), pod("worker", PULL)], "worker waiting: ImagePullBackOff not found"),
        ([pod("scheduler", LOOP)], "scheduler terminated: exit code 1, last line: ImportError: no module x"),
        (
            [
                pod(
                    "worker",
                    PodScheduled={"status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu."},
                )
            ],
            "worker not scheduled: 0/3 nodes are available: 3 Insufficient cpu.",
        ),
    ],
)
def test_each_reason_is_given_once(pods: list[dict[str, Any]], sentence: str) -> None:
    assert pod_status.reasons(pods) == sentence


@pytest.mark.parametrize(
    ("status", "permanent"), [(LOOP, True), (NAME, True), (PULL, False), (STARTING, False), (OOM, False)]
)
def test_only_a_permanent_failure_ends_the_wait(status: dict[str, Any], *, permanent: bool) -> None:
    assert bool(pod_status.permanent_failure([pod("worker", status)])) is permanent


def test_an_out_of_memory_kill_is_named() -> None:
    assert pod_status.last_exit(pod("worker", OOM)) == "out of memory (137)"
    for code, reason, words in ((137, "Error", "killed by SIGKILL (137)"), (1, "Error", "exit code 1")):
        ended = {"lastState": {"terminated": {"reason": reason, "exitCode": code}}}
        assert pod_status.last_exit(pod("worker", ended)) == words
    assert pod_status.last_exit(pod("worker", STARTING)) == ""


def test_restarts_of_all_containers_are_counted() -> None:
    assert pod_status.restarts(pod("worker", OOM, LOOP)) == 3
