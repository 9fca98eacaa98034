"""One Prefect task run in a Dask worker, from the bytes that the driver sent to those that it gets back.

Hydrating Prefect's context (settings, flow, client with its TLS context) takes about 50 ms, a task run about 4 ms. So
the context of a flow run travels once and is hydrated once per worker thread. The parts that a task run may change are
fresh for each.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import OrderedDict
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import cloudpickle
from distributed import get_worker
from distributed.utils import sync
from prefect.context import AssetContext, FlowRunContext, SyncClientContext, TagsContext, hydrated_context
from prefect.events.worker import EventsWorker
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine
from prefect.utilities.collections import visit_collection

from tidepool.compute.limits import ResultRefusedError, refuse_result
from tidepool.compute.run_log import print_plainly
from tidepool.compute.worker.outcome import Outcome
from tidepool.upstream.prefect import (
    FlowRunSuspensionRequest,
    has_unsent_events,
    prefer_loaded_blocks,
    raise_if_flow_run_suspension_requested,
)
from tidepool.upstream.prefect_services import poll_queues, relate_once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import State
    from prefect.transactions import AsyncTransaction, Transaction

_Variables: TypeAlias = dict[contextvars.ContextVar[Any], Any]

# Contexts kept by each thread, and calls kept by the process: a shared cluster serves several flow runs at a time.
_KEPT = 8


@dataclass(frozen=True)
class Call:
    """The common part of the task runs of one `map`.

    Attributes:
        task: The Prefect task.
        shared: Parameters with the same value in each task run, by name; pickled, so that each gets its own copy.
        result_limit: Bytes that a result may have, pickled.
    """

    task: Task[..., Any]
    shared: dict[str, bytes]
    result_limit: int


@dataclass(frozen=True)
class Payload:
    """The individual part of one task run.

    Attributes:
        task_run_id: The task run.
        parameters: The call's arguments, with `Shared` and `Upstream` where a value comes from elsewhere.
        wait_for: Other dependencies, with `Upstream` for task runs.
        dependencies: The task runs that each parameter comes from.
        assets: Serialised asset context, or None when no asset is concerned.
    """

    task_run_id: UUID
    parameters: dict[str, Any]
    wait_for: Any
    dependencies: dict[str, set[Any]]
    assets: dict[str, Any] | None


@dataclass(frozen=True)
class Shared:
    """Placeholder of a parameter that is in the `Call`."""


@dataclass(frozen=True)
class Upstream:
    """Placeholder of another task run's final state: the one at `index` of those that were sent along."""

    index: int


def run(call: list[str], context: list[str], payload: bytes, upstreams: Sequence[Outcome]) -> Outcome:
    """Run one task; `entry.run` calls it.

    Args:
        call: Metadata path of the pickled `Call` on the scheduler.
        context: Metadata path of the pickled Prefect context.
        payload: A pickled `Payload`.
        upstreams: The final states that the payload refers to.
    """
    variables, _ = _context(tuple(context))
    task_run = contextvars.copy_context()
    return task_run.run(_run, variables, _call(tuple(call)), cloudpickle.loads(payload), upstreams)


async def flush(seconds: float, *, last: bool) -> None:
    """Send the remaining events and logs of this process; `Client.run` calls it.

    Args:
        seconds: How long that may take.
        last: This process is not used afterwards: its services end. An event that another flow run sends in that moment
            would be lost.
    """
    if last:
        # All of Prefect's services: those of logs too.
        await EventsWorker.drain_all(timeout=seconds)  # type: ignore[misc] # awaitable where a loop runs
        return
    # Batches of log lines leave by themselves, every two seconds.
    deadline = time.monotonic() + seconds
    while has_unsent_events() and time.monotonic() < deadline:  # noqa: ASYNC110 - other threads count
        await asyncio.sleep(0.05)


# --- one task run ---------------------------------------------------------------------------------


def _run(
    variables: _Variables,
    call: Call,
    payload: Payload,
    upstreams: Sequence[Outcome],
) -> Outcome:
    for variable, value in variables.items():
        variable.set(value)
    parameters = {
        name: cloudpickle.loads(call.shared[name]) if isinstance(value, Shared) else value
        for name, value in payload.parameters.items()
    }
    wait_for = payload.wait_for
    if upstreams:
        states = [upstream.state() for upstream in upstreams]

        def state_of(part: Any) -> Any:
            return states[part.index] if isinstance(part, Upstream) else part

        parameters, wait_for = visit_collection((parameters, wait_for), visit_fn=state_of, return_data=True)
    engine_class = _AsyncEngine if call.task.isasync else _SyncEngine
    engine = engine_class(task=call.task, parameters=parameters, wait_for=wait_for, context={})
    engine.result_limit = call.result_limit
    with ExitStack() as stack:
        _enter_own_context(stack, payload)
        try:
            if isinstance(engine, _AsyncEngine):
                asyncio.run(engine.run(payload))
            else:
                engine.run(payload)
        except BaseException:
            # The engine records a crash (sys.exit() in a task) and raises; its final state has the reason.
            if not (engine.task_run and engine.state.is_final()):
                raise
    task_run = engine.task_run
    assert task_run is not None  # noqa: S101 - without one, the engine has raised
    return Outcome.of(_readable(engine.state), task_run, get_worker().address)


