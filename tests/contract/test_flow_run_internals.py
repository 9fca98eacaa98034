"""What tidepool.operate.flow_run relies on inside Prefect 3.9.1: how its command starts a flow's process.

If one fails: compare `InPlaceStarter.start` with `prefect.runner._workspace_supervisor.supervise`, whose work it does,
and run `make test-cluster`. To do without: the job variable `command` of the work pool's template, empty.
"""

from __future__ import annotations

import inspect

from prefect.cli import flow_run as command
from prefect.runner import _workspace_supervisor as supervisor
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.runner._workspace_runtime import PreparedWorkspaceManifest
from prefect.runner._workspace_starter import WorkspaceResolvingEngineCommandStarter


def test_the_command_makes_its_starter_by_the_name_that_is_replaced() -> None:
    source = inspect.getsource(command.execute)
    assert "starter = WorkspaceResolvingEngineCommandStarter(" in source
    assert "hook_runner=starter.hook_runner" in source
    assert command.WorkspaceResolvingEngineCommandStarter is WorkspaceResolvingEngineCommandStarter


def test_the_starter_has_what_is_used() -> None:
    source = inspect.getsource(WorkspaceResolvingEngineCommandStarter)
    for name in ("_workspace_root", "_manifest_path", "_stream_output", "_heartbeat_seconds", "_deployment_name"):
        assert f"self.{name} = " in source
    wanted = {"entrypoint", "cwd", "env", "control_channel", "isolate_process_group", "env_overrides_settings"}
    assert wanted <= inspect.signature(EngineCommandStarter).parameters.keys()


def test_the_supervisor_does_what_is_done_here() -> None:
    source = inspect.getsource(supervisor.supervise)
    for step in (
        "prepare_workspace_for_flow_run(",
        "sanitize_subprocess_env(workspace_environment(workspace))",
        'environment["PREFECT__FLOW_RUN_ID"]',
        'environment["PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS"] = "false"',
        'environment["PREFECT__FLOW_ENTRYPOINT"] = workspace.runtime_entrypoint',
        "write_private_model(config.manifest_path, manifest)",
    ):
        assert step in source
    assert set(PreparedWorkspaceManifest.model_fields) == {
        "working_directory",
        "project_root",
        "runtime_entrypoint",
        "hook_command",
        "environment",
    }
    engine = supervisor._hook_command(["python", "-m", "prefect.engine"])
    assert engine is not None
    assert engine[-1] == "hook"
