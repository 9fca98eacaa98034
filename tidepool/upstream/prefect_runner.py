"""Private parts of Prefect's runner: the processes that `prefect flow-run execute` starts."""

from __future__ import annotations

import threading
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.abc
from prefect._internal.attempt_control import EngineOutcomeReceipt
from prefect.cli import flow_run as command
from prefect.runner import _flow_run_executor as executor
from prefect.runner import _starter_engine as starter_engine
from prefect.runner import _workspace_supervisor as supervisor
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.runner._state_proposer import StateProposer
from prefect.runner._workspace_runtime import WorkspaceSupervisorConfig
from prefect.runner._workspace_starter import WorkspaceResolvingEngineCommandStarter
from prefect.utilities.processutils import command_to_string, get_sys_executable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from prefect.client.schemas.objects import FlowRun, State
    from prefect.runner._process_manager import ProcessHandle


# Between the end of the engine's process and that of its output, which a process that it started may keep open.
_EXIT_SECONDS = 5
_ENGINE = "prefect.engine"


@dataclass(frozen=True)
class Ending:
    """The end of the process that executed a flow run.

    Attributes:
        status: Its exit status; negative: the signal that killed it. None: it did not start, or still runs.
        state: Type of the state that it reported to the server as its last one, such as COMPLETED; empty without one.
    """

    status: int | None
    state: str = ""


