"""Behaviour of Prefect that the task runner relies on: what `tidepool.upstream.prefect` wraps, and engine details."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import cloudpickle
import pytest
from prefect import flow, task
from prefect.context import FlowRunContext, TagsContext, hydrated_context, serialize_context
from prefect.events import Event, Resource
from prefect.events.clients import EventsClient
from prefect.events.worker import EventsWorker
from prefect.exceptions import Pause
from prefect.filesystems import LocalFileSystem
from prefect.futures import as_completed, wait
from prefect.results import ResultStore
from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings
from prefect.states import Completed, Pending, Suspended
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.engine import emit_task_run_state_change_event

from tests.contract.releases import assert_checked
from tests.polling import until
from tidepool.upstream import prefect as upstream
from tidepool.upstream.prefect_dask import DaskFuture, DaskRunner

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    ignored = {PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}
    with prefect_test_harness(server_startup_timeout=120), temporary_settings(ignored):
        yield


def test_the_releases_were_checked() -> None:
    assert_checked("prefect", ">=3.9.1,<3.10")
    assert_checked("prefect-dask", ">=0.3.7,<0.4")


# --- check_before_success -------------------------------------------------------------------------

refused: set[UUID] = set()


def _refuse() -> None:
    if _this_run() in refused:
        refused.discard(_this_run())
        raise ValueError("not yet")


def _refuse_this_run() -> None:
    refused.add(_this_run())


def _this_run() -> UUID:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return context.flow_run.id


@pytest.mark.usefixtures("server")
def test_an_error_of_the_check_fails_the_flow_run_with_its_hooks() -> None:
    upstream.check_before_success(_refuse)
    called: list[str] = []

    @flow(on_failure=[lambda *_: called.append("failure")], on_completion=[lambda *_: called.append("completion")])
    def body() -> str:
        _refuse_this_run()
        return "done"

    state = body(return_state=True)
    assert (state.is_failed(), called) == (True, ["failure"])
    with pytest.raises(ValueError, match="not yet"):
        body()


@pytest.mark.usefixtures("server")
def test_a_flow_that_fails_its_check_is_retried() -> None:
    upstream.check_before_success(_refuse)
    attempts: list[int] = []

    @flow(retries=1)
    def body() -> int:
        attempts.append(1)
        if len(attempts) == 1:
            _refuse_this_run()
        return len(attempts)

    assert body() == 2


@pytest.mark.usefixtures("server")
def test_the_check_of_an_async_flow_runs_beside_its_event_loop() -> None:
    upstream.check_before_success(_refuse)

    @flow
    async def body() -> str:
        _refuse_this_run()
        return "done"

    state: Any = asyncio.run(body(return_state=True))  # type: ignore[call-overload]
    assert state.is_failed()
    assert state.message == "Flow run encountered an exception: ValueError: not yet"


# --- suspension, task runs, events ----------------------------------------------------------------


def test_a_requested_suspension_is_raised() -> None:
    request = upstream.FlowRunSuspensionRequest()
    with FlowRunContext.model_construct(flow_run_suspension_request=request):
        upstream.raise_if_flow_run_suspension_requested()
        request.mark_requested(Suspended())
        with pytest.raises(Pause):
            upstream.raise_if_flow_run_suspension_requested()


def test_a_new_task_run_is_pending_and_named_after_its_task() -> None:
    @task(retries=2)
    def item() -> None:
        """Never runs."""

    task_run_id = uuid4()
    run = upstream.new_task_run(item, task_run_id, None)
    assert (run.id, run.name, run.empirical_policy.retries) == (task_run_id, "item", 2)
    assert run.state is not None
    assert run.state.is_pending()


def _event() -> Event:
    return Event(event="tidepool.test", resource=Resource({"prefect.resource.id": "tidepool.test"}))


class _Held(EventsClient):
    """An events client that sends when it is released."""

    released = threading.Event()
    sent: list[str] = []  # noqa: RUF012 - the service makes the instance

    async def _emit(self, event: Event) -> None:
        await asyncio.to_thread(self.released.wait, 30)
        self.sent.append(event.event)


@pytest.mark.usefixtures("server")
def test_events_are_unsent_until_the_client_has_sent_them() -> None:
    service = EventsWorker.instance(_Held)
    service.send(_event())
    assert upstream.has_unsent_events()
    _Held.released.set()
    until(lambda: not upstream.has_unsent_events())
    assert _Held.sent == ["tidepool.test"]


def test_draining_events_drains_the_services_of_logs_too() -> None:
    """`engine.flush` ends all services of a worker process by the public method of one."""
    script = """