def _enter_own_context(stack: ExitStack, payload: Payload) -> None:
    flow_run_context = FlowRunContext.get()
    if flow_run_context is not None:
        # Results are linked to their task run by their id() in memory: only right within one task run.
        update: dict[str, Any] = {
            "run_results": {},
            "task_run_assets": {},
            "task_run_dynamic_keys": {},
            "observed_flow_pauses": {},
            "flow_run_suspension_request": FlowRunSuspensionRequest(),
        }
        if flow_run_context.flow is not None:
            update["task_runner"] = stack.enter_context(flow_run_context.flow.task_runner.duplicate())
        stack.enter_context(flow_run_context.model_copy(update=update))
    if payload.assets is not None:
        stack.enter_context(AssetContext(**payload.assets))


def _readable(state: State[Any]) -> State[Any]:
    if not state.is_completed():
        # An exception that cannot be pickled, or not read again, must not hide the state that carries it.
        try:
            cloudpickle.loads(cloudpickle.dumps(state))
        except Exception as unreadable:  # noqa: BLE001 - an exception's own __reduce__ or __init__ may raise anything
            # Not `model_copy`: Prefect's gives a state another id and no time.
            state = copy(state)
            state.data = RuntimeError(f"{state.message} (unpicklable: {unreadable})")
    return state


class _SyncEngine(SyncTaskRunEngine[Any, Any]):
    """Prefect's engine; it refuses results that are too large to travel."""

    result_limit: int

    def run(self, payload: Payload) -> None:
        with self.start(task_run_id=payload.task_run_id, dependencies=payload.dependencies):
            while self.is_running():
                self.wait_until_ready()
                with self.asset_context(), self.run_context(), self.transaction_context() as transaction:
                    self.call_task_fn(transaction)
                raise_if_flow_run_suspension_requested()

    def handle_success(self, result: Any, transaction: Transaction) -> Any:
        refuse_result(self.task.name, result, self.result_limit)
        return super().handle_success(result, transaction=transaction)

    def can_retry(self, exc_or_state: Exception | State[Any]) -> bool:
        return not isinstance(exc_or_state, ResultRefusedError) and super().can_retry(exc_or_state)


class _AsyncEngine(AsyncTaskRunEngine[Any, Any]):
    """The same for tasks that are coroutines."""

    result_limit: int

    async def run(self, payload: Payload) -> None:
        async with self.start(task_run_id=payload.task_run_id, dependencies=payload.dependencies):
            while self.is_running():
                await self.wait_until_ready()
                async with self.asset_context(), self.run_context(), self.transaction_context() as transaction:
                    await self.call_task_fn(transaction)
                raise_if_flow_run_suspension_requested()

    async def handle_success(self, result: Any, transaction: AsyncTransaction) -> Any:
        refuse_result(self.task.name, result, self.result_limit)
        return await super().handle_success(result, transaction=transaction)

    async def can_retry(self, exc_or_state: Exception | State[Any]) -> bool:
        return not isinstance(exc_or_state, ResultRefusedError) and await super().can_retry(exc_or_state)


# --- contexts and calls, fetched once --------------------------------------------------------------


class _Thread(threading.local):
    """Hydrated contexts of this thread by path, oldest first: a Prefect client must not be shared by threads."""

    def __init__(self) -> None:
        self.contexts: OrderedDict[tuple[str, ...], tuple[_Variables, Callable[[], object]]] = OrderedDict()


_thread = _Thread()


def _context(path: tuple[str, ...]) -> tuple[_Variables, Callable[[], object]]:
    """Return the variables of a Prefect context, and a function that closes its client."""
    kept = _thread.contexts
    if path not in kept:
        # Its client is entered in a context of its own, and has to be left there.
        home = contextvars.copy_context()
        variables, client = home.run(_hydrate, _fetch(path))
        kept[path] = (variables, partial(home.run, client.__exit__, None, None, None))
        if len(kept) > _KEPT:
            _, (_, close) = kept.popitem(last=False)
            close()
    kept.move_to_end(path)
    return kept[path]


def _hydrate(pickled: bytes) -> tuple[_Variables, SyncClientContext]:
    prefer_loaded_blocks()
    poll_queues()
    relate_once()
    # Dask's own variables, such as the current worker: without it the flow's task runner would take this for a driver.
    before = contextvars.copy_context()
    # In a cluster of threads, a task run is not tagged with what tagged the cluster's start.
    TagsContext(current_tags=set()).__enter__()
    with hydrated_context(cloudpickle.loads(pickled)):
        print_plainly()
        client = SyncClientContext().__enter__()
        now = contextvars.copy_context()
        return {each: value for each, value in now.items() if before.get(each, before) is not value}, client


@lru_cache(_KEPT)
def _call(path: tuple[str, ...]) -> Call:
    return cast("Call", cloudpickle.loads(_fetch(path)))


def _fetch(path: tuple[str, ...]) -> bytes:
    worker = get_worker()
    return cast("bytes", sync(worker.loop, worker.scheduler.get_metadata, keys=list(path)))
