"""`prefect flow-run execute` with tidepool.upstream.prefect_runner, as a flow run's pod executes it.

If one fails: compare `supervise` with `prefect.runner._workspace_supervisor.supervise`, and run `make test-cluster`. To
do without: the job variable `command` of the work pool's template, empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.flow_run_process import Pod

if TYPE_CHECKING:
    from pathlib import Path

PULL = [{"prefect.deployments.steps.set_working_directory": {"directory": "."}}]


@pytest.fixture
def pod(tmp_path: Path, prefect_server: str) -> Pod:
    return Pod(tmp_path, prefect_server)


def test_a_flow_run_without_pull_steps_starts_one_process_which_forks_the_engine(pod: Pod) -> None:
    executed = pod.execute("completes")
    assert executed.flow_run.state_name == "Completed"
    assert executed.code == 0
    assert executed.processes == ["-m tidepool.operate.flow_run"]


def test_a_process_with_threads_starts_the_engine(tmp_path: Path, prefect_server: str) -> None:
    executed = Pod(tmp_path, prefect_server, WITH_A_THREAD="1").execute("completes")
    assert executed.flow_run.state_name == "Completed"
    assert executed.code == 0
    assert executed.processes == ["-m tidepool.operate.flow_run", "-m tidepool.operate.engine"]


def test_a_flow_run_with_pull_steps_is_prepared_in_a_process_of_its_own(pod: Pod) -> None:
    executed = pod.execute("completes", PULL)
    assert executed.flow_run.state_name == "Completed"
    assert executed.processes == [
        "-m tidepool.operate.flow_run",
        "-m prefect.runner._workspace_supervisor",
        "-m prefect.engine",
    ]


def test_a_flow_run_whose_process_is_killed_is_crashed_and_its_hooks_run(pod: Pod) -> None:
    executed = pod.execute("is_killed")
    assert (executed.flow_run.state_name, executed.code) == ("Crashed", 137)
    assert executed.hook == "Crashed"


@pytest.mark.parametrize(
    ("name", "pull_steps", "state", "code"),
    [
        pytest.param("fails", None, "Failed", 1, id="its own error"),
        pytest.param("is_killed", PULL, "Crashed", 137, id="killed, with pull steps"),
        pytest.param("ends_at_once", None, "Crashed", 3, id="ended without a report"),
        pytest.param("exits", None, "Crashed", 1, id="its own exit"),
        pytest.param("reports_and_is_killed", None, "Completed", 0, id="killed after its report"),
    ],
)
def test_the_exit_code_is_the_runs(
    pod: Pod, name: str, pull_steps: list[dict[str, dict[str, str]]] | None, state: str, code: int
) -> None:
    executed = pod.execute(name, pull_steps)
    assert (executed.flow_run.state_name, executed.code) == (state, code), executed.output
