"""Private parts of Prefect that run task runs and flow runs; those of `prefect.runner` are in `prefect_runner`."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

# Suspension of a flow run: its task runs share the request, and every wait for one of them raises it.
# Why: a task engine and a future of our own must honour `suspend_flow_run` as Prefect's do.
# Watch: the module is new in 3.8; upstream says it will be public in prefect.flow_runs.
# Delete when: both names can be imported from a public module.
from prefect._flow_run_suspension import FlowRunSuspensionRequest, raise_if_flow_run_suspension_requested
from prefect.blocks.core import Block
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.flow_engine import AsyncFlowRunEngine, FlowRunEngine
from prefect.task_engine import _create_task_run_locally
from prefect.utilities.dispatch import lookup_type

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import FlowRun, State, TaskRun

__all__ = [
    "FlowRunSuspensionRequest",
    "check_before_success",
    "follow_flow_runs",
    "has_unsent_events",
    "new_task_run",
    "prefer_loaded_blocks",
    "raise_if_flow_run_suspension_requested",
]


@cache
def check_before_success(check: Callable[[], None]) -> None:
    """Call `check` in a flow run's context when its flow function has returned, before Completed is proposed.

    An exception of the check is the flow's own: Prefect proposes Failed, with its retries and hooks.

    Why: the engine proposes Completed before it leaves the task runner, which is too late to report lost task runs.
    Watch: the TODO "closing task runner before completing the flow" in `FlowRunEngine.setup_run_context`.
    Delete when: a task runner is asked, or closed, before Completed is proposed. Should the check ever not be called,
    `TidepoolTaskRunner.__exit__` corrects the state through the public client.
    """
    succeed, succeed_async = FlowRunEngine.handle_success, AsyncFlowRunEngine.handle_success

    @wraps(succeed)
    def checked(self: FlowRunEngine[Any, Any], result: Any) -> Any:
        check()
        return succeed(self, result)

    @wraps(succeed_async)
    async def checked_async(self: AsyncFlowRunEngine[Any, Any], result: Any) -> Any:
        await asyncio.to_thread(check)
        return await succeed_async(self, result)

    FlowRunEngine.handle_success = checked  # type: ignore[method-assign]
    AsyncFlowRunEngine.handle_success = checked_async  # type: ignore[method-assign]


@cache
def follow_flow_runs(
    begin: Callable[[], None], before_end: Callable[[State[Any]], None], ended: Callable[[FlowRun], None]
) -> None:
    """Call functions at the beginning and the end of each flow run of this process that is not a subflow.

    Args:
        begin: Called before the flow run begins.
        before_end: Given its final state before the server hears of it; may change the state's message.
        ended: Given the flow run when its task runner is closed, whatever its state.

    Why: the report of a run belongs to its end, whatever the flow's author has written; hooks of a flow are the
    author's, run before the task runner is closed, and cannot change a message.
    Watch: `FlowRunEngine.start` and `set_state`, the same of `AsyncFlowRunEngine`.
    Delete when: Prefect has hooks for all flow runs of a process, after their task runner is closed.
    """
    start, start_async = FlowRunEngine.start, AsyncFlowRunEngine.start
    set_state, set_state_async = FlowRunEngine.set_state, AsyncFlowRunEngine.set_state

    def announce(engine: FlowRunEngine[Any, Any] | AsyncFlowRunEngine[Any, Any], state: State[Any]) -> None:
        # A subflow's engine has set this before its first state.
        inside = engine._started_with_in_process_parent_flow_run_context
        if state.is_final() and not (inside or engine.short_circuit):
            before_end(state)

    @contextmanager
    def following(engine: FlowRunEngine[Any, Any] | AsyncFlowRunEngine[Any, Any]) -> Iterator[None]:
        if FlowRunContext.get() is not None:  # a subflow
            yield
            return
        begin()
        try:
            yield
        finally:
            if engine.flow_run:
                ended(engine.flow_run)

    @contextmanager
    @wraps(start)
    def followed(self: FlowRunEngine[Any, Any]) -> Iterator[None]:
        with following(self), start(self):
            yield

    @asynccontextmanager
    @wraps(start_async)
    async def followed_async(self: AsyncFlowRunEngine[Any, Any]) -> AsyncIterator[None]:
        with following(self):
            async with start_async(self):
                yield

    @wraps(set_state)
    def announced(self: FlowRunEngine[Any, Any], state: State[Any], force: bool = False) -> State[Any]:  # noqa: FBT001, FBT002 - Prefect's
        announce(self, state)
        return set_state(self, state, force)

    @wraps(set_state_async)
    async def announced_async(
        self: AsyncFlowRunEngine[Any, Any],
        state: State[Any],
        force: bool = False,  # noqa: FBT001, FBT002 - Prefect's
    ) -> State[Any]:
        announce(self, state)
        return await set_state_async(self, state, force)

    FlowRunEngine.start = followed  # type: ignore[method-assign]
    AsyncFlowRunEngine.start = followed_async  # type: ignore[method-assign]
    FlowRunEngine.set_state = announced  # type: ignore[method-assign]
    AsyncFlowRunEngine.set_state = announced_async  # type: ignore[method-assign]


def new_task_run(task: Task[..., Any], task_run_id: UUID, context: FlowRunContext | None) -> TaskRun:
    """Create a Pending task run in memory, as the task engine does before it announces one.

    Why: a task run whose worker died unheard has to be announced by the driver.
    Watch: `prefect.task_engine._create_task_run_locally`.
    Delete when: Prefect has a public constructor of a task run from a task.
    """
    return _create_task_run_locally(task=task, id=task_run_id, flow_run_context=context)


def has_unsent_events() -> bool:
    """Return whether this process still has events to send.

    Why: workers of a shared Dask cluster outlive a flow run, so its events are waited for without stopping the service.
    Watch: `EventsWorker.wait_until_empty`, which has no timeout.
    Delete when: a service can be waited for with a timeout.
    """
    registry: Any = EventsWorker  # one dictionary for all of Prefect's services
    services: list[Any] = list(registry._instances.values())
    return any(isinstance(each, EventsWorker) and each._queue.unfinished_tasks for each in services)


@cache
def prefer_loaded_blocks() -> None:
    """Look for a block's class among the loaded ones before every installed integration is imported.

    Why: a flow run's context holds its result storage, a block. To read it, each Dask worker imported
    prefect-kubernetes, prefect-docker and others: 1,500 modules, two seconds, for a class of Prefect's own.
    Watch: `Block.get_block_class_from_key`, which calls `load_prefect_collections` first.
    Delete when: Prefect looks into its registry first.
    """
    original: Any = Block.get_block_class_from_key
    load_and_find = original.__func__

    def find(cls: type[Block], key: str) -> type[Block]:
        try:
            return lookup_type(cls, key)
        except KeyError:
            found: type[Block] = load_and_find(cls, key)
            return found

    Block.get_block_class_from_key = classmethod(find)  # type: ignore[assignment] # bound when it is looked up
