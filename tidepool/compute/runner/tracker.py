"""Follows every task run that was sent to Dask to its final state, and makes one where Dask has none.

Dask reports what happened to its own task: done, failed with the worker (`KilledWorker`), cancelled with the
scheduler. Prefect's task run must not be left Running by that. A run whose worker was lost is sent again, a bounded
number of times; one that cannot go on is settled as Crashed with the reason, on the server too.
"""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from distributed import KilledWorker
from distributed.client import FutureCancelledError
from distributed.scheduler import NoValidWorkerError, NoWorkerError
from prefect.states import Cancelled, Crashed

from tidepool.compute.runner.futures import Outcome, TidepoolFuture
from tidepool.compute.runner.recorder import Conclusion, Recorder
from tidepool.compute.runner.worker_loss import Exits, WorkerLostError
from tidepool.compute.worker import engine, entry
from tidepool.settings import settings

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable

    from distributed import Client, Future
    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture


# Final states fetched at a time: each may have the size that a result may have.
_FETCHED_TOGETHER = 64
# While more than that are open, nobody is kept waiting by this, and a fetch costs as much for one as for several.
_LINGER_SECONDS = 0.05

# What a worker has to say is sent in the background: of so much before it is known to be lost, it may not have been.
# A node that vanishes is noticed after distributed.comm.timeouts.tcp, 30 s.
_UNSENT_SECONDS = 40.0
# How long the events of workers that still run may take to be recorded, before they are sent again by the driver.
_RECORDED_SECONDS = 5.0

# How many task runs may be open, and how many may have ended without the server having recorded it, before no more are
# sent. Prefect's server drops events when it is 10,000 behind, of any flow run; a task run has three.
_OPEN = 1000
_AHEAD = 1000
_FOLLOW_SECONDS = 60.0

# Where the scheduler says which workers come and go.
_ALL_TOPIC = "all"

# A state whose worker is lost while it is fetched is computed again, which takes as long as the task: it is asked for
# again later.
_FETCH_SECONDS = 30.0
_LATER_SECONDS = 1.0


class _Told(asyncio.Event):
    """The event of a Dask future's state, that also tells each time it is set.

    `Future.add_done_callback` does the same with a coroutine and a thread for each future: a quarter of the driver's
    CPU time at thousands of them.

    Args:
        tell: What to call, in Dask's event loop.
        future: What to call it with; not the Dask future, which would keep itself alive by this.
    """

    def __init__(self, tell: Callable[[TidepoolFuture[Any]], None], future: TidepoolFuture[Any]) -> None:
        super().__init__()
        self._tell = tell
        self._future = future

    def set(self) -> None:
        """Sets the event, and tells."""
        super().set()
        self._tell(self._future)


