"""The chaos suite's own judgement: what it calls left over, stuck and falsely green."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster" / "chaos"))

import results
from trials import Row, faults, nothing_to_do
from world import Snapshot

RUN = "0123abcd-0000-0000-0000-000000000000"
CLUSTER_NAME = "chaos-items-0123abcd-1-x"
DASK = {"dask.org/cluster-name": CLUSTER_NAME}
OWN = {"prefect.io/flow-run-id": RUN}
CRASHES = Row(nothing_to_do, ("CRASHED",), 60.0, says="SIGKILL")


def an_object(kind: str, name: str, labels: dict[str, str], **status: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": name, "labels": labels}, "status": status}


def figures(**changes: Any) -> dict[str, Any]:
    crashed = {"state": "CRASHED", "name": "Crashed", "message": "driver killed (SIGKILL)"}
    return {**crashed, "final": True, "items": 30, "done": 4, "left": [], **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"left": ["Pod/x"]}, "left over after 60 s: Pod/x"),
        ({"final": False, "name": "Running"}, "stuck: Running 60 s after the fault"),
        ({"state": "COMPLETED"}, "falsely green: 26 items are missing"),
        ({"state": "COMPLETED", "done": 30}, "COMPLETED, expected CRASHED"),
        ({"message": "Flow run crashed"}, "the message lacks 'SIGKILL'"),
    ],
)
def test_a_broken_promise_is_named(changes: dict[str, Any], reason: str | None) -> None:
    found = faults(CRASHES, figures(**changes))
    assert reason in found if reason else found == []


@pytest.mark.parametrize(
    "each",
    [
        an_object("Job", "any-name", OWN, active=1),
        an_object("Pod", "any-name-1", OWN, phase="Running"),
        an_object("Pod", f"{CLUSTER_NAME}-scheduler-1", DASK, phase="Succeeded"),
        an_object("Secret", f"{CLUSTER_NAME}-tls", {}),
        an_object("Service", f"{CLUSTER_NAME}-scheduler", DASK),
        an_object("DaskWorkerGroup", f"{CLUSTER_NAME}-default", DASK),
    ],
    ids=lambda each: each["kind"],
)
def test_what_a_run_leaves_is_found(each: dict[str, Any]) -> None:
    assert Snapshot(objects=[each]).left(RUN) == [f"{each['kind']}/{each['metadata']['name']}"]


@pytest.mark.parametrize(
    "each",
    [
        an_object("Job", "any-name", OWN, conditions=[{"type": "Failed", "status": "True"}]),
        an_object("Pod", "any-name-1", OWN, phase="Failed"),
        an_object("Pod", "chaos-items-4567abcd-1-x-scheduler-1", DASK, phase="Running"),
        an_object("Secret", "tidepool-credentials", {}),
    ],
    ids=["finished Job", "finished driver pod", "of another run", "of all runs"],
)
def test_what_may_stay_is_not_left_over(each: dict[str, Any]) -> None:
    assert Snapshot(objects=[each]).left(RUN) == []


def test_the_table_counts_what_was_broken(tmp_path: Path) -> None:
    seconds = {"seconds_to_state": 4.0, "seconds_to_no_dask_pod": 9.0, "from_end": False, "twice": 0}
    for left in ([], ["Pod/x"]):
        of = figures(left=left, **seconds)
        results.add({"row": "engine-sigkill", "runner": "tidepool", **of, "faults": faults(CRASHES, of)}, tmp_path)
    results.write_table({"node-not-ready": "one node"}, ["engine-sigkill", "quota"], tmp_path)
    page = (tmp_path / "chaos.md").read_text()
    assert "tidepool: 2 trials, left over after 60 s in 1, falsely green 0, stuck 0." in page
    assert (
        "| engine-sigkill | tidepool | 2 | 1 | Crashed | 4 (4) | driver killed (SIGKILL) | 9 (9) | 8 of 60 | 0 "
        "| 1 Pod |" in page
    )
    assert "- engine-sigkill, 1 times: left over after 60 s: Pod/x" in page
    assert "Without a trial in this table: quota." in page
    assert "- node-not-ready: one node." in page
