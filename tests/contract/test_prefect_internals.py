"""What the task runner takes for granted in Prefect, prefect-dask and distributed beyond their public interfaces.

Checked on prefect 3.9.1, prefect-dask 0.3.7 and distributed 2026.8.0. Each test names what relies on it. When one fails
after an upgrade: read the named place in the new release, adapt the module that relies on it, run the behaviour suite
(tests/integration/test_runner_behaviours.py) and the truth tests (test_runner_truth.py), and raise the range below.
"""

from __future__ import annotations

import ast
import inspect
import queue
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import distributed
import prefect.context
import prefect.events.worker
import prefect.flow_engine
import prefect.futures
import prefect.task_engine
import prefect.task_runners
import prefect_dask.task_runners
import pytest
from distributed.batched import BatchedSend
from distributed.client import FutureState
from distributed.nanny import Nanny, WorkerProcess
from distributed.scheduler import KilledWorker, Scheduler
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from prefect._internal.concurrency import services
from prefect._internal.concurrency.api import create_call
from prefect._internal.concurrency.services import BatchedQueueService, QueueService
from prefect._internal.result_records import ResultRecord
from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.context import ContextModel, FlowRunContext, SyncClientContext, serialize_context
from prefect.events.related import related_resources_from_run_context
from prefect.events.worker import EventsWorker
from prefect.filesystems import LocalFileSystem
from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
from prefect.results import ResultStore
from prefect.states import Completed

from tidepool.compute.runner.tracker import _Told

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKED = {"prefect": ">=3.9.1,<3.9", "prefect-dask": ">=0.3.7,<0.4", "distributed": ">=2026.8,<2026.9"}


@pytest.mark.parametrize("package", CHECKED)
def test_the_release_is_one_that_was_checked(package: str) -> None:
    assert Version(version(package)) in SpecifierSet(CHECKED[package]), (
        f"{package} {version(package)} has not been checked: see the head of this file"
    )


def calls(function: Callable[..., Any]) -> list[str]:
    """Names that a function calls, in the order of its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset))
    return [ast.unparse(node.func) for node in nodes]


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- completion: Completed is proposed by the flow's client before the task runner ends -------------


@pytest.mark.parametrize(
    ("engine", "propose"),
    [
        (prefect.flow_engine.FlowRunEngine, "propose_state_sync"),
        (prefect.flow_engine.AsyncFlowRunEngine, "propose_state"),
    ],
)
def test_a_flow_engine_proposes_states_through_its_client(engine: type, propose: str) -> None:
    assert propose in calls(engine.set_state)
    assert "self.set_state" in calls(engine.handle_success)
    source = inspect.getsource(engine.setup_run_context)
    assert "enter_context(self.flow.task_runner.duplicate())" in source
    assert "client=client" in source


def test_an_error_while_proposing_completed_is_the_flows_error() -> None:
    source = inspect.getsource(prefect.flow_engine.FlowRunEngine.run_context)
    assert (
        source.index("yield self")
        < source.index("except Exception as exc")
        < source.index("self.handle_exception(exc)")
    )
    body = calls(prefect.flow_engine.FlowRunEngine.call_flow_fn)
    assert "self.handle_success" in body


@pytest.mark.parametrize("client", [SyncPrefectClient, PrefectClient])
def test_set_flow_run_state_takes_what_the_check_passes_on(client: type) -> None:
    assert parameters(client.set_flow_run_state) == ["self", "flow_run_id", "state", "force"]
    assert not hasattr(client, "__slots__")


# --- worker: one engine run inside a context that is hydrated once ----------------------------------


def test_the_loop_of_a_task_run_is_the_one_that_worker_repeats() -> None:
    expected = """with engine.start(task_run_id=task_run_id, dependencies=dependencies):
        while engine.is_running():
            engine.wait_until_ready()
            with (
                engine.asset_context(),
                engine.run_context(),
                engine.transaction_context() as txn,
            ):
                engine.call_task_fn(txn)
            raise_if_flow_run_suspension_requested()

    return engine.state if return_type == "state" else engine.result()"""
    assert expected in inspect.getsource(prefect.task_engine.run_task_sync)
    awaited = inspect.getsource(prefect.task_engine.run_task_async)
    for step in ("async with engine.start(", "await engine.wait_until_ready()", "await engine.call_task_fn(txn)"):
        assert step in awaited


@pytest.mark.parametrize("engine", [prefect.task_engine.SyncTaskRunEngine, prefect.task_engine.AsyncTaskRunEngine])
def test_a_task_engine_has_what_ours_overrides(engine: type) -> None:
    assert parameters(engine.handle_success) == ["self", "result", "transaction"]
    assert parameters(engine.can_retry) == ["self", "exc_or_state"]
    assert any(name.endswith("self.handle_success") for name in calls(engine.call_task_fn))
    assert any(name.endswith("self.can_retry") for name in calls(engine.handle_retry))


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
    # A new mutable field must be made fresh for each task run too (worker._enter_own_context).
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


def test_contexts_are_context_variables_that_a_copy_can_enter_again() -> None:
    assert "new._token = None" in inspect.getsource(ContextModel.model_copy)
    assert calls(ContextModel.__enter__)[-1] == "self.__var__.set"
    assert "SyncClientContext.get_or_create" in calls(prefect.task_engine.SyncTaskRunEngine.initialize_run)
    assert "ctx = cls.get()" in inspect.getsource(SyncClientContext.get_or_create)


@pytest.mark.parametrize("service", [EventsWorker, APILogWorker])
def test_what_is_queued_can_be_drained_within_a_time(service: Any) -> None:
    """`worker.flush` drains those of its own processes, and watches the queues of others'."""
    assert parameters(service._drain) == ["self", "at_exit"]
    assert service._instances is EventsWorker._instances
    assert "self._queue.task_done()" in inspect.getsource(QueueService._main_loop)


