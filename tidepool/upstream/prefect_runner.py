"""Private parts of Prefect's runner: the processes that `prefect flow-run execute` starts."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.abc
from prefect.cli import flow_run as command
from prefect.runner import _workspace_supervisor as supervisor
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.runner._workspace_runtime import WorkspaceSupervisorConfig
from prefect.runner._workspace_starter import WorkspaceResolvingEngineCommandStarter
from prefect.utilities.processutils import command_to_string, get_sys_executable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prefect.client.schemas.objects import FlowRun
    from prefect.runner._process_manager import ProcessHandle


def prepare_in_process(condition: Callable[[FlowRun], Awaitable[bool]]) -> None:
    """Have `prefect flow-run execute` prepare a flow run's code in its own process where the condition holds.

    Why: each Python process imports Prefect for a second, and an image that holds the code needs no preparation.
    Watch: `prefect.runner._workspace_supervisor.supervise`, which prepares and then calls `_launch_engine`.
    Delete when: Prefect has no process between its command and the engine for a deployment without pull steps.
    """

    class Starter(WorkspaceResolvingEngineCommandStarter):
        async def start(
            self,
            flow_run: FlowRun,
            task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED,
        ) -> None:
            if not await condition(flow_run):
                await super().start(flow_run, task_status=task_status)
                return

            async def launch(command: list[str], *, cwd: Path, environment: dict[str, str]) -> int:
                engine = EngineCommandStarter(
                    command=command_to_string(command),
                    cwd=cwd,
                    env=dict(environment),
                    stream_output=self._stream_output,
                    heartbeat_seconds=self._heartbeat_seconds,
                    deployment_name=self._deployment_name,
                    control_channel=self._control_channel,
                    isolate_process_group=True,
                    env_overrides_settings=True,
                )
                await engine.start(flow_run, task_status=task_status)
                return 0

            supervisor._launch_engine = launch
            config = WorkspaceSupervisorConfig(
                flow_run_id=flow_run.id,
                workspace_root=self._workspace_root,
                manifest_path=self._manifest_path,
                command=command_to_string([get_sys_executable(), "-m", "prefect.engine"]),
            )
            with chdir(Path.cwd()):
                await supervisor.supervise(config)

    command.WorkspaceResolvingEngineCommandStarter = Starter  # type: ignore[attr-defined]
