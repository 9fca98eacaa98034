"""The task runner: Prefect tasks on a Dask cluster, faster than the stock one, with states that tell the truth.

`TidepoolTaskRunner` has the constructor and the public behaviour of `prefect_dask.DaskTaskRunner`. What differs:

- The Prefect context and the task travel once per flow run and map, not once per task run (`worker`).
- Each task run is followed to a final state: a lost worker is another attempt, a lost cluster is Crashed (`tracker`).
- A flow run is not Completed before its task runs are final (`completion`).
- Arguments and results above a limit are refused with advice (`reference`).
- Closing cancels what is left, sends logs and events, closes the cluster, all within a time, and raises nothing.
"""

from __future__ import annotations

import contextvars
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future as ConcurrentFuture
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import uuid4

import cloudpickle
import dask.config
import distributed
from prefect.context import (
    AssetContext,
    FlowRunContext,
    SettingsContext,
    TagsContext,
    TaskRunContext,
    serialize_context,
)
from prefect.futures import PrefectFuture, PrefectFutureList, PrefectWrappedFuture
from prefect.tasks import MaterializingTask
from prefect.utilities.annotations import unmapped
from prefect.utilities.collections import isiterable, visit_collection
from prefect.utilities.engine import collect_task_run_inputs_sync
from prefect_dask.task_runners import DaskTaskRunner

from tidepool.compute.clusters.local import PatientCluster, local_cluster
from tidepool.compute.run_log import run_log
from tidepool.compute.runner.completion import before_completed
from tidepool.compute.runner.futures import Submission, TidepoolFuture
from tidepool.compute.runner.limits import pickle_argument, refuse_arguments
from tidepool.compute.runner.recorder import Recorder
from tidepool.compute.runner.tracker import Tracker
from tidepool.compute.runner.worker_loss import ReportingNanny
from tidepool.compute.worker import engine, entry
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import RunInput
    from prefect_dask.client import PrefectDaskClient

# A graph of about this size goes to the scheduler at a time: workers begin while the rest is made, memory stays flat.
_GRAPH_TASKS = 500
_GRAPH_BYTES = 4 * 1024 * 1024