# --- futures and runner -----------------------------------------------------------------------------


def test_prefect_reads_of_a_future_only_whether_it_has_a_final_state() -> None:
    for function in (prefect.futures.wait, prefect.futures.as_completed):
        assert "if f._final_state}" in inspect.getsource(function)
    resolve = inspect.getsource(prefect.futures.resolve_futures_to_states)
    assert "future.wait()" in resolve
    assert "return future.state" in resolve


def test_the_stock_map_submits_each_item_through_submit() -> None:
    assert "self.submit" in calls(prefect.task_runners.TaskRunner.map)
    assert "super().map(task, parameters, wait_for)" in inspect.getsource(prefect_dask.task_runners.DaskTaskRunner.map)


def test_the_stock_runner_has_the_constructor_and_the_parts_that_ours_uses() -> None:
    stock = prefect_dask.task_runners.DaskTaskRunner
    assert parameters(stock.__init__) == [
        "self",
        "cluster",
        "address",
        "cluster_class",
        "cluster_kwargs",
        "adapt_kwargs",
        "client_kwargs",
        "performance_report_path",
    ]
    runner = stock()
    for name in ("_client", "_cluster", "_exit_stack", "_started", "resolved_cluster_class"):
        assert hasattr(runner, name), name


def test_a_task_run_is_announced_from_what_the_recorder_gives() -> None:
    assert {"task", "id", "flow_run_context"} <= set(parameters(prefect.task_engine._create_task_run_locally))
    emit = prefect.utilities.engine.emit_task_run_state_change_event
    assert parameters(emit) == ["task_run", "initial_state", "validated_state", "follows"]


def test_a_service_asks_a_thread_for_its_next_item() -> None:
    """`background` stands in for that thread."""
    for kind in (QueueService, BatchedQueueService):
        asked = calls(kind._main_loop)
        assert {"self._queue_get_thread.submit", "create_call"} <= set(asked), asked
    assert create_call(queue.Queue().get, timeout=3).kwargs == {"timeout": 3}
    for kind in (QueueService, BatchedQueueService):
        assert "create_call(self._queue.get" in inspect.getsource(kind._main_loop)
        assert ").aresult()" in inspect.getsource(kind._main_loop)
    for kind in (EventsWorker, APILogWorker):
        assert issubclass(kind, QueueService)
        assert isinstance(kind._instances, dict)
    uses = re.findall(r"_queue_get_thread\.\w+", inspect.getsource(services))
    assert set(uses) == {"_queue_get_thread.start", "_queue_get_thread.submit", "_queue_get_thread.shutdown"}


def test_an_event_is_told_what_it_relates_to_by_a_name_of_its_module() -> None:
    """`background` puts another function in its place."""
    attach = EventsWorker.attach_related_resources_from_context
    assert "related_resources_from_run_context" in calls(attach)
    assert "event.related += related" in inspect.getsource(attach)
    assert prefect.events.worker.__dict__["related_resources_from_run_context"]
    assert parameters(related_resources_from_run_context) == ["client", "exclude"]


def test_local_result_storage_resolves_paths_in_a_method_of_its_own() -> None:
    """`background` puts another function in its place."""
    for method in (LocalFileSystem.read_path, LocalFileSystem.write_path, LocalFileSystem.aread_path):
        assert "self._resolve_path" in inspect.getsource(getattr(method, "sync", method))
    assert "_resolve_path(key)" in inspect.getsource(ResultStore.create_result_record)


