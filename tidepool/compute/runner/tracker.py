"""Follows every task run that was sent to Dask to its final state, and makes one where Dask has none.

Dask reports what happened to its own task: done, failed with the worker (`KilledWorker`), cancelled with the
scheduler. Prefect's task run must not be left Running by that. A task run whose worker was lost is sent again, a
bounded number of times; one that cannot go on is settled as Crashed with the reason, on the server too.
"""

from __future__ import annotations

import contextvars
import logging
import pickle
import queue
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import KilledWorker
from distributed.client import FutureCancelledError
from distributed.scheduler import NoValidWorkerError, NoWorkerError
from prefect.states import Cancelled, Crashed

from tidepool.compute.progress import ItemProgress
from tidepool.compute.runner.backlog import Backlog
from tidepool.compute.runner.futures import Changes
from tidepool.compute.runner.recorder import Conclusion, Recorder
from tidepool.compute.runner.worker_loss import Exits, WorkerLostError, allowed_losses
from tidepool.compute.worker import engine, entry
from tidepool.compute.worker.outcome import Outcome
from tidepool.report import run_record
from tidepool.report.reason import plain
from tidepool.settings import settings
from tidepool.upstream.distributed import call_whenever_done

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distributed import Client, Future
    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture

    from tidepool.compute.runner.futures import Submission, TidepoolFuture
    from tidepool.upstream.distributed import WorkerSlot

# Final states fetched at a time: each may have the size that a result may have.
_FETCHED_TOGETHER = 64
# While more than that are open, no single one is urgent, and a fetch costs as much for one as for several.
_LINGER_SECONDS = 0.05
# How long the events of workers that still run may take to be recorded, before the driver sends them again.
_RECORDED_SECONDS = 5.0
# Task runs in flight before no more are submitted.
_OPEN = 1000
# Asking the scheduler about its workers, for a line of the log.
_WORKERS_SECONDS = 5.0
# Topic on which the scheduler reports which workers come and go.
_ALL_TOPIC = "all"
# A state whose worker is lost while it is fetched is computed again, which takes as long as the task: it is asked for
# again later.
_FETCH_SECONDS = 30.0
_LATER_SECONDS = 1.0


class _Settled(NamedTuple):
    """A future that has just become final, with the losses of its task run and its callbacks."""

    future: TidepoolFuture[Any]
    outcome: Outcome
    losses: int
    callbacks: tuple[Callable[[PrefectFuture[Any]], None], ...]