class TidepoolTaskRunner(DaskTaskRunner):
    """Runs tasks on a Dask cluster that starts with the first submitted task.

    Args:
        *args: As `prefect_dask.DaskTaskRunner` takes them.
        start_early: Begin to create the cluster when the flow begins, not with its first submitted task.
        **kwargs: As `prefect_dask.DaskTaskRunner` takes them.
    """

    def __init__(self, *args: Any, start_early: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_early = start_early
        self._given_cluster = self._cluster
        self._starting: ConcurrentFuture[Any] | None = None
        self._lock = threading.RLock()
        self._map = threading.local()
        self._tracker: Tracker | None = None
        self._remove_check: Callable[[], None] | None = None
        self._places: dict[Any, tuple[list[str], Any]] = {}
        kind: Any = self.cluster_class
        is_local = not self.address and self._cluster is None and kind in {None, local_cluster}
        if is_local and self.cluster_kwargs.get("processes", True):
            self.cluster_kwargs.setdefault("worker_class", ReportingNanny)
        if is_local and kind is None:
            self.resolved_cluster_class = cast("Any", PatientCluster)

    def duplicate(self) -> Self:
        """A new runner with the same settings, as every flow run gets; the stock one forgets `cluster`."""
        copy: Self = super().duplicate()  # type: ignore[no-untyped-call] # Prefect leaves it unannotated
        copy._cluster = copy._given_cluster = self._given_cluster
        copy.start_early = self.start_early
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        # A flow is pickled with its runner for each flow run, its settings are all that is of use elsewhere.
        return _rebuilt, (
            type(self),
            {
                "address": self.address,
                "cluster_class": self.cluster_class,
                "cluster_kwargs": self.cluster_kwargs,
                "adapt_kwargs": self.adapt_kwargs,
                "client_kwargs": self.client_kwargs,
                "performance_report_path": self.performance_report_path,
                "start_early": self.start_early,
            },
        )

    # --- submission -------------------------------------------------------------------------------

    def submit(  # type: ignore[override] # the overloads for async tasks give the same future
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> TidepoolFuture[Any]:
        """Sends one task run to the cluster.

        Args:
            task: The task.
            parameters: Its arguments by name; futures of other tasks among them are its dependencies.
            wait_for: Futures that have to be completed before.
            dependencies: Task runs that each parameter comes from, beyond those found in `parameters`.

        Raises:
            ArgumentRefusedError: an argument is too large to travel.
            WorkerLostError: the cluster is gone.
        """
        if not self._started:
            raise RuntimeError("The task runner must be started before submitting work.")
        tracker = self._ready()
        mapping: _Map | None = getattr(self._map, "current", None)
        if mapping is None or mapping.task is not task:
            future = self._future(
                _Map(task, self._publish_call(task, {}), {}), parameters, wait_for, dependencies, tracker
            )
            tracker.submit([future])
        else:
            future = self._future(mapping, parameters, wait_for, dependencies, tracker)
            mapping.add(future, tracker)
        return future

    def map(  # type: ignore[override] # as with submit
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
    ) -> PrefectFutureList[TidepoolFuture[Any]]:
        """Sends a task run for each item of the iterable arguments, in few messages.

        Args:
            task: The task.
            parameters: Its arguments by name: iterables of equal length, or the same for all (`unmapped`, scalars).
            wait_for: Futures that have to be completed before.

        Raises:
            ArgumentRefusedError: an argument is too large to travel.
            MappingLengthMismatch: the iterables differ in length.
            MappingMissingIterable: none of the arguments is an iterable.
            WorkerLostError: the cluster is gone.
        """
        if not self._started:
            raise RuntimeError("The task runner must be started before submitting work.")
        # An iterator is consumed here: it may itself submit runs of the same task, which are none of this map.
        parameters = {name: list(value) if isinstance(value, Iterator) else value for name, value in parameters.items()}
        with self._as_one_map(task, parameters):
            return cast("PrefectFutureList[TidepoolFuture[Any]]", super().map(task, parameters, wait_for))

    @contextmanager
    def _as_one_map(self, task: Task[..., Any], parameters: dict[str, Any]) -> Iterator[None]:
        shared = {
            name: value.unwrap() if isinstance(value, unmapped) else value
            for name, value in parameters.items()
            if isinstance(value, unmapped) or not (isiterable(value) or isinstance(value, (PrefectFuture, tuple)))
        }
        pickled = {name: pickle_argument(value) for name, value in shared.items() if not _futures_in(value)}
        tracker = self._ready()
        refuse_arguments(task.name, {name: len(data) for name, data in pickled.items()}, _limit(task))
        mapping = _Map(task, self._publish_call(task, pickled), {name: shared[name] for name in pickled})
        self._map.current = mapping
        try:
            yield
        finally:
            self._map.current = None
            # Also when an item is refused: the futures of those before it are in nobody's hands, but theirs to finish.
            mapping.send(tracker)

    def _future(
        self,
        mapping: _Map,
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None,
        dependencies: dict[str, set[RunInput]] | None,
        tracker: Tracker,
    ) -> TidepoolFuture[Any]:
        task, task_run_id = mapping.task, uuid4()
        inputs = {
            name: collect_task_run_inputs_sync(value) | (dependencies or {}).get(name, set())
            for name, value in parameters.items()
        }
        if not any(inputs.values()):
            # As in most maps: one for all of them.
            inputs = mapping.no_inputs = mapping.no_inputs or inputs
        upstreams: list[TidepoolFuture[Any]] = []

        def placeholder(part: Any) -> Any:
            if isinstance(part, TidepoolFuture) and part.tracker is tracker:
                if part not in upstreams:
                    upstreams.append(part)
                return engine.Upstream(upstreams.index(part))
            if isinstance(part, PrefectWrappedFuture):
                # Of another runner of this process: it cannot travel, its final state can.
                part.wait()
                return part.state
            return part

        payload = pickle_argument(
            engine.Payload(
                task_run_id=task_run_id,
                parameters={
                    name: engine.Shared()
                    if name in mapping.shared and mapping.shared[name] is value
                    else visit_collection(value, visit_fn=placeholder, return_data=True)
                    for name, value in parameters.items()
                },
                wait_for=visit_collection(list(wait_for), visit_fn=placeholder, return_data=True) if wait_for else None,
                dependencies=inputs,
                assets=_assets(task, task_run_id, inputs),
            )
        )
        limit = _limit(task)
        if len(payload) > limit:
            sizes = {
                name: len(pickle_argument(visit_collection(value, visit_fn=placeholder, return_data=True)))
                for name, value in parameters.items()
            }
            refuse_arguments(task.name, sizes, limit)
        submission = Submission(
            task=task,
            call=mapping.call,
            context=self._publish_context(),
            payload=payload,
            dependencies=inputs,
            upstreams=upstreams,
        )
        return TidepoolFuture(task_run_id, submission, tracker)

    def _publish_call(self, task: Task[..., Any], shared: dict[str, bytes]) -> list[str]:
        # Pickled for each submit, as the stock runner does: what a task's function closes over may have changed.
        call = cloudpickle.dumps(engine.Call(task, shared, _limit(task)))
        return self._publish(hashlib.sha256(call).digest(), call, None)

    def _publish_context(self) -> list[str]:
        flow_run, task_run, active = FlowRunContext.get(), TaskRunContext.get(), SettingsContext.get()
        tags = frozenset(TagsContext.get().current_tags)
        key = (id(flow_run), id(task_run), id(active), tags)
        if key in self._places:
            return self._places[key][0]
        # The objects are kept, so that no other gets their id.
        return self._publish(key, cloudpickle.dumps(serialize_context()), (flow_run, task_run, active))

    def _publish(self, key: Any, data: bytes, keep: Any) -> list[str]:
        with self._lock:
            if key not in self._places:
                place = [f"tidepool-{self.client.id}", str(len(self._places))]
                self.client.set_metadata(place, data)
                self._places[key] = (place, keep)
            return self._places[key][0]

    # --- the cluster ------------------------------------------------------------------------------

    @property
    def client(self) -> PrefectDaskClient:
        """The Dask client; the first use creates the cluster."""
        with self._lock:
            if self._client is None:
                if self._starting is not None:
                    self._cluster = self._exit_stack.enter_context(self._starting.result())
                    self._starting = None
                with _own_scheduler:
                    return super().client
            return self._client

    def _ready(self) -> Tracker:
        with self._lock:
            if self._tracker is None:
                client, flow_run_context = self.client, FlowRunContext.get()
                log = run_log()
                context = contextvars.copy_context()
                self._tracker = Tracker(client, self._cluster, Recorder(context, log), log, paced=not _in_dask_worker())
                if flow_run_context and flow_run_context.flow_run and not flow_run_context.detached:
                    self._remove_check = before_completed(
                        flow_run_context.client, flow_run_context.flow_run.id, self._tracker.complete
                    )
            return self._tracker

    def _start_cluster(self) -> None:
        """Creates the cluster in a thread; `client` waits for it."""
        starting = self._starting = ConcurrentFuture()
        create: Any = self.resolved_cluster_class or self.cluster_class
        context = contextvars.copy_context()

        def start() -> None:
            try:
                with _own_scheduler:
                    starting.set_result(create(**self.cluster_kwargs))
            except BaseException as error:  # noqa: BLE001 - raised where the cluster is used
                starting.set_exception(error)

        threading.Thread(target=context.run, args=(start,), name="tidepool-start-cluster", daemon=True).start()

    # --- beginning and end ------------------------------------------------------------------------

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call] # Prefect leaves it unannotated
        # A task on a Dask worker enters a runner of its own, for tasks that it submits to the cluster it is on.
        if self.start_early and not self.address and self._cluster is None and not _in_dask_worker():
            self._start_cluster()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tracker, in_flow = self._tracker, self._remove_check is not None
        try:
            if tracker and not in_flow and error is None and not _in_dask_worker():
                tracker.complete()
        finally:
            if self._remove_check:
                self._remove_check()
            self._close(tracker)
            self._started = False

    def _close(self, tracker: Tracker | None) -> None:
        """Cancels, flushes and closes in this order, within the time of the settings; never raises."""
        if self._client is None and self._starting is None:
            return
        seconds = settings().compute.close_seconds
        closing = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._close_in_order, tracker, seconds),
            name="tidepool-close",
            daemon=True,
        )
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            run_log().error("The Dask cluster was not closed within %g s; going on without", seconds)

    def _close_in_order(self, tracker: Tracker | None, seconds: float) -> None:
        if self._starting is not None:
            self._attempt("stop the Dask cluster that was starting", self._give_up_starting, seconds)
        if tracker:
            self._attempt(
                "cancel what was not final", tracker.stop, "the flow run ended before this task run", seconds / 4
            )
            own = not (self.address or self._given_cluster or self.cluster_kwargs.get("shared") or _in_dask_worker())
            self._attempt("send the workers' logs and events", partial(tracker.flush, last=own), seconds / 4)
            self._attempt("record what a lost worker did not send", tracker.record_unsent, seconds / 8)
            self._attempt("forget the flow run", self._forget)
        self._attempt("close the Dask cluster", self._exit_stack.__exit__, None, None, None)

    def _attempt(self, what: str, step: Callable[..., Any], *args: Any) -> None:
        try:
            step(*args)
        except Exception:  # noqa: BLE001 - reported; see below
            # The flow's own state and error stand; what is left behind is for the reaper.
            run_log().exception("Could not %s", what)

    def _forget(self) -> None:
        if self.client.status == "running":
            self.client.run_on_scheduler(entry.forget, f"tidepool-{self.client.id}")

    def _give_up_starting(self, seconds: float) -> None:
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.result(timeout=seconds).close()


