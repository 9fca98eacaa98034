"""`prefect flow-run execute` with tidepool.upstream.prefect_runner, as a flow run's pod executes it.

If one fails: compare `prepare_in_process` with `prefect.runner._workspace_supervisor.supervise`, and run `make
test-cluster`. To do without: the job variable `command` of the work pool's template, empty.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Pending

from tests.integration.conftest import migrated_database, prefect_server  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prefect.client.schemas.objects import FlowRun

FLOWS = """
import os, signal
from pathlib import Path
from prefect import flow

def report(flow, flow_run, state):
    Path(os.environ["HOOK"]).write_text(state.name)

@flow
def completes():
    assert os.environ["PREFECT__FLOW_ENTRYPOINT"] == "flows.py:completes"

@flow(on_crashed=[report])
def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Each Python process writes what it was started with.
SITE = """
import os, sys
with open(os.environ["PROCESSES"], "a") as file:
    print(*sys.orig_argv[1:3], file=file)
"""


@pytest.fixture
def execute(tmp_path: Path, prefect_server: str) -> Callable[..., tuple[FlowRun, list[str], str]]:  # noqa: F811
    """Executes a flow run of a flow of FLOWS; returns it, the Python processes, and what its hook reported."""
    source, site, processes, hook = (tmp_path / name for name in ("source", "site", "processes", "hook"))
    source.mkdir()
    site.mkdir()
    (source / "flows.py").write_text(FLOWS)
    (site / "sitecustomize.py").write_text(SITE)

    def run(name: str, pull_steps: list[dict[str, Any]] | None = None) -> tuple[FlowRun, list[str], str]:
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                flow_id=client.create_flow_from_name(name.replace("_", "-")),
                name=name,
                entrypoint=f"flows.py:{name}",
                path=".",
                pull_steps=pull_steps,
            )
            created = client.create_flow_run_from_deployment(deployment, state=Pending())
            done = subprocess.run(
                [sys.executable, "-m", "tidepool.operate.flow_run"],
                cwd=source,
                env={
                    **os.environ,
                    "PREFECT_API_URL": prefect_server,
                    "PREFECT__FLOW_RUN_ID": str(created.id),
                    "PYTHONPATH": str(site),
                    "PROCESSES": str(processes),
                    "HOOK": str(hook),
                },
                capture_output=True,
                text=True,
                check=False,
                timeout=200,
            )
            ended = client.read_flow_run(created.id)
        assert ended.state is not None
        assert ended.state.is_final(), f"{ended.state}\n{done.stdout}\n{done.stderr}"
        return ended, processes.read_text().splitlines(), hook.read_text() if hook.exists() else ""

    return run


def test_a_flow_run_without_pull_steps_takes_two_processes(execute: Callable[..., Any]) -> None:
    ended, processes, _ = execute("completes")
    assert ended.state.is_completed()
    assert processes == ["-m tidepool.operate.flow_run", "-m prefect.engine"]


def test_a_flow_run_with_pull_steps_is_prepared_in_a_process_of_its_own(execute: Callable[..., Any]) -> None:
    step = {"prefect.deployments.steps.set_working_directory": {"directory": "."}}
    ended, processes, _ = execute("completes", [step])
    assert ended.state.is_completed()
    assert processes == [
        "-m tidepool.operate.flow_run",
        "-m prefect.runner._workspace_supervisor",
        "-m prefect.engine",
    ]


def test_a_flow_run_whose_process_is_killed_is_crashed_and_its_hooks_run(execute: Callable[..., Any]) -> None:
    ended, _, reported = execute("is_killed")
    assert ended.state.is_crashed()
    assert reported == "Crashed"