class Tracker:
    """Sends task runs to Dask and settles their futures.

    Args:
        client: A client of the cluster that runs them.
        cluster: The cluster object, if there is one: it may know why a worker has exited.
        recorder: Sends the final states that no worker could send to the server.
        log: Reports lost workers.
        back_pressure: Whether to wait while many are in flight. Not in a Dask worker: those may need the thread that
            waits.
        slot: In a Dask worker, the place of the task run that submits.

    Attributes:
        changed: Notified when futures are settled.
        backlog: Task runs that the server may not have recorded.
    """

    def __init__(
        self,
        client: Client,
        cluster: Any,
        recorder: Recorder,
        log: logging.Logger | logging.LoggerAdapter[logging.Logger],
        *,
        back_pressure: bool,
        slot: WorkerSlot | None = None,
    ) -> None:
        self.changed = Changes(slot)
        self.backlog = Backlog(recorder, log)
        self._back_pressure = back_pressure
        self._client = client
        self._cluster = cluster
        self._recorder = recorder
        self._log = log
        self._exits = Exits()
        self._exit_causes: dict[str, str | None] = {}
        self._open: dict[str, TidepoolFuture[Any]] = {}
        # What a task run submits comes before what is in the queue beside it: else all of that would begin, and wait.
        self._priority = slot.priority + 1 if slot else 0
        if slot:
            slot.awaited.append(self._open)
        self._crashed: dict[TidepoolFuture[Any], str] = {}
        self._to_record: list[Conclusion] = []
        self._scheduler_gone = False
        # Set with `changed`: from then on nothing is open, and what Dask reports does not count.
        self._stopped = threading.Event()
        scheduler: Any = client.scheduler
        self._connection_lost = f"the connection to the Dask scheduler at {scheduler.address} was lost"
        self._loop: Any = client.loop
        self._progress = ItemProgress(log, self._workers)
        self._context = contextvars.copy_context()
        self._like = b""  # an outcome, of which the others keep what differs
        self._done: queue.SimpleQueue[tuple[TidepoolFuture[Any], Future[Outcome]] | None] = queue.SimpleQueue()
        self._exits.follow(client)
        client.subscribe_topic(entry.STARTED_TOPIC, self._on_started)
        client.subscribe_topic(_ALL_TOPIC, self._on_any_event)
        # The flow's context has the settings and the API of the flow run.
        follow = partial(contextvars.copy_context().run, self._follow)
        self._thread = threading.Thread(target=follow, name="tidepool-tracker", daemon=True)
        self._thread.start()

    # --- the interface of futures and runner---------------------------------------------------------

    def submit(self, futures: list[TidepoolFuture[Any]]) -> None:
        """Send task runs to Dask, in one message; wait first while many are in flight or the server lags.

        Raises:
            WorkerLostError: the scheduler is gone, or the flow run has ended.
        """
        # In an author's callback, on the tracker's own thread, nothing would be settled meanwhile.
        if self._back_pressure and threading.current_thread() is not self._thread:
            with self.changed:
                self.changed.wait_for(lambda: len(self._open) < _OPEN)
            self.backlog.wait_for_server()
        mine = {str(future.task_run_id): future for future in futures}
        with self.changed:
            if self._stopped.is_set():
                raise WorkerLostError("the flow run has ended; no more tasks can be submitted")
            if self._scheduler_gone or self._client.status == "closed":
                raise WorkerLostError(f"{self._connection_lost}; no more tasks can be submitted")
            self._open.update(mine)
        self._progress.submit(sum(not future.is_batch for future in futures))
        try:
            self._send(futures)
        except BaseException:
            # Nothing would settle them.
            with self.changed:
                for key in mine:
                    self._open.pop(key, None)
            raise

    def complete(self) -> None:
        """Wait until every task run has its final state, whether the author collected it or not.

        Raises:
            WorkerLostError: some were lost with their worker or scheduler, and the author has not looked at them.
        """
        self.changed.until(lambda: not self._open)
        self._progress.finish()
        with self.changed:
            lost = [error for future, error in self._crashed.items() if not future.seen]
        self.backlog.record_unsent(_RECORDED_SECONDS)
        if lost:
            shown = "; ".join(lost[:5]) + ("; …" if len(lost) > 5 else "")  # noqa: PLR2004 - enough to see what it is
            raise WorkerLostError(f"{len(lost)} task runs did not survive: {shown}")

    def flush(self, seconds: float, *, last: bool) -> None:
        """Have the workers send their remaining events and logs.

        Args:
            seconds: How long that may take.
            last: These workers are not used afterwards.
        """
        if self._client.status == "running":
            # A worker that was just lost does not answer.
            answer = seconds + _LATER_SECONDS
            self._client.run(engine.flush, seconds, last=last, on_error="ignore", callback_timeout=answer)

    def stop(self, reason: str, seconds: float) -> None:
        """Cancel what is not final, tell the server, and end.

        Args:
            reason: For the task runs' states.
            seconds: How long telling the server may take.
        """
        self._done.put(None)
        self._thread.join(seconds)
        # The thread may still read outcomes, of a scheduler that is about to close. So what is left is final before
        # anything is cancelled or closed: an error that comes of that is not the end of a task run.
        with self.changed:
            self._stopped.set()
            left = [(future, future.sent) for future in self._open.values()]
            outcomes = [(future, Outcome.of(Cancelled(message=reason))) for future, _ in left]
            conclusions = [Conclusion.of(future, outcome) for future, outcome in outcomes]
            settled = self._settle(outcomes)
        self._tell(settled)
        if self._client.status == "running":
            # This client's leaving is an event too: the scheduler would log that it cannot deliver it.
            self._client.unsubscribe_topic(_ALL_TOPIC)
        self._record_concluded()
        self._progress.finish()
        if not left:
            return
        running: set[str] = set()
        if self._client.status == "running":
            running = {key for keys in self._client.processing().values() for key in keys}
            self._client.cancel([sent for _, sent in left if sent is not None], force=True)
        begun: list[Conclusion] = []
        waiting: list[Conclusion] = []
        for (_, sent), conclusion in zip(left, conclusions, strict=True):
            (begun if sent is not None and sent.key in running else waiting).append(conclusion)
        self._log.warning("%d task runs were not final and are cancelled: %s", len(left), reason)
        self._recorder.record(begun, if_known=waiting)

    # --- sending ----------------------------------------------------------------------------------

    def _send(self, futures: list[TidepoolFuture[Any]]) -> None:
        sent = [(future, future.submission) for future in futures if future.submission is not None]
        # Dask looks into every argument, here, in the scheduler and in the worker: so there is one, of bytes, and a
        # second one only where there are upstreams.
        pickled = [
            pickle.dumps(
                (s.call, s.context, s.payload, (str(future.task_run_id), future.attempt) if future.attempt else None)
            )
            for future, s in sent
        ]
        upstreams = [[_upstream(future) for future in submission.upstreams] for _, submission in sent]
        wrapped_futures = self._client.map(
            entry.run,
            pickled,
            *([upstreams] if any(upstreams) else []),
            key=[future.key for future, _ in sent],
            pure=False,
            priority=self._priority,
        )
        for (future, _), wrapped_future in zip(sent, wrapped_futures, strict=True):
            future.sent = wrapped_future
            # On Dask's event loop, where the states of its futures are set.
            self._loop.add_callback(call_whenever_done, wrapped_future, partial(self._on_done, future))

    def _on_done(self, future: TidepoolFuture[Any]) -> None:
        if (wrapped_future := future.sent) is not None:
            self._done.put((future, wrapped_future))

    def _resend(self, future: TidepoolFuture[Any], submission: Submission) -> None:
        future.attempt += 1
        submission.started = False
        self._send([future])

    # --- following --------------------------------------------------------------------------------

    def _follow(self) -> None:
        while (first := self._done.get()) is not None:
            if len(self._open) > _FETCHED_TOGETHER:
                time.sleep(_LINGER_SECONDS)
            batch = [first]
            while len(batch) < _FETCHED_TOGETHER and not self._done.empty():
                if (item := self._done.get()) is None:
                    self._done.put(None)
                    break
                batch.append(item)
            # Reports of attempts that were sent again or settled meanwhile are stale; duplicates count once.
            current = list(
                {future.task_run_id: (future, done) for future, done in batch if future.sent is done}.values()
            )
            try:
                self._handle(current)
            except Exception as error:  # noqa: BLE001 - reported, and settled
                if self._stopped.is_set():
                    return  # the client is closed
                # Whatever this is, nothing must wait without end for these task runs.
                self._log.exception("Cannot follow %d task runs", len(current))
                for future, done in current:
                    # Those that were sent again meanwhile are watched as what they are now.
                    if future.outcome is None and future.sent is done:
                        self._crash(future, f"its outcome could not be read: {error!r}", error)
            self._record_concluded()
            self._progress.show()

    def _handle(self, batch: list[tuple[TidepoolFuture[Any], Future[Outcome]]]) -> None:
        finished = [(future, done) for future, done in batch if done.status == "finished"]
        failed = [(future, done) for future, done in batch if done.status in ("error", "cancelled")]
        if finished:
            failed += self._fetch(finished)
        # Those whose own worker was lost come first: what depends on them is sent again with their new Dask future.
        errors = [(future, _error(done)) for future, done in failed]
        for future, error in sorted(errors, key=lambda pair: not _is_own_loss(pair[0], pair[1])):
            self._on_error(future, error)

    def _record_concluded(self) -> None:
        with self.changed:
            to_record, self._to_record = self._to_record, []
        if to_record:
            self._recorder.record(to_record)

    def _fetch(
        self, finished: list[tuple[TidepoolFuture[Any], Future[Outcome]]]
    ) -> list[tuple[TidepoolFuture[Any], Future[Outcome]]]:
        """Settle what is finished; return those whose state was lost on the way."""
        wanted = [done for _, done in finished]
        try:
            # `gather` itself has no timeout.
            outcomes = self._client.sync(self._client.gather, wanted, callback_timeout=_FETCH_SECONDS)
        except Exception as error:  # noqa: BLE001 - the error of any of them: each is looked at by itself
            failed = []
            for future, done in finished:
                if done.status in ("error", "cancelled"):
                    failed.append((future, done))
                elif done.status == "finished" and len(finished) > 1:
                    failed += self._fetch([(future, done)])
                else:
                    self._log.debug("The state of task run %s is computed again: %r", future.task_run_id, error)
                    self._loop.add_callback(self._loop.call_later, _LATER_SECONDS, self._on_done, future)
            return failed
        self._like = self._like or next(filter(None, (outcome.common for outcome in outcomes)), b"")
        settled = [(future, each.packed(self._like)) for (future, _), each in zip(finished, outcomes, strict=True)]
        with self.changed:
            settled = [(future, outcome) for future, outcome in settled if future.outcome is None]
            self.backlog.add([Conclusion.of(future, outcome.without_data()) for future, outcome in settled])
            ended = self._settle(settled)
        self._tell(ended)
        return []

    def _on_error(self, future: TidepoolFuture[Any], error: BaseException) -> None:
        submission = future.submission
        if submission is None:
            return
        if isinstance(error, FutureCancelledError):
            if error.reason == "scheduler-connection-lost":
                self._scheduler_gone = True
                self._crash(future, self._connection_lost, error)
            else:
                self._crash(future, f"cancelled in Dask: {error.msg or error.reason}", error)
        elif isinstance(error, KilledWorker) and _is_own_loss(future, error):
            self._on_worker_lost(future, submission, error)
        elif isinstance(error, KilledWorker) or any(_failed(upstream) for upstream in submission.upstreams):
            # It did not begin: what it depends on has failed. With that one's new Dask future it waits for the next
            # attempt; with its final state, Prefect says what comes of it.
            self._resend(future, submission)
        elif isinstance(error, (NoValidWorkerError, NoWorkerError)):
            self._crash(future, f"no Dask worker for {settings().compute.no_worker_seconds:g} s", error)
        else:
            self._crash(future, f"{type(error).__name__}: {error}", error)

    def _on_worker_lost(self, future: TidepoolFuture[Any], submission: Submission, error: KilledWorker) -> None:
        # Dask blames every task of the worker. From the second attempt on it is known which ones had begun.
        if not future.attempt or submission.started:
            submission.losses += error.allowed_failures + 1
        allowed = allowed_losses(submission.task)
        address = error.last_worker.address
        if address not in self._exit_causes:
            self._exit_causes[address] = self._exits.cause(address, self._cluster)
            run_record.current().event(f"worker {address}: {self._exit_causes[address] or 'cause unknown'}")
        cause = self._exit_causes[address]
        last = f"; last exit: {cause}" if cause else ""
        if submission.losses >= allowed:
            times = "once" if submission.losses == 1 else f"{submission.losses} times"
            self._crash(future, f"worker lost {times} while running this task{last}", error)
        else:
            self._log.warning(
                "Task `%s` lost its worker %s%s; retrying it on another worker (loss %d; with %d it fails)",
                submission.task.name,
                address,
                last,
                submission.losses,
                allowed,
            )
            self._resend(future, submission)

    def _crash(self, future: TidepoolFuture[Any], reason: str, error: BaseException) -> None:
        with self.changed:
            if future.submission is None:  # settled meanwhile
                return
            name = future.submission.task.name
            if item := future.submission.item:
                reason += f"; item: {item}"
            lost = WorkerLostError(f"task `{name}`: {reason}")
            lost.__cause__ = error
            state: State[Any] = Crashed(message=reason[0].upper() + reason[1:], data=lost)
            state.state_details.task_run_id = future.task_run_id
            self._crashed[future] = str(lost)
            self._log.error("Task `%s` crashed: %s", name, reason)
            future.crashed = True
            outcome = Outcome.of(state)
            self._to_record.append(Conclusion.of(future, outcome))
            settled = self._settle([(future, outcome)])
        self._tell(settled)

    def _settle(self, outcomes: Iterable[tuple[TidepoolFuture[Any], Outcome]]) -> list[_Settled]:
        """Make open futures final, each once: with `changed`. Give what is returned to `_tell`, without it."""
        settled = []
        for future, outcome in outcomes:
            losses = future.submission.losses if future.submission else 0
            settled.append(_Settled(future, outcome, losses, future.callbacks))
            future.outcome = outcome
            # Dask must neither keep the state nor, when the worker is lost, run the task again for it.
            future.sent = future.submission = None
            future.callbacks = ()
            self._open.pop(str(future.task_run_id), None)
        self.changed.notify_all()
        return settled

    def _tell(self, settled: list[_Settled]) -> None:
        """Note the end of task runs for log and report, and call what their author has for it."""
        for each in settled:
            self._note(each.future, each.outcome, each.losses)
        for future, fn in ((each.future, fn) for each in settled for fn in each.callbacks):
            try:
                fn(future)
            except Exception as error:  # noqa: BLE001 - an author's callback; the others still get called
                # One that submits after the end of the run has done nothing wrong.
                late = self._stopped.is_set() and isinstance(error, WorkerLostError)
                level = logging.DEBUG if late else logging.ERROR
                message = "A done callback of task run %s failed"
                self._log.log(level, message, future.task_run_id, exc_info=error)

    def _note(self, future: TidepoolFuture[Any], outcome: Outcome, losses: int) -> None:
        """Note the end of an item for log and report; a batch notes its items itself."""
        if future.is_batch:
            return
        state = outcome.state() if outcome.failed else None
        if state and state.is_cancelled():
            return  # of this item there was no end: it has not failed
        begun = outcome.start_time.timestamp() if outcome.start_time else 0.0
        error = plain(state.message) or "no result" if state else ""
        name, tries = outcome.name or future.task_name, max(outcome.tries, 1) + losses
        self._progress.end(run_record.Item(name, begun, outcome.seconds, outcome.worker or "", tries, error))

    def _workers(self) -> int | None:
        """Return the number of workers, and note their memory; None if the scheduler does not answer."""
        scheduler: Any = self._client.scheduler
        if scheduler is None:  # closed
            return None
        try:
            found = self._client.sync(scheduler.identity, n_workers=-1, callback_timeout=_WORKERS_SECONDS)["workers"]
        except (OSError, RuntimeError):  # a figure for the log; a lost scheduler is reported elsewhere
            return None
        memory = max((each.get("metrics", {}).get("memory", 0) for each in found.values()), default=0)
        limit = max((each.get("memory_limit") or 0 for each in found.values()), default=0)
        run_record.current().see_workers(len(found), memory, limit)
        return len(found)

    # --- events of the scheduler -------------------------------------------------------------------

    def _on_started(self, event: tuple[float, dict[str, Any]]) -> None:
        future = self._open.get(event[1]["task_run_id"])
        submission = future.submission if future else None
        if future and submission and future.attempt == event[1]["attempt"]:
            submission.started = True

    def _on_any_event(self, event: tuple[float, dict[str, Any]]) -> None:
        message = event[1]
        if message["action"] == "add-worker":
            self._context.copy().run(self._log.info, "Dask worker %s joined", message["worker"])
        if message["action"] == "remove-worker" and not message["expected"]:
            self.backlog.on_worker_lost(message["worker"])
            record = run_record.current()
            record.workers.lost += 1
            record.event(f"worker {message['worker']} lost")
            self._context.copy().run(self._log.warning, "Dask worker %s is lost", message["worker"])


def _upstream(future: TidepoolFuture[Any]) -> Outcome | Future[Outcome]:
    wrapped_future: Future[Outcome] = future.sent  # read first: it is dropped once there is an outcome
    return wrapped_future if future.outcome is None else future.outcome


def _error(done: Future[Outcome]) -> BaseException:
    try:
        done.result(timeout=_FETCH_SECONDS)
    except BaseException as error:  # noqa: BLE001 - the result that is asked for
        return error
    return RuntimeError("Dask reports an error without an exception")


def _is_own_loss(future: TidepoolFuture[Any], error: BaseException) -> bool:
    """Return whether the lost worker was this task run's, not that of one it depends on."""
    return isinstance(error, KilledWorker) and bool(future.sent) and error.task == future.sent.key


def _failed(upstream: TidepoolFuture[Any]) -> bool:
    wrapped_future = upstream.sent
    return upstream.crashed or (wrapped_future is not None and wrapped_future.status in ("error", "cancelled"))
