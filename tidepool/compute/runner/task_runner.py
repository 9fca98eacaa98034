"""The task runner: Prefect tasks on a Dask cluster, faster than the stock one, with states that tell the truth.

`TidepoolTaskRunner` has the constructor and the public behaviour of `prefect_dask.DaskTaskRunner`. It differs in this:

- The Prefect context and the task travel once per flow run and map, not once per task run (`submission`).
- Each task run is followed to a final state: a lost worker is another attempt, a lost cluster is Crashed (`tracker`).
- A flow run is not Completed before its task runs are final.
- Arguments and results above a limit are refused with advice (`limits`).
- Closing cancels what is left, sends logs and events, closes the cluster, all within a time, and raises nothing.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future as ConcurrentFuture
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import distributed
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.states import Failed

from tidepool.compute.clusters.local import local_cluster, quiet_dask, set_dask_defaults
from tidepool.compute.run_log import log_for_people, run_log
from tidepool.compute.runner.recorder import Recorder
from tidepool.compute.runner.submission import Mapping, Publisher, shared_arguments
from tidepool.compute.runner.tracker import Tracker
from tidepool.compute.runner.worker_loss import ReportingNanny, WorkerLostError
from tidepool.compute.worker import engine
from tidepool.report import run_record
from tidepool.settings import settings
from tidepool.upstream.prefect import check_before_success
from tidepool.upstream.prefect_dask import DaskRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import RunInput
    from prefect.futures import PrefectFuture, PrefectFutureList
    from prefect_dask.client import PrefectDaskClient

    from tidepool.compute.runner.futures import TidepoolFuture


class TidepoolTaskRunner(DaskRunner):
    """Runs tasks on a Dask cluster that starts with the first submitted task.

    Args:
        *args: As for `prefect_dask.DaskTaskRunner`.
        start_early: Begin to create the cluster when the flow begins, not with its first submitted task.
        **kwargs: As for `prefect_dask.DaskTaskRunner`.
    """

    def __init__(self, *args: Any, start_early: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_early = start_early
        self.given_cluster = self.cluster
        self._starting: ConcurrentFuture[Any] | None = None
        self._lock = threading.RLock()
        self._map = threading.local()
        self._tracker: Tracker | None = None
        self._publisher = Publisher()
        self._flow_run_id: UUID | None = None
        self._cluster_since: float | None = None
        self._checked = False
        create: Any = self.cluster_class
        if not self.address and self.cluster is None and create in {None, distributed.LocalCluster, local_cluster}:
            # Each lost worker is reported at once; the tracker decides what runs again, and counts.
            options = self.cluster_kwargs
            options["scheduler_kwargs"] = {"allowed_failures": 0, **options.get("scheduler_kwargs", {})}
            if options.get("processes", True):
                options.setdefault("worker_class", ReportingNanny)

    def duplicate(self) -> Self:
        """Return a new runner with the same settings, as every flow run gets; the stock one forgets `cluster`."""
        return type(self)(cluster=self.given_cluster, **self._options())

    def __reduce__(self) -> tuple[Any, ...]:
        # A flow is pickled with its runner for each flow run; only its settings are of use elsewhere.
        return partial(type(self), **self._options()), ()

    def _options(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "cluster_class": self.cluster_class,
            "cluster_kwargs": self.cluster_kwargs,
            "adapt_kwargs": self.adapt_kwargs,
            "client_kwargs": self.client_kwargs,
            "performance_report_path": self.performance_report_path,
            "start_early": self.start_early,
        }

    # --- submission -------------------------------------------------------------------------------

    def submit(  # type: ignore[override] # the overloads for async tasks give the same future
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> TidepoolFuture[Any]:
        """Send one task run to the cluster; the arguments are those of the stock runner.

        Raises:
            ArgumentRefusedError: an argument is too large to travel, or cannot be pickled.
            WorkerLostError: the cluster is gone.
        """
        tracker, context = self._ready()
        current: Mapping | None = getattr(self._map, "current", None)
        if current and current.task is task:
            return current.add(parameters, wait_for, dependencies, context)
        alone = Mapping(tracker, task, self._publisher.call(self.client, task, {}), {})
        future = alone.add(parameters, wait_for, dependencies, context)
        alone.send()
        return future

    def map(  # type: ignore[override] # as with submit
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
    ) -> PrefectFutureList[TidepoolFuture[Any]]:
        """Send a task run for each item of the iterable arguments, in few messages.

        Raises:
            ArgumentRefusedError: an argument is too large to travel, or cannot be pickled.
            MappingLengthMismatch: the iterables differ in length.
            MappingMissingIterable: none of the arguments is an iterable.
            WorkerLostError: the cluster is gone.
        """
        # An iterator is consumed here: it may itself submit runs of the same task, which are not part of this map.
        parameters = {name: list(value) if isinstance(value, Iterator) else value for name, value in parameters.items()}
        shared = shared_arguments(task, parameters)
        tracker, _ = self._ready()
        call = self._publisher.call(self.client, task, {name: pickled for name, (_, pickled) in shared.items()})
        mapping = self._map.current = Mapping(tracker, task, call, {name: value for name, (value, _) in shared.items()})
        try:
            return cast("PrefectFutureList[TidepoolFuture[Any]]", super().map(task, parameters, wait_for))
        finally:
            self._map.current = None
            # Also when an item is refused: the task runs before it were accepted.
            mapping.send()

    # --- the cluster ------------------------------------------------------------------------------

    @property
    def client(self) -> PrefectDaskClient:
        """The Dask client; the first use creates the cluster."""
        with self._lock:
            if self.connected is None and self._starting is not None:
                self.cluster = self.exit_stack.enter_context(self._starting.result())
                self._starting = None
            return super().client

    def _ready(self) -> tuple[Tracker, list[str]]:
        """Return the tracker and the metadata path of the current context; the first call creates the cluster."""
        if not self.started:
            raise RuntimeError("The task runner must be started before submitting work.")
        with self._lock:
            if self._tracker is None:
                client, flow_run_context, log = self.client, FlowRunContext.get(), run_log()
                if not _in_dask_worker():
                    self._note_cluster()
                recorder = Recorder(contextvars.copy_context(), log)
                back_pressure = not _in_dask_worker()
                self._tracker = Tracker(
                    client, self.cluster, recorder, log, back_pressure=back_pressure, slot=engine.slot.get()
                )
                if flow_run_context and flow_run_context.flow_run and not flow_run_context.detached:
                    self._flow_run_id = flow_run_context.flow_run.id
                    check_before_success(_complete_task_runs)
            return self._tracker, self._publisher.context(self.client)

    def _note_cluster(self) -> None:
        """Log that the cluster is there, and note its workers for the run's report."""
        scheduler: Any = self.client.scheduler
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        record, size = run_record.current(), self.cluster_kwargs.get("size")
        record.workers.asked += size.workers if size else len(workers)
        limit = max((each["memory_limit"] or 0 for each in workers.values()), default=0)
        record.see_workers(len(workers), limit=limit)
        count = f"{len(workers)} worker{'' if len(workers) == 1 else 's'}"
        record.event(f"Dask cluster with {count}")
        run_log().info("Dask cluster at %s: %s", scheduler.address, count)
        self._cluster_since = time.monotonic()

    def _note_end(self) -> None:
        """Note what the cluster's workers were asked for; one on Kubernetes measures it itself."""
        workers, had = run_record.current().workers, self._cluster_since
        if had is None or hasattr(self.cluster, "used"):
            return
        size, seconds = self.cluster_kwargs.get("size"), time.monotonic() - had
        gib = size.memory_gib if size else 0.0
        cores = size.threads if size else 1
        run_record.current().use(core_seconds=workers.had * cores * seconds, gib_seconds=workers.had * gib * seconds)

    def _start_cluster(self) -> None:
        """Create the cluster in a thread; `client` waits for it."""
        starting = self._starting = ConcurrentFuture()
        create: Any = self.resolved_cluster_class or distributed.LocalCluster
        context = contextvars.copy_context()

        def start() -> None:
            try:
                starting.set_result(create(**self.cluster_kwargs))
            except BaseException as error:  # noqa: BLE001 - raised where the cluster is used
                starting.set_exception(error)

        threading.Thread(target=context.run, args=(start,), name="tidepool-start-cluster", daemon=True).start()

    # --- beginning and end ------------------------------------------------------------------------

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call] # Prefect leaves it unannotated
        log_for_people()
        set_dask_defaults(settings().compute.no_worker_seconds)
        if not _in_dask_worker():  # whose own log it is
            quiet_dask()
        # A task on a Dask worker enters a runner of its own, for tasks that it submits to the cluster it is on.
        if self.start_early and not self.address and self.cluster is None and not _in_dask_worker():
            self._start_cluster()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._checked and not _in_dask_worker():
                self._check_late()
        finally:
            self._close()
            self.started = False

    def complete(self) -> None:
        """Wait until every task run has its final state; the flow engine calls it before it proposes Completed.

        Raises:
            WorkerLostError: some were lost with their worker or scheduler, and the author has not looked at them.
        """
        self._checked = True
        if self._tracker:
            self._tracker.complete()

    def _check_late(self) -> None:
        """Correct a flow run that Prefect has made Completed without asking: `complete` relies on its engine."""
        if self._flow_run_id is None:
            self.complete()
            return
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(self._flow_run_id).state
            if state is None or not state.is_completed():
                return  # the flow has failed by itself
            try:
                self.complete()
            except WorkerLostError as lost:
                client.set_flow_run_state(self._flow_run_id, Failed(message=str(lost)), force=True)
                raise

    def _close(self) -> None:
        """Cancel, flush and close, in this order, within the time of the settings; never raise."""
        if self.connected is None and self._starting is None:
            return
        seconds = settings().compute.close_seconds
        close = partial(contextvars.copy_context().run, self._close_in_order, seconds)
        closing = threading.Thread(target=close, name="tidepool-close", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            run_log().error("The Dask cluster was not closed within %g s; continuing", seconds)

    def _close_in_order(self, seconds: float) -> None:
        if starting := self._starting:
            what = "stop the Dask cluster that was starting"
            self._attempt(what, lambda: starting.result(timeout=seconds).close())
        if tracker := self._tracker:
            self._attempt(
                "cancel what was not final", tracker.stop, "the flow run ended before this task run", seconds / 4
            )
            own = not (self.address or self.given_cluster or self.cluster_kwargs.get("shared") or _in_dask_worker())
            self._attempt("send the workers' logs and events", partial(tracker.flush, last=own), seconds / 4)
            self._attempt("record what a lost worker did not send", tracker.backlog.record_unsent, seconds / 8)
            self._attempt("forget the flow run", self._publisher.forget, self.client)
        self._attempt("note what the Dask cluster was asked for", self._note_end)
        self._attempt("close the Dask cluster", self.exit_stack.close)
        if not (self.address or _in_dask_worker()):
            run_log().info("Dask cluster: closed")

    def _attempt(self, what: str, step: Callable[..., Any], *args: Any) -> None:
        try:
            step(*args)
        except Exception:  # noqa: BLE001 - the flow's own state and error stand; the operator removes what is left
            run_log().exception("Could not %s", what)


def _complete_task_runs() -> None:
    flow_run_context = FlowRunContext.get()
    if flow_run_context and isinstance(flow_run_context.task_runner, TidepoolTaskRunner):
        flow_run_context.task_runner.complete()


def _in_dask_worker() -> bool:
    try:
        distributed.get_worker()
    except ValueError:
        return False
    return True