def test_the_result_of_a_completed_state_is_in_its_record() -> None:
    """`futures` takes it from there."""
    state = Completed()
    state.data = ResultStore(result_storage=LocalFileSystem()).create_result_record({"a": 1})
    assert isinstance(state.data, ResultRecord)
    assert state.result(_sync=True) is state.data.result


def test_the_console_handler_prints_a_line() -> None:
    assert "self.console.print(message, soft_wrap=True)" in inspect.getsource(PrefectConsoleHandler.emit)


def test_the_id_of_a_state_is_that_of_its_event() -> None:
    """`task_runs` sends a state again that the server may have: it must take it once."""
    assert "id=validated_state.id" in inspect.getsource(prefect.utilities.engine.emit_task_run_state_change_event)


def test_a_task_run_has_assets_by_its_task_and_its_inputs_alone() -> None:
    """`runner._assets` asks Prefect only where one of them may have some."""
    source = inspect.getsource(prefect.context.AssetContext.from_task_and_inputs)
    asked = set(re.findall(r"(?:flow_ctx|task)\.\w+", source))
    assert asked == {"flow_ctx.task_run_assets", "task.asset_deps", "task.assets", "task.materialized_by"}
    assert source.count("isinstance(task, MaterializingTask)") == 2, "of others, no `assets` and no `materialized_by`"


# --- distributed ------------------------------------------------------------------------------------


def test_dask_says_which_task_was_lost_with_which_worker_and_how_often() -> None:
    error = KilledWorker("key", None, 3)  # type: ignore[arg-type]
    assert (error.task, error.last_worker, error.allowed_failures) == ("key", None, 3)
    assert "ts.suspicious > self.allowed_failures" in inspect.getsource(Scheduler.remove_worker)


def test_the_log_of_messages_to_a_peer_is_made_with_the_connection() -> None:
    """`runner._own_scheduler` shortens it for the workers that a cluster starts with."""
    assert "distributed.admin.low-level-log-length" in inspect.getsource(BatchedSend.__init__)


def test_futures_are_cancelled_with_this_reason_when_the_scheduler_is_gone() -> None:
    assert 'reason="scheduler-connection-lost"' in inspect.getsource(distributed.Client._reconnect)


@pytest.mark.parametrize(
    "done",
    [
        FutureState.finish,
        FutureState.cancel,
        lambda state: state.set_error(ValueError("bad"), None),
    ],
)
def test_a_dask_future_sets_its_event_each_time_it_is_done(done: Callable[[FutureState], None]) -> None:
    """`Tracker._watch` puts its own in the place of that event."""
    told: list[Any] = []
    state = FutureState("key")
    assert state._event is None
    future: Any = "future"
    state._event = _Told(told.append, future)
    state.lose()
    assert (state.done(), told) == (False, [])
    done(state)
    assert (state.done(), told) == (True, ["future"])
    state.retry()
    done(state)
    assert told == ["future", "future"]


def test_a_nanny_is_told_the_exit_code_of_its_worker() -> None:
    assert parameters(Nanny._on_worker_exit_sync) == ["self", "exitcode"]
    assert "self.on_exit(r)" in inspect.getsource(WorkerProcess.mark_stopped)
    assert '"worker-restart-memory"' in inspect.getsource(distributed.worker_memory.NannyMemoryManager)


def test_a_cluster_gives_up_a_lost_worker_after_a_setting() -> None:
    """Read while it is called: `local.PatientCluster` sets it around that."""
    source = inspect.getsource(distributed.SpecCluster._update_worker_status)
    assert "distributed.deploy.lost-worker-timeout" in source
    assert "dask.config.get(" in source.split("def f():")[1].split("call_later")[0]


def test_the_scheduler_says_which_worker_is_lost() -> None:
    source = inspect.getsource(Scheduler.remove_worker)
    assert '"action": "remove-worker"' in source
    assert '"expected": expected' in source
    assert 'self.log_event("all", event_msg)' in source


def test_the_scheduler_keeps_metadata_by_path() -> None:
    assert parameters(Scheduler.set_metadata) == ["self", "keys", "value"]
    assert "self.task_metadata" in inspect.getsource(Scheduler.get_metadata)


def test_prefects_own_blocks_are_found_without_loading_every_integration() -> None:
    """A flow run's context holds a block; each Dask worker imported 1,500 modules to read it."""
    script = """
import sys
from prefect.blocks.core import Block, UnknownBlockType
from prefect.filesystems import LocalFileSystem
from tidepool.compute.worker.blocks import known_blocks_first
known_blocks_first()
assert Block.get_block_class_from_key("local-file-system") is LocalFileSystem
assert "prefect_kubernetes" not in sys.modules
try:
    Block.get_block_class_from_key("no-such-block")
except UnknownBlockType:
    assert "prefect_kubernetes" in sys.modules, "others are not looked for"
else:
    raise AssertionError("found")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