import asyncio
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

async def drain():
    await EventsWorker.drain_all(timeout=10)

events, logs = EventsWorker.instance(NullEventsClient), APILogWorker.instance()
asyncio.run(drain())
for service in (events, logs):
    try:
        service.send({})
    except RuntimeError as error:
        assert "stopped" in str(error)
    else:
        raise AssertionError(service)
"""
    # No server is started, and none is asked.
    variables = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:1/api"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=variables)


def test_the_id_of_a_state_is_that_of_its_event() -> None:
    """The driver sends a state again that the server may have: the server must take it once."""
    run, state = upstream.new_task_run(task(lambda: None, name="item"), uuid4(), None), Completed()
    event: Any = emit_task_run_state_change_event(task_run=run, initial_state=Pending(), validated_state=state)
    assert event.id == state.id


# --- prefer_loaded_blocks -------------------------------------------------------------------------


def test_prefects_own_blocks_are_found_without_every_integration() -> None:
    """A flow run's context holds a block; each Dask worker imported 1,500 modules to read it."""
    script = """
import sys
from prefect.blocks.core import Block, UnknownBlockType
from prefect.filesystems import LocalFileSystem
from tidepool.upstream.prefect import prefer_loaded_blocks
prefer_loaded_blocks()
assert Block.get_block_class_from_key("local-file-system") is LocalFileSystem
assert "prefect_kubernetes" not in sys.modules
try:
    Block.get_block_class_from_key("no-such-block")
except UnknownBlockType:
    assert "prefect_kubernetes" in sys.modules, "others are not looked for"
else:
    raise AssertionError("found")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- the task engine, which `worker.engine` extends -----------------------------------------------


class _Sync(SyncTaskRunEngine[Any, Any]):
    def handle_success(self, result: Any, transaction: Any) -> Any:
        asked.append(f"success {result}")
        return super().handle_success(result, transaction=transaction)

    def can_retry(self, exc_or_state: Any) -> bool:
        asked.append("retry")
        return super().can_retry(exc_or_state)


class _Async(AsyncTaskRunEngine[Any, Any]):
    async def handle_success(self, result: Any, transaction: Any) -> Any:
        asked.append(f"success {result}")
        return await super().handle_success(result, transaction=transaction)

    async def can_retry(self, exc_or_state: Any) -> bool:
        asked.append("retry")
        return await super().can_retry(exc_or_state)


asked: list[str] = []
failures: list[Exception] = []


def _fail_once() -> int:
    if failures:
        raise failures.pop()
    return 5


async def _fail_once_async() -> int:
    return _fail_once()


@pytest.fixture
def one_failure() -> None:
    asked.clear()
    failures.append(ValueError("once"))


@pytest.mark.usefixtures("server", "one_failure")
def test_an_engine_asks_its_own_methods_about_success_and_retries() -> None:
    engine: Any = _Sync(task=task(_fail_once, retries=1))
    with engine.start(task_run_id=uuid4(), dependencies={}):
        while engine.is_running():
            engine.wait_until_ready()
            with engine.asset_context(), engine.run_context(), engine.transaction_context() as transaction:
                engine.call_task_fn(transaction)
    assert engine.state.is_completed()
    assert asked == ["retry", "success 5"]


@pytest.mark.usefixtures("server", "one_failure")
def test_an_async_engine_asks_its_own_methods_too() -> None:
    engine: Any = _Async(task=task(_fail_once_async, retries=1))

    async def run() -> None:
        async with engine.start(task_run_id=uuid4(), dependencies={}):
            while engine.is_running():
                await engine.wait_until_ready()
                async with engine.asset_context(), engine.run_context(), engine.transaction_context() as transaction:
                    await engine.call_task_fn(transaction)

    asyncio.run(run())
    assert engine.state.is_completed()
    assert asked == ["retry", "success 5"]


def test_serialized_context_has_the_known_parts() -> None:
    assert set(serialize_context()) == {
        "flow_run_context",
        "task_run_context",
        "tags_context",
        "settings_context",
        "asset_context",
        "deployment_id",
        "deployment_parameters",
    }


def test_a_flow_run_context_has_the_parts_that_are_fresh_for_each_task_run() -> None:
    # A new mutable field must be made fresh for each task run too (worker.engine._enter_own_context).
    assert set(FlowRunContext.model_fields) == {
        "start_time",
        "input_keyset",
        "client",
        "flow",
        "flow_run",
        "task_runner",
        "log_prints",
        "parameters",
        "detached",
        "result_store",
        "persist_result",
        "task_run_dynamic_keys",
        "observed_flow_pauses",
        "flow_run_suspension_request",
        "run_results",
        "task_run_assets",
        "events",
    }


def test_a_hydrated_context_can_be_copied_and_entered_again() -> None:
    """A worker hydrates a context once per thread, and enters a copy for each task run."""
    with TagsContext(current_tags={"a"}):
        pickled = cloudpickle.dumps(serialize_context())
    with hydrated_context(cloudpickle.loads(pickled)):
        tags = TagsContext.get()
        for _ in range(2):
            with tags.model_copy(update={"current_tags": {"b"}}):
                assert TagsContext.get().current_tags == {"b"}
            assert TagsContext.get().current_tags == {"a"}


def test_the_result_of_a_completed_state_is_in_its_record() -> None:
    """`TidepoolFuture.result` takes it from there."""
    state: Any = Completed()
    state.data = ResultStore(result_storage=LocalFileSystem()).create_result_record({"a": 1})
    assert state.result(_sync=True) is state.data.result


# --- prefect-dask ---------------------------------------------------------------------------------


class _Future(DaskFuture[Any]):
    def __init__(self, task_run_id: UUID) -> None:
        super().__init__(task_run_id, None)
        self.callbacks: list[Any] = []

    def wait(self, timeout: float | None = None) -> None:
        del timeout
        self.outcome = "settled"

    def add_done_callback(self, fn: Any) -> None:
        self.callbacks.append(fn)


def test_a_future_is_done_for_prefect_when_its_outcome_is_set() -> None:
    done, not_done = _Future(uuid4()), _Future(uuid4())
    done.outcome = "settled"
    found = wait([done, not_done], timeout=0.1)
    assert (found.done, found.not_done) == ({done}, {not_done})
    assert list(as_completed([done])) == [done]
    assert wait([done, not_done]).not_done == set()
    assert not_done.outcome == "settled"


def test_the_stock_runner_has_the_parts_that_ours_extends() -> None:
    runner: Any = DaskRunner(cluster_kwargs={"n_workers": 1, "processes": False, "dashboard_address": ":0"})
    assert (runner.connected, runner.cluster, runner.started) == (None, None, False)
    with runner:
        assert runner.started
        client = runner.client
        assert runner.connected is client
        assert runner.cluster.scheduler_address == client.scheduler.address
        with suppress(ValueError):
            runner.exit_stack.close()
        assert client.status == "closed"
    assert not runner.started


def test_the_stock_map_submits_each_item_through_submit() -> None:
    submitted: list[Any] = []

    class Runner(DaskRunner):
        def submit(self, task: Any, parameters: Any, wait_for: Any = None, dependencies: Any = None) -> Any:
            del task, wait_for, dependencies
            submitted.append(parameters)
            return _Future(uuid4())

    with Runner() as runner:  # type: ignore[no-untyped-call]
        runner.map(task(lambda item, plus: item + plus, name="add"), {"item": [1, 2], "plus": 3})
    assert submitted == [{"item": 1, "plus": 3}, {"item": 2, "plus": 3}]
