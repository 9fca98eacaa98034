"""One Prefect task run in a Dask worker, from the bytes that the driver sent to those that it gets back.

Hydrating Prefect's context (settings, flow, client with its TLS context) takes about 50 ms, a task run about 4 ms. So
the context of a flow run travels once and is hydrated once per worker thread. The parts that a task run may change are
fresh for each.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future as ConcurrentFuture
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import cloudpickle
from distributed import get_worker
from prefect.context import AssetContext, FlowRunContext, SyncClientContext, TagsContext, hydrated_context
from prefect.events.worker import EventsWorker
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine, TaskRunTimeoutError
from prefect.utilities.callables import call_with_parameters
from prefect.utilities.collections import visit_collection
from prefect.utilities.timeout import timeout

from tidepool.compute.limits import refuse_result
from tidepool.compute.progress import described
from tidepool.compute.run_log import log_for_people, mapped, print_plainly
from tidepool.compute.worker.entry import ask_scheduler
from tidepool.compute.worker.outcome import Outcome
from tidepool.errors import FOR_GOOD
from tidepool.upstream.distributed import WorkerSlot
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

# The place of the current task run among the threads of its Dask worker; None elsewhere.
slot: contextvars.ContextVar[WorkerSlot | None] = contextvars.ContextVar("slot", default=None)

_Variables: TypeAlias = dict[contextvars.ContextVar[Any], Any]

# How often a thread that waits for another one can be interrupted, and how long after a timeout it is not any more:
# Prefect's exception has been seen to arrive half a minute late.
_INTERRUPTED_SECONDS = 0.05
_LATE_SECONDS = 1.0

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
    place = WorkerSlot()
    slot.set(place)
    mapped.set(True)
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
    # A batch names its items itself.
    if not hasattr(call.task, "items_per_run"):
        engine.own = [name for name, value in payload.parameters.items() if not isinstance(value, Shared)]
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
        finally:
            place.close()
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


def _name_item(state: State[Any], parameters: dict[str, Any] | None, own: Sequence[str]) -> None:
    """Add the item to the message of a failure: on the run's page and in its log, nothing else names it."""
    item = {name: value for name, value in (parameters or {}).items() if name in own}
    if item and (state.is_failed() or state.is_crashed()) and "; item: " not in (state.message or ""):
        state.message = f"{state.message}; item: {described(item)}"


def _raise_after(deadline: float, seconds: float) -> None:
    if time.monotonic() > deadline:
        raise TaskRunTimeoutError(f"Scope timed out after {seconds} second(s).")


class _SyncEngine(SyncTaskRunEngine[Any, Any]):
    """Prefect's engine; it refuses results that are too large to travel, and does not wait beyond a timeout."""

    result_limit: int
    own: Sequence[str] = ()
    _late: threading.Event | None = None

    def call_task_fn(self, transaction: Transaction) -> Any:
        if self.task.timeout_seconds is None or transaction.is_committed():
            return super().call_task_fn(transaction)
        result = self._call_in_time(self.task.timeout_seconds)
        self.handle_success(result, transaction=transaction)
        return result

    def _call_in_time(self, seconds: float) -> Any:
        """Call the task's function in another thread: Prefect's timeout ends the wait for it, which can be interrupted.

        The function itself ends as soon as it runs Python code again. A retry waits for that. Under a debugger or a
        measurement of coverage on Python 3.11 it is not ended.
        """
        answer: ConcurrentFuture[Any] = ConcurrentFuture()
        deadline = time.monotonic() + seconds + _LATE_SECONDS

        # While an exception waits for a thread that is in a call, no thread of CPython 3.11 gets past the start of a
        # traced function: the process would stand still until the call returns.
        traced = sys.version_info < (3, 12) and sys.gettrace() is not None

        def call() -> None:
            try:
                with nullcontext() if traced else timeout(seconds, TaskRunTimeoutError):
                    answer.set_result(call_with_parameters(self.task.fn, self.parameters or {}))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                answer.set_exception(error)
            finally:
                over.set()

        # Not `Thread.join`: interrupted by an exception, Python 3.11 takes the thread for ended.
        while self._late and not self._late.wait(_INTERRUPTED_SECONDS):
            _raise_after(deadline, seconds)
        over = self._late = threading.Event()
        threading.Thread(
            target=contextvars.copy_context().run, args=(call,), name=threading.current_thread().name, daemon=True
        ).start()
        while not over.wait(_INTERRUPTED_SECONDS):
            _raise_after(deadline, seconds)
        return answer.result()

    def run(self, payload: Payload) -> None:
        with self.start(task_run_id=payload.task_run_id, dependencies=payload.dependencies):
            while self.is_running():
                self.wait_until_ready()
                with self.asset_context(), self.run_context(), self.transaction_context() as transaction:
                    self.call_task_fn(transaction)
                raise_if_flow_run_suspension_requested()

    def set_state(self, state: State[Any], force: bool = False) -> State[Any]:  # noqa: FBT001, FBT002 - Prefect's
        _name_item(state, self.parameters, self.own)
        return super().set_state(state, force)

    def handle_success(self, result: Any, transaction: Transaction) -> Any:
        refuse_result(self.task.name, result, self.result_limit)
        return super().handle_success(result, transaction=transaction)

    def can_retry(self, exc_or_state: Exception | State[Any]) -> bool:
        return not isinstance(exc_or_state, FOR_GOOD) and super().can_retry(exc_or_state)


class _AsyncEngine(AsyncTaskRunEngine[Any, Any]):
    """The same for tasks that are coroutines."""

    result_limit: int
    own: Sequence[str] = ()

    async def set_state(self, state: State[Any], force: bool = False) -> State[Any]:  # noqa: FBT001, FBT002 - Prefect's
        _name_item(state, self.parameters, self.own)
        return await super().set_state(state, force)

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
        return not isinstance(exc_or_state, FOR_GOOD) and await super().can_retry(exc_or_state)


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
        log_for_people()
        client = SyncClientContext().__enter__()
        now = contextvars.copy_context()
        return {each: value for each, value in now.items() if before.get(each, before) is not value}, client


@lru_cache(_KEPT)
def _call(path: tuple[str, ...]) -> Call:
    return cast("Call", cloudpickle.loads(_fetch(path)))


def _fetch(path: tuple[str, ...]) -> bytes:
    return cast("bytes", ask_scheduler("get_metadata", keys=list(path)))