class Engine(Protocol):
    """A process that waits to become the engine."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """Its exit status; negative: the signal that killed it. None: it still runs."""

    def start(self, environment: dict[str, str], folder: str) -> bool:
        """Let it begin, as the leader of a process group; return whether it was still there."""

    def dismiss(self) -> None:
        """End it: it is not needed."""

    async def wait(self) -> int:
        """Wait for its end; return its exit status."""

    def kill(self) -> None:
        """Kill it, if it still runs."""


class _Noted:
    """A task status that keeps the handle of the started process."""

    def __init__(self, status: anyio.abc.TaskStatus[ProcessHandle]) -> None:
        self._status = status
        self.handle: ProcessHandle | None = None

    def started(self, value: Any = None) -> None:
        self.handle = value
        self._status.started(value)


def supervise(
    in_process: Callable[[FlowRun], Awaitable[bool]],
    ended: Callable[[FlowRun, Ending], Awaitable[str]],
    engine_module: str = _ENGINE,
    waiting: Engine | None = None,
) -> Callable[[], bool]:
    """Change how `prefect flow-run execute` starts the process of a flow run, and follow its end.

    Args:
        in_process: Whether the command prepares a flow run's code in its own process.
        ended: Awaited when the process has ended, before Prefect reports a crash; also when the command is cancelled.
            Returns the message of the crash; empty: Prefect's own.
        engine_module: Module that executes the flow run in the process; of a run that is not prepared in the command's
            own process, Prefect's.
        waiting: A process that waits to execute that module; it is used instead of a new one.

    Returns:
        Whether the command has been told to end, by SIGTERM.

    Why: each Python process imports Prefect for a second, and an image that holds the code needs no preparation. And
        the command exits with 0 after every crash that it could report, says "typically … memory limits" of each
        SIGKILL, and knows nothing of the run's Dask clusters. Told to end it exits with 1, and names no signal.
    Watch: `prefect.runner._workspace_supervisor.supervise`, which prepares and then calls `_launch_engine`;
        `prefect.runner._flow_run_executor.FlowRunExecutor.submit` and its `crash_unreported`;
        `prefect.cli.flow_run._install_termination_handler`.
    Delete when: Prefect has no process between its command and the engine for a deployment without pull steps, and
        the command's exit code and the crash's message tell how the run ended.
    """
    words = ""

    class Proposer(StateProposer):
        async def propose_crashed(self, flow_run: FlowRun, message: str) -> State[Any] | None:
            return await super().propose_crashed(flow_run, words or message)

    class Starter(WorkspaceResolvingEngineCommandStarter):
        async def start(
            self,
            flow_run: FlowRun,
            task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED,
        ) -> None:
            nonlocal words
            noted = _Noted(task_status)
            try:
                if await in_process(flow_run):
                    await self._start_in_process(flow_run, noted)
                else:
                    if waiting:
                        waiting.dismiss()
                    await super().start(flow_run, task_status=noted)
            finally:
                with anyio.CancelScope(shield=True):
                    words = await ended(flow_run, await self._ending(flow_run, noted.handle))

        async def _ending(self, flow_run: FlowRun, handle: ProcessHandle | None) -> Ending:
            if handle is None:
                return Ending(None)
            with anyio.move_on_after(_EXIT_SECONDS):
                while handle.returncode is None:  # noqa: ASYNC110 - its process has no event
                    await anyio.sleep(0.05)
            channel = self._control_channel
            conclusion = channel.get_conclusion(flow_run.id) if channel else None
            state = conclusion.state_type if isinstance(conclusion, EngineOutcomeReceipt) else None
            return Ending(handle.returncode, state or "")

        async def _start_in_process(self, flow_run: FlowRun, task_status: _Noted) -> None:
            async def launch(command: list[str], *, cwd: Path, environment: dict[str, str]) -> int:
                # Only now: of another module, Prefect does not know how to run the crashed run's hooks.
                engine = EngineCommandStarter(
                    command=command_to_string([engine_module if each == _ENGINE else each for each in command]),
                    cwd=cwd,
                    env=dict(environment),
                    stream_output=self._stream_output,
                    heartbeat_seconds=self._heartbeat_seconds,
                    deployment_name=self._deployment_name,
                    control_channel=self._control_channel,
                    isolate_process_group=True,
                    env_overrides_settings=True,
                )
                with _becomes_engine(waiting):
                    await engine.start(flow_run, task_status=task_status)
                return 0

            supervisor._launch_engine = launch
            config = WorkspaceSupervisorConfig(
                flow_run_id=flow_run.id,
                workspace_root=self._workspace_root,
                manifest_path=self._manifest_path,
                command=command_to_string([get_sys_executable(), "-m", _ENGINE]),
            )
            with chdir(Path.cwd()):
                await supervisor.supervise(config)

    command.WorkspaceResolvingEngineCommandStarter = Starter  # type: ignore[attr-defined]
    executor.StateProposer = Proposer  # type: ignore[attr-defined]
    return _note_sigterm()


@contextmanager
def _becomes_engine(waiting: Engine | None) -> Iterator[None]:
    """Have the next process that Prefect starts be the one that waits; if that has ended, it is started as usual.

    Its output is not copied by this process: the two have the same.

    Why: a new process imports Prefect again, nearly half of the CPU time until a flow begins.
    Watch: `EngineCommandStarter.start`, which calls `run_process`; `ProcessHandle`, which needs of a process its id and
        exit status; `create_isolated_termination_scope`, which signals its process group.
    Delete when: Prefect executes the engine in a process that has imported it.
    """
    module: Any = starter_engine  # it imports the function, and does not export it
    run_process = module.run_process

    async def run_waiting(
        command: list[str],
        *,
        task_status: anyio.abc.TaskStatus[Any],
        task_status_handler: Callable[[Any], Any],
        env: dict[str, str],
        cwd: Path | str | None = None,
        **options: Any,
    ) -> Any:
        if waiting is None or not waiting.start(env, str(cwd or Path.cwd())):
            return await run_process(
                command, task_status=task_status, task_status_handler=task_status_handler, env=env, cwd=cwd, **options
            )
        task_status.started(task_status_handler(waiting))
        try:
            await waiting.wait()
        except BaseException:
            waiting.kill()
            with anyio.CancelScope(shield=True):
                await waiting.wait()
            raise
        return waiting

    module.run_process = run_waiting
    try:
        yield
    finally:
        module.run_process = run_process


def _note_sigterm() -> Callable[[], bool]:
    told = threading.Event()
    install = command._install_termination_handler

    def install_noting(handler: Callable[[], None]) -> bool:
        def handle() -> None:
            told.set()
            handler()

        return install(handle)

    command._install_termination_handler = install_noting
    return told.is_set