class Tracker:
    """Sends task runs to Dask and settles their futures.

    Args:
        client: Where to send them.
        cluster: The cluster object, if there is one: it may know why a worker has ended.
        recorder: Tells the server of final states that no worker could tell.
        log: Where lost workers are reported.
        paced: Whether to wait while much is open. Not in a Dask worker: what is open may need the thread that waits.
    """

    def __init__(
        self,
        client: Client,
        cluster: Any,
        recorder: Recorder,
        log: logging.Logger | logging.LoggerAdapter[logging.Logger],
        *,
        paced: bool,
    ) -> None:
        self._paced = paced
        self._client = client
        self._cluster = cluster
        self._recorder = recorder
        self._log = log
        self._exits = Exits()
        self._why: dict[str, str | None] = {}
        self._changed = threading.Condition()
        self._open: dict[str, TidepoolFuture[Any]] = {}
        self._crashed: dict[str, str] = {}
        self._to_record: list[Conclusion] = []
        self._like: bytes | None = None
        self._ended: deque[tuple[float, Conclusion]] = deque()
        self._unconfirmed: deque[Conclusion] = deque()
        self._follow_seconds = _FOLLOW_SECONDS
        self._unsent: list[Conclusion] = []
        self._lost_workers: set[str] = set()
        self._scheduler_gone = False
        scheduler: Any = client.scheduler
        self._address: str = scheduler.address
        self._news: queue.SimpleQueue[tuple[TidepoolFuture[Any], Future[Outcome]] | None] = queue.SimpleQueue()
        self._exits.follow(client)
        client.subscribe_topic(entry.STARTED_TOPIC, self._on_started)
        client.subscribe_topic(_ALL_TOPIC, self._on_any_event)
        self._thread = threading.Thread(
            # In the flow's context: settings and API are those of the flow run.
            target=contextvars.copy_context().run,
            args=(self._follow,),
            name="tidepool-tracker",
            daemon=True,
        )
        self._thread.start()

    # --- what futures and the runner ask ----------------------------------------------------------

    def submit(self, futures: list[TidepoolFuture[Any]]) -> None:
        """Sends task runs to Dask, in one message; waits first while many are open, or the server is far behind.

        Raises:
            WorkerLostError: the scheduler is gone.
        """
        self._keep_pace()
        if self._scheduler_gone or self._client.status == "closed":
            raise WorkerLostError(f"{self._scheduler_words()}; no more tasks can be submitted")
        mine = {str(future.task_run_id): future for future in futures}
        with self._changed:
            self._open.update(mine)
        try:
            self._send(futures)
        except BaseException:
            # Nobody would settle them.
            with self._changed:
                self._open = {key: future for key, future in self._open.items() if key not in mine}
            raise

    def wait(self, future: TidepoolFuture[Any], timeout: float | None) -> None:
        """Waits until the future is settled, for at most that many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: future.outcome is not None, timeout)

    def call_when_done(self, future: TidepoolFuture[Any], fn: Callable[[PrefectFuture[Any]], None]) -> bool:
        """Remembers to call `fn` when the future is settled; False if it is already."""
        with self._changed:
            if future.outcome is None:
                future.callbacks = (*future.callbacks, fn)
            return future.outcome is None

    def acknowledge(self, future: TidepoolFuture[Any]) -> None:
        """The author has seen how that task run ended: it does not fail the flow behind their back any more."""
        with self._changed:
            self._crashed.pop(str(future.task_run_id), None)

    def complete(self) -> None:
        """Waits until every task run has its final state, whether the author collected it or not.

        Raises:
            WorkerLostError: some were lost with their worker or scheduler, and the author has not looked at them.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            lost = list(self._crashed.values())
        self.record_unsent(_RECORDED_SECONDS)
        if lost:
            shown = "; ".join(lost[:5]) + ("; …" if len(lost) > 5 else "")  # noqa: PLR2004 - enough to see what it is
            raise WorkerLostError(f"{len(lost)} task runs did not survive: {shown}")

    def flush(self, seconds: float, *, last: bool) -> None:
        """Has the workers send what they still have of events and logs.

        Args:
            seconds: How long that may take.
            last: Nobody uses these workers afterwards.
        """
        if self._client.status == "running":
            # Those that run: one that was just lost does not answer.
            answer = seconds + _LATER_SECONDS
            self._client.run(engine.flush, seconds, last=last, on_error="ignore", callback_timeout=answer)

    def record_unsent(self, seconds: float) -> None:
        """Tells the server of task runs that ended on a worker just before that was lost.

        It does not raise: what it cannot tell is in the log, and is tried again when the cluster closes.

        Args:
            seconds: How long the server may take to hear of them from the worker itself.
        """
        with self._changed:
            unsent, self._unsent = self._unsent, []
        if unsent and not self._recorder.record_unsent(unsent, seconds):
            with self._changed:
                self._unsent += unsent

    def stop(self, reason: str, seconds: float) -> None:
        """Cancels what is not final, tells the server, and ends.

        Args:
            reason: Why, for the task runs' states.
            seconds: How long telling the server may take.
        """
        self._news.put(None)
        self._thread.join(seconds)
        if self._client.status == "running":
            # That this client leaves is an event too: the scheduler would log that it cannot tell it.
            self._client.unsubscribe_topic(_ALL_TOPIC)
        self._record_concluded()
        with self._changed:
            left = list(self._open.values())
        if not left:
            return
        running = self._running_keys()
        dask_futures = [future.wrapped_future for future in left if future.wrapped_future is not None]
        if self._client.status == "running":
            self._client.cancel(dask_futures, force=True)
        outcomes: list[tuple[TidepoolFuture[Any], Outcome]] = []
        begun: list[Conclusion] = []
        waiting: list[Conclusion] = []
        for future in left:
            state: State[Any] = Cancelled(message=reason)
            outcomes.append((future, Outcome.of(state)))
            sent = future.wrapped_future
            (begun if sent is not None and sent.key in running else waiting).append(Conclusion.of(*outcomes[-1]))
        self._settle(outcomes)
        self._log.warning("%d task runs were not final and are cancelled: %s", len(left), reason)
        self._recorder.record(begun, if_known=waiting)

    # --- pace -------------------------------------------------------------------------------------

    def _keep_pace(self) -> None:
        if not self._paced or threading.current_thread() is self._thread:
            return  # in an author's callback, what is open would not be settled meanwhile
        with self._changed:
            self._changed.wait_for(lambda: len(self._open) < _OPEN)
            due = [self._unconfirmed.popleft() for _ in range(len(self._unconfirmed) - _AHEAD)]
        if not due:
            return
        # The server records in the order in which it hears of them: the last of these is asked for.
        if self._recorder.has_recorded(due[-1], self._follow_seconds):
            self._follow_seconds = _FOLLOW_SECONDS
        else:
            # It may record nothing at all: it is not waited for again before it does.
            self._follow_seconds = 0.0
            self._log.warning("The server is more than %d task runs behind; going on", _AHEAD)
            with self._changed:
                self._unsent += due

    # --- sending ----------------------------------------------------------------------------------

    def _send(self, futures: list[TidepoolFuture[Any]]) -> None:
        sent = [(future, future.submission) for future in futures if future.submission is not None]
        # Dask looks into every argument, here, in the scheduler and in the worker: so it is one, of bytes, and
        # upstreams only where there are some.
        again = [(str(future.task_run_id), s.attempt) if s.attempt else None for future, s in sent]
        sendings = [
            pickle.dumps(entry.Sending(s.call, s.context, s.payload, which))
            for (_, s), which in zip(sent, again, strict=True)
        ]
        upstreams = [[_upstream(future) for future in submission.upstreams] for _, submission in sent]
        dask_futures = self._client.map(
            entry.run,
            sendings,
            *([upstreams] if any(upstreams) else []),
            key=[f"{s.task.name}-{future.task_run_id}" + (f"-{s.attempt}" if s.attempt else "") for future, s in sent],
            pure=False,
        )
        for (future, _), dask_future in zip(sent, dask_futures, strict=True):
            future.sent_as(dask_future)
        loop: Any = self._client.loop
        loop.add_callback(self._watch, [(future, future.wrapped_future) for future, _ in sent])

    def _watch(self, sent: list[tuple[TidepoolFuture[Any], Any]]) -> None:
        """Has each Dask future say when it is done; called where Dask sets their states."""
        for future, dask_future in sent:
            state = dask_future._state
            done, state._event = state.done(), _Told(self._tell, future)
            if done:
                state._event.set()

    def _tell(self, future: TidepoolFuture[Any]) -> None:
        if (dask_future := future.wrapped_future) is not None:
            self._news.put((future, dask_future))

    def _look_again(self, future: TidepoolFuture[Any]) -> None:
        """Later: of a state that is lost and computed again, nothing is to be had at once."""
        loop: Any = self._client.loop
        loop.add_callback(loop.call_later, _LATER_SECONDS, self._tell, future)

    def _send_again(self, future: TidepoolFuture[Any]) -> None:
        assert future.submission is not None  # noqa: S101 - settled futures are not sent again
        future.submission.attempt += 1
        future.submission.started = False
        self._send([future])

    # --- following --------------------------------------------------------------------------------

    def _follow(self) -> None:
        while (first := self._news.get()) is not None:
            if len(self._open) > _FETCHED_TOGETHER:
                time.sleep(_LINGER_SECONDS)
            news = [first]
            while len(news) < _FETCHED_TOGETHER and not self._news.empty():
                if (item := self._news.get()) is None:
                    self._news.put(None)
                    break
                news.append(item)
            # What came before it was sent again or settled is no news; what came twice, is once.
            current = list(
                {future.task_run_id: (future, done) for future, done in news if future.wrapped_future is done}.values()
            )
            try:
                self._handle(current)
            except Exception as error:  # noqa: BLE001 - reported, and settled
                # Whatever this is, nobody must wait for ever for what it concerned.
                self._log.exception("Cannot follow %d task runs", len(current))
                for future, done in current:
                    # Those that were sent again meanwhile are watched as what they are now.
                    if future.outcome is None and future.wrapped_future is done:
                        self._crash(future, f"its outcome could not be read: {error!r}", error)
            self._record_concluded()

    def _handle(self, news: list[tuple[TidepoolFuture[Any], Future[Outcome]]]) -> None:
        finished = [(future, done) for future, done in news if done.status == "finished"]
        failed = [(future, done) for future, done in news if done.status in ("error", "cancelled")]
        if finished:
            failed += self._fetch(finished)
        # Those whose own worker was lost first: what depends on them is sent again with their new Dask future.
        errors = [(future, _error(done)) for future, done in failed]
        for future, error in sorted(errors, key=lambda pair: not _own(pair[0], pair[1])):
            self._on_error(future, error)

    def _record_concluded(self) -> None:
        to_record, self._to_record = self._to_record, []
        if to_record:
            self._recorder.record(to_record)

    def _fetch(
        self, finished: list[tuple[TidepoolFuture[Any], Future[Outcome]]]
    ) -> list[tuple[TidepoolFuture[Any], Future[Outcome]]]:
        """Settles what is finished; gives back those whose state was lost on the way."""

        async def gather(wanted: list[Future[Outcome]]) -> list[Outcome]:
            return await self._client.gather(wanted, asynchronous=True)  # type: ignore[no-any-return]

        try:
            outcomes = self._client.sync(gather, [done for _, done in finished], callback_timeout=_FETCH_SECONDS)
        except Exception as error:  # noqa: BLE001 - the error of any of them: each is looked at by itself
            failed = []
            for future, done in finished:
                if done.status in ("error", "cancelled"):
                    failed.append((future, done))
                elif done.status == "finished" and len(finished) > 1:
                    failed += self._fetch([(future, done)])
                else:
                    self._log.debug("The state of task run %s is computed again: %r", future.task_run_id, error)
                    self._look_again(future)
            return failed
        if self._like is None:
            self._like = next((outcome.pickled for outcome in outcomes if outcome.is_small), None)
        like = self._like
        settled = [(future, outcome.packed(like)) for (future, _), outcome in zip(finished, outcomes, strict=True)]
        self._remember(settled)
        self._settle(settled)
        return []

    def _remember(self, settled: list[tuple[TidepoolFuture[Any], Outcome]]) -> None:
        with self._changed:
            self._forget_what_is_sent()
            for future, outcome in settled:
                conclusion = Conclusion.of(future, outcome.small())
                self._unconfirmed.append(conclusion)
                # What is read only after the news of the loss has ended before it.
                if outcome.worker in self._lost_workers:
                    self._unsent.append(conclusion)
                else:
                    self._ended.append((time.monotonic(), conclusion))

    def _forget_what_is_sent(self) -> None:
        while self._ended and time.monotonic() - self._ended[0][0] > _UNSENT_SECONDS:
            self._ended.popleft()

    def _on_error(self, future: TidepoolFuture[Any], error: BaseException) -> None:
        submission = future.submission
        if submission is None:
            return
        if isinstance(error, FutureCancelledError):
            if error.reason == "scheduler-connection-lost":
                self._scheduler_gone = True
                self._crash(future, self._scheduler_words(), error)
            else:
                self._crash(future, f"cancelled in Dask: {error.msg or error.reason}", error)
        elif isinstance(error, KilledWorker) and _own(future, error):
            self._on_worker_lost(future, error)
        elif isinstance(error, KilledWorker) or any(_failed(upstream) for upstream in submission.upstreams):
            # It did not begin: what it depends on has failed. With that one's new Dask future it waits for the next
            # attempt; with its final state, Prefect says what comes of it.
            self._send_again(future)
        elif isinstance(error, (NoValidWorkerError, NoWorkerError)):
            self._crash(future, f"no Dask worker for {settings().compute.no_worker_seconds:g} s", error)
        else:
            self._crash(future, f"{type(error).__name__}: {error}", error)

    def _on_worker_lost(self, future: TidepoolFuture[Any], error: KilledWorker) -> None:
        submission = future.submission
        assert submission is not None  # noqa: S101 - checked by the caller
        # Dask blames every task that was on the worker. From the second attempt on it is known which ones had begun.
        if not submission.attempt or submission.started:
            submission.losses += error.allowed_failures + 1
        allowed = max(settings().compute.worker_losses, submission.task.retries + 1)
        address = error.last_worker.address
        if address not in self._why:
            self._why[address] = self._exits.why(address, self._cluster)
        last = f"; last exit: {self._why[address]}" if self._why[address] else ""
        if submission.losses >= allowed:
            times = "once" if submission.losses == 1 else f"{submission.losses} times"
            self._crash(future, f"worker lost {times} while running this task{last}", error)
        else:
            self._log.warning(
                "Task `%s` lost its worker %s%s; it runs again (%d of %d losses)",
                submission.task.name,
                address,
                last,
                submission.losses,
                allowed,
            )
            self._send_again(future)

    def _crash(self, future: TidepoolFuture[Any], reason: str, error: BaseException) -> None:
        assert future.submission is not None  # noqa: S101 - settled futures do not crash
        name = future.submission.task.name
        told = WorkerLostError(f"task `{name}`: {reason}")
        told.__cause__ = error
        state: State[Any] = Crashed(message=reason[0].upper() + reason[1:], data=told)
        state.state_details.task_run_id = future.task_run_id
        with self._changed:
            self._crashed[str(future.task_run_id)] = str(told)
        self._log.error("Task `%s` crashed: %s", name, reason)
        future.crashed = True
        outcome = Outcome.of(state)
        self._to_record.append(Conclusion.of(future, outcome))
        self._settle([(future, outcome)])

    def _settle(self, outcomes: Iterable[tuple[TidepoolFuture[Any], Outcome]]) -> None:
        callbacks = []
        with self._changed:
            for future, outcome in outcomes:
                future.outcome = outcome
                # The state is here: Dask must neither keep it nor, when the worker is lost, run the task for it again.
                future.drop()
                self._open.pop(str(future.task_run_id), None)
                callbacks += [(fn, future) for fn in future.callbacks]
                future.callbacks = ()
            self._changed.notify_all()
        for fn, future in callbacks:
            try:
                fn(future)
            except Exception:  # noqa: BLE001 - an author's callback; the others still get called
                self._log.exception("A done callback of task run %s failed", future.task_run_id)

    # --- what the scheduler says ------------------------------------------------------------------

    def _on_started(self, event: tuple[float, dict[str, Any]]) -> None:
        future = self._open.get(event[1]["task_run_id"])
        submission = future.submission if future else None
        if submission and submission.attempt == event[1]["attempt"]:
            submission.started = True

    def _on_any_event(self, event: tuple[float, dict[str, Any]]) -> None:
        said = event[1]
        if said["action"] == "remove-worker" and not said["expected"]:
            with self._changed:
                self._lost_workers.add(said["worker"])
                self._forget_what_is_sent()
                theirs = [each for each in self._ended if each[1].outcome.worker == said["worker"]]
                self._unsent += [conclusion for _, conclusion in theirs]
                self._ended = deque(each for each in self._ended if each[1].outcome.worker != said["worker"])

    def _running_keys(self) -> set[str]:
        if self._client.status != "running":
            return set()
        return {key for keys in self._client.processing().values() for key in keys}

    def _scheduler_words(self) -> str:
        return f"the connection to the Dask scheduler at {self._address} was lost"


def _upstream(future: TidepoolFuture[Any]) -> Outcome | Future[Outcome]:
    dask_future = future.wrapped_future
    return future.outcome if future.outcome is not None else dask_future


def _error(done: Future[Outcome]) -> BaseException:
    try:
        done.result(timeout=_FETCH_SECONDS)
    except BaseException as error:  # noqa: BLE001 - it is the answer, not a failure here
        return error
    return RuntimeError("Dask reports an error and has none")


def _own(future: TidepoolFuture[Any], error: BaseException) -> bool:
    """Whether the lost worker was this task run's, not that of one it depends on."""
    return isinstance(error, KilledWorker) and bool(future.wrapped_future) and error.task == future.wrapped_future.key


def _failed(upstream: TidepoolFuture[Any]) -> bool:
    dask_future = upstream.wrapped_future
    return upstream.crashed or (dask_future is not None and dask_future.status in ("error", "cancelled"))