class _Map:
    """The task runs of one map, or of one submit.

    Args:
        task: The task.
        call: Where its pickled `engine.Call` is.
        shared: The arguments that are in it.
    """

    def __init__(self, task: Task[..., Any], call: list[str], shared: dict[str, Any]) -> None:
        self.task = task
        self.call = call
        self.shared = shared
        self.no_inputs: dict[str, set[RunInput]] = {}
        self._futures: list[TidepoolFuture[Any]] = []
        self._bytes = 0

    def add(self, future: TidepoolFuture[Any], tracker: Tracker) -> None:
        """Takes a future to be sent with the next graph."""
        self._futures.append(future)
        self._bytes += len(future.submission.payload) if future.submission else 0
        if len(self._futures) >= _GRAPH_TASKS or self._bytes >= _GRAPH_BYTES:
            self.send(tracker)

    def send(self, tracker: Tracker) -> None:
        """Sends what it has."""
        futures, self._futures, self._bytes = self._futures, [], 0
        if futures:
            tracker.submit(futures)


class _OwnScheduler:
    """Dask settings of clusters that this process creates, for as long as any thread creates one.

    They are the process's: of two threads, the first to leave must not take them from the other, nor the last one put
    back what it found, which were these.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before.enter_context(dask.config.set(_scheduler_settings()))
            self._inside += 1

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()


_own_scheduler = _OwnScheduler()


def _scheduler_settings() -> dict[str, object]:
    return {
        # Each lost worker is reported at once; the tracker decides what runs again, and counts.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.no-workers-timeout": f"{settings().compute.no_worker_seconds}s",
        # Dask samples the stack of each running task every 10 ms; Prefect's is deep: a tenth of a worker's CPU.
        "distributed.worker.profile.enabled": False,
        # Dask keeps the last 1,000 messages to each peer, with the tasks in them, for its developers to read.
        "distributed.admin.low-level-log-length": 100,
    }


def _limit(task: Task[..., Any]) -> int:
    """Bytes that an argument or a result of the task may have: a batch has the room of its items, within reason."""
    each = settings().compute.argument_limit_bytes
    return max(each, min(each * getattr(task, "items_per_run", 1), _GRAPH_BYTES))


def _rebuilt(kind: type[TidepoolTaskRunner], settings_of: dict[str, Any]) -> TidepoolTaskRunner:
    return kind(**settings_of)


def _assets(task: Task[..., Any], task_run_id: UUID, inputs: dict[str, set[RunInput]]) -> dict[str, Any] | None:
    flow_run_context = FlowRunContext.get()
    # Prefect notes the assets of every task run here, for those that depend on it.
    noted = flow_run_context.task_run_assets if flow_run_context else {}
    if not (noted or task.asset_deps or isinstance(task, MaterializingTask)):
        return None
    context = AssetContext.from_task_and_inputs(task, task_run_id, inputs, copy_to_child_ctx=True)
    if context.direct_asset_dependencies or context.downstream_assets or context.upstream_assets:
        return context.serialize()
    noted.pop(task_run_id, None)  # none: no need to keep that for each task run
    return None


def _futures_in(value: Any) -> bool:
    found = []

    def look(part: Any) -> None:
        if isinstance(part, PrefectFuture):
            found.append(part)

    visit_collection(value, visit_fn=look, return_data=False)
    return bool(found)


def _in_dask_worker() -> bool:
    try:
        distributed.get_worker()
    except ValueError:
        return False
    return True
