"""What a flow run's pod executes: `python -m tidepool.operate.flow_run`, which is `prefect flow-run execute`, sooner.

Prefect looks after a run with one Python process, prepares its code with a second and executes it with a third; each
imports Prefect for a second. Here the first one prepares the code too, when there is nothing to prepare: the image is
the code. All else is Prefect's: cancellation, SIGTERM, hooks, exit code.
"""

from __future__ import annotations

import sys
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.abc
from prefect.cli import flow_run as command
from prefect.client.orchestration import get_client
from prefect.runner import _workspace_supervisor as supervisor
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.runner._workspace_resolver import prepare_workspace_for_flow_run
from prefect.runner._workspace_runtime import PreparedWorkspaceManifest, write_private_model
from prefect.runner._workspace_starter import WorkspaceResolvingEngineCommandStarter, workspace_environment
from prefect.utilities.processutils import get_sys_executable, sanitize_subprocess_env

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.runner._process_manager import ProcessHandle


class InPlaceStarter(WorkspaceResolvingEngineCommandStarter):
    """Prefect's starter of the flow's process; without pull steps it prepares the workspace in this process."""

    async def start(
        self,
        flow_run: FlowRun,
        task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Starts it and waits for its end."""
        if not await _is_all_in_the_image(flow_run):
            # Steps may change this process: they get one of their own.
            await super().start(flow_run, task_status=task_status)
            return
        with chdir(Path.cwd()):
            workspace = await prepare_workspace_for_flow_run(flow_run.id, self._workspace_root)
        environment = sanitize_subprocess_env(
            {
                **workspace_environment(workspace),
                "PREFECT__FLOW_RUN_ID": str(flow_run.id),
                "PREFECT__FLOW_ENTRYPOINT": workspace.runtime_entrypoint,
                "PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS": "false",
            }
        )
        engine = [get_sys_executable(), "-m", "prefect.engine"]
        write_private_model(
            self._manifest_path,
            PreparedWorkspaceManifest(
                working_directory=workspace.working_directory,
                project_root=workspace.project_root,
                runtime_entrypoint=workspace.runtime_entrypoint,
                hook_command=supervisor._hook_command(engine),  # noqa: SLF001 - pinned by tests/contract
                environment=environment,
            ),
        )
        starter = EngineCommandStarter(
            entrypoint=workspace.runtime_entrypoint,
            cwd=workspace.working_directory,
            env=dict(environment),
            stream_output=self._stream_output,
            heartbeat_seconds=self._heartbeat_seconds,
            deployment_name=self._deployment_name,
            control_channel=self._control_channel,
            isolate_process_group=True,
            env_overrides_settings=True,
        )
        await starter.start(flow_run, task_status=task_status)


async def _is_all_in_the_image(flow_run: FlowRun) -> bool:
    async with get_client() as client:
        deployment = await client.read_deployment(flow_run.deployment_id) if flow_run.deployment_id else None
    return deployment is not None and not deployment.pull_steps and not deployment.storage_document_id


def main() -> None:
    """The command; the flow run's id is in the environment."""
    from prefect.cli import app

    command.WorkspaceResolvingEngineCommandStarter = InPlaceStarter  # type: ignore[attr-defined]
    sys.argv = ["prefect", "flow-run", "execute"]
    app()


if __name__ == "__main__":
    main()
