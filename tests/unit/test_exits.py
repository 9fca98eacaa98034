"""Ends of processes and containers in words, the same wherever on-call reads them."""

from __future__ import annotations

from typing import Any

import pytest

from tidepool.compute.clusters.kubernetes import pod_status
from tidepool.operate.status.picture import Kubernetes, _objects
from tidepool.report import exits


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exit code 0"),
        (7, "exit code 7"),
        (137, "exit code 137"),
        (-9, "killed by SIGKILL (137)"),
        (-15, "killed by SIGTERM (143)"),
        (-40, "killed by signal 40 (168)"),
    ],
)
def test_the_end_of_a_process_in_words(code: int, words: str) -> None:
    assert exits.process(code) == words


@pytest.mark.parametrize(
    ("reason", "code", "words"),
    [
        ("OOMKilled", 137, "out of memory (137)"),
        ("Error", 137, "killed by SIGKILL (137)"),
        ("Error", 1, "exit code 1"),
        ("Error", 255, "exit code 255"),
        ("StartError", 128, "StartError (128)"),
        ("DeadlineExceeded", 143, "killed by SIGTERM (143)"),
        (None, 3, "exit code 3"),
        (None, None, "exit code 0"),
    ],
)
def test_a_run_and_status_have_the_same_words_for_the_end_of_a_container(
    reason: str | None, code: int | None, words: str
) -> None:
    ended = {"terminated": {"reason": reason, "exitCode": code}}
    assert exits.container(ended["terminated"]) == words
    pod: dict[str, Any] = {"metadata": {"name": "p"}, "status": {"containerStatuses": [{"state": ended}]}}
    assert pod_status.last_exit(pod) == words
    assert _objects(Kubernetes(dask_pods=[pod])) == [f"Dask pod p: Unknown, {words}"]


def test_a_container_that_has_done_its_work_needs_no_words() -> None:
    ended = {"terminated": {"reason": "Completed", "exitCode": 0}}
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Succeeded", "containerStatuses": [{"state": ended}]}}
    assert _objects(Kubernetes(pods=[pod])) == ["driver pod p: Succeeded"]
