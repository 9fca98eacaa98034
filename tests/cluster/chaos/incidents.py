"""Incidents that need a cluster, as on-call sees them, `make incidents`: the cause is one sentence everywhere.

State, report, message and `tidepool status` have it, and the alert fires. The drills do the same on a local stack.
`make test-cluster` does not run it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import ROWS
from installed import AUTH
from rich.console import Console

from tests.drill.on_call import OnCall, around

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from world import World

INCIDENTS = ("driver-oom", "quota", "image-missing")
# Of tier 3 nothing is told.
TAGS = ["tier:1", "owner:platform"]
# So many that the alert fires.
RUNS = 2


@pytest.fixture
def on_call(world: World, tmp_path: Path) -> Iterator[OnCall]:
    """What on-call sees of the installation, from this machine."""
    platform = world.platform
    there = {
        "PREFECT_API_URL": platform.api,
        "PREFECT_API_AUTH_STRING": ":".join(AUTH),
        "TIDEPOOL_KUBERNETES_NAMESPACE": platform.runs.name,
    }
    with around(there) as (variables, receiver):
        seen = OnCall(platform.api, tmp_path, Console(stderr=True), variables, receiver)
        try:
            with seen.alerts(tmp_path):
                yield seen
        finally:
            seen.stop()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", INCIDENTS)
def test_the_cause_is_one_sentence(world: World, on_call: OnCall, name: str) -> None:
    row = ROWS[name]
    deployment = f"incident-{name}"
    found = world.deployment(deployment, job_variables=row.variables, tags=TAGS, **row.deployment)
    on_call.start_exporter()
    with row.around(world):
        runs = [world.start(found, **row.parameters) for _ in range(RUNS)]
        for run in runs:
            on_call.reaches(run, *row.expected)
    on_call.alert("TidepoolRunsFailing", deployment=deployment)
    # One message for both, which names one of them.
    told = on_call.told(deployment, "tidepool status ")["message"]
    [run] = [each for each in runs if f"tidepool status {each[:8]}" in told]
    assert row.says in on_call.state(run)["message"]
    on_call.cause(run)
    on_call.status("failing")
    on_call.execute(f"tidepool status {run}", told=True)
