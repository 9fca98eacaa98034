"""The tracker and its backlog, with a Dask client that never answers by itself."""

from __future__ import annotations

import contextvars
import gc
import logging
import pickle
import threading
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import uuid4

import httpx
import pytest
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker
from prefect import task
from prefect.states import Completed

from tests.polling import until
from tidepool.compute.runner import backlog as backlog_module
from tidepool.compute.runner import recorder as recorder_module
from tidepool.compute.runner import tracker as tracker_module
from tidepool.compute.runner.backlog import Backlog
from tidepool.compute.runner.futures import Submission, TidepoolFuture
from tidepool.compute.runner.recorder import Conclusion
from tidepool.compute.runner.recorder import Recorder as RealRecorder
from tidepool.compute.runner.tracker import Tracker
from tidepool.compute.runner.worker_loss import EXIT_TOPIC, Exits, WorkerLostError
from tidepool.compute.worker.entry import STARTED_TOPIC
from tidepool.compute.worker.outcome import Outcome
from tidepool.report import run_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOG = logging.getLogger("tidepool.test")


@task
def nothing() -> None:
    """Do nothing."""


class SilentClient:
    """A Dask client whose futures end by `fail` only; `handlers` get the scheduler's events."""

    status = "running"
    scheduler = SimpleNamespace(address="tcp://127.0.0.1:1", identity=None)

    def __init__(self) -> None:
        self.loop = SimpleNamespace(add_callback=lambda *_: None)
        self.handlers: dict[str, Callable[[Any], None]] = {}
        self.sent: list[str] = []
        self.cancelled: list[Any] = []
        self.running: list[str] = []
        self.unsubscribed: list[str] = []

    def sync(self, *_: Any, **_options: Any) -> Any:
        raise OSError("the scheduler does not answer")

    def subscribe_topic(self, topic: str, handler: Callable[[Any], None]) -> None:
        self.handlers[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        self.unsubscribed.append(topic)

    def map(self, _function: Any, _pickled: list[bytes], *_: Any, key: list[str], **_options: Any) -> list[Any]:
        self.sent += key
        return [SimpleNamespace(status="pending", key=each) for each in key]

    def processing(self) -> dict[str, list[str]]:
        return {"tcp://worker:1": self.running}

    def cancel(self, futures: list[Any], *, force: bool) -> None:
        assert force
        self.cancelled += futures


def fail(*failed: tuple[TidepoolFuture[Any], BaseException]) -> list[tuple[TidepoolFuture[Any], Any]]:
    """Dask's futures of task runs, in error."""

    def result(error: BaseException) -> Any:
        def raising(**_: Any) -> None:
            raise error

        return raising

    for future, error in failed:
        future.sent.status, future.sent.result = "error", result(error)
    return [(future, future.sent) for future, _ in failed]


def lost_worker(of: TidepoolFuture[Any]) -> KilledWorker:
    worker: Any = SimpleNamespace(address="tcp://worker:1")
    return KilledWorker(of.sent.key, worker, 0)


class Recorder:
    """Keeps what it is told; `recorded` says whether the server follows, and `reached` whether it answers."""

    def __init__(self, *, recorded: bool = True, reached: bool = True) -> None:
        self.recorded, self.reached = recorded, reached
        self.unsent: list[tuple[list[Conclusion], float]] = []
        self.asked: list[tuple[Conclusion, float]] = []
        self.records: list[Any] = []

    def record(self, concluded: list[Conclusion], if_known: list[Conclusion] = []) -> None:  # noqa: B006 - not changed
        self.records.append(([each.task_run_id for each in concluded], [each.task_run_id for each in if_known]))

    def record_unsent(self, ended: list[Conclusion], seconds: float) -> bool:
        self.unsent.append((ended, seconds))
        return self.reached

    def has_recorded(self, ended: Conclusion, seconds: float) -> bool:
        self.asked.append((ended, seconds))
        return self.recorded


def made(tracker: Tracker, *upstreams: TidepoolFuture[Any]) -> TidepoolFuture[Any]:
    submission = Submission(nothing, ["call"], ["context"], b"", {}, list(upstreams))
    return TidepoolFuture(uuid4(), submission, tracker.changed)


class Made(NamedTuple):
    tracker: Tracker
    client: Any
    recorder: Any


@pytest.fixture
def all_of_it() -> Iterator[Made]:
    client: Any = SilentClient()
    recorder: Any = Recorder()
    tracker = Tracker(client, SimpleNamespace(worker_exit=lambda _: None), recorder, LOG, back_pressure=True)
    yield Made(tracker, client, recorder)
    tracker._done.put(None)
    tracker._thread.join(60)
    assert not tracker._thread.is_alive()


def ended(worker: str) -> Conclusion:
    state: Any = Completed()
    run: Any = SimpleNamespace(name="nothing", start_time=None, run_count=1)
    return Conclusion(uuid4(), nothing, {}, Outcome.of(state, run, worker))


def test_a_done_callback_submits_while_as_many_are_in_flight_as_may_be(
    all_of_it: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs on the thread that settles what is in flight: there it must not wait for that."""
    monkeypatch.setattr(tracker_module, "_OPEN", 1)
    tracker = all_of_it.tracker
    first, second, third = (made(tracker) for _ in range(3))
    submitted = threading.Event()

    def submit(_: object) -> None:
        assert threading.current_thread() is tracker._thread
        tracker.submit([third])
        submitted.set()

    def broken(_: object) -> None:
        raise ValueError("an author's mistake")

    first.add_done_callback(broken)
    first.add_done_callback(submit)
    assert not submitted.is_set()
    tracker.submit([first, second])
    fail((first, FutureCancelledError("key", "told to")))
    tracker._on_done(first)
    assert submitted.wait(60)
    assert set(tracker._open) == {str(second.task_run_id), str(third.task_run_id)}
    assert f"A done callback of task run {first.task_run_id} failed" in caplog.text
    assert first.state.message == "Cancelled in Dask: told to"
    first.add_done_callback(lambda future: submitted.clear() if future is first else None)
    assert not submitted.is_set(), "at once: it is settled"


def test_as_many_are_in_flight_as_may_be(all_of_it: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_OPEN", 2)
    tracker, client, _ = all_of_it
    first, second, third = (made(tracker) for _ in range(3))
    tracker.submit([first])
    tracker.submit([second])
    submitting = threading.Thread(target=tracker.submit, args=([third],), daemon=True)
    submitting.start()
    changed: Any = tracker.changed
    until(lambda: changed._waiters or len(client.sent) > 2)
    assert len(client.sent) == 2
    fail((first, FutureCancelledError("key", "told to")))
    tracker._on_done(first)
    submitting.join(60)
    assert [key.removeprefix("nothing-") for key in client.sent] == [
        str(each.task_run_id) for each in (first, second, third)
    ]


def test_what_waits_for_a_lost_task_is_sent_again_after_it(all_of_it: Made) -> None:
    tracker, client, recorder = all_of_it
    first = made(tracker)
    second = made(tracker, first)
    tracker.submit([first, second])
    error = lost_worker(first)
    keys = [first.sent.key, second.sent.key]
    tracker._handle(fail((second, error), (first, error)))
    assert client.sent == [*keys, f"{keys[0]}-1", f"{keys[1]}-1"]
    assert first.submission is not None
    assert second.submission is not None
    assert (first.submission.losses, second.submission.losses) == (1, 0)
    tracker._record_concluded()
    assert recorder.records == []


def test_a_task_is_to_blame_for_the_attempts_that_it_had_begun(all_of_it: Made) -> None:
    """Dask blames every task that a lost worker had; on the second attempt it is known which one had begun."""
    tracker, client, recorder = all_of_it
    one = made(tracker)
    tracker.submit([one])
    submission = one.submission
    assert submission is not None

    def lose(*begun: int) -> tuple[int, int]:
        for attempt in begun:
            client.handlers[STARTED_TOPIC]((0.0, {"task_run_id": str(one.task_run_id), "attempt": attempt}))
        tracker._handle(fail((one, lost_worker(one))))
        tracker._record_concluded()
        return one.attempt, submission.losses

    client.handlers[STARTED_TOPIC]((0.0, {"task_run_id": "another's", "attempt": 0}))
    assert lose() == (1, 1)
    assert lose() == (2, 1)
    assert lose(1) == (3, 1), "the news of an earlier attempt"
    assert lose(3) == (4, 2)
    assert lose(4) == (4, 3)
    assert one.state.message == "Worker lost 3 times while running this task"
    assert (one.state.name, one.crashed, one.submission) == ("Crashed", True, None)
    assert recorder.records == [([one.task_run_id], [])]
    with pytest.raises(WorkerLostError, match=r"^1 task runs did not survive: task `nothing`: worker lost 3 times"):
        tracker.complete()


@pytest.mark.parametrize(("lost", "more"), [(5, False), (6, True)])
def test_five_of_the_task_runs_that_did_not_survive_are_named(all_of_it: Made, lost: int, *, more: bool) -> None:
    tracker = all_of_it.tracker
    futures = [made(tracker) for _ in range(lost)]
    tracker.submit(futures)
    tracker._handle(fail(*((each, FutureCancelledError("key", "told to")) for each in futures)))
    with pytest.raises(WorkerLostError) as caught:
        tracker.complete()
    text = str(caught.value)
    assert text.startswith(f"{lost} task runs did not survive: task `nothing`: cancelled in Dask: told to; task ")
    assert text.count("told to") == 5
    assert text.endswith("; …") is more


def test_a_task_run_that_is_final_has_a_dask_future_of_its_own(all_of_it: Made) -> None:
    """Dask's own is dropped; who has asked for it, as code for the stock runner does, still gets state and key."""
    tracker = all_of_it.tracker
    one = made(tracker)
    tracker.submit([one])
    key = one.wrapped_future.key
    assert one.wrapped_future.status == "pending"
    tracker._handle(fail((one, FutureCancelledError("key", "told to"))))
    ended_one = one.wrapped_future
    assert (ended_one.key, ended_one.status, ended_one.done(), ended_one.cancelled()) == (key, "error", True, False)
    assert ended_one.result().message == "Cancelled in Dask: told to"


def answers(client: Any, *outcomes: Any) -> None:
    """Have the client answer with these outcomes of task runs, and with two workers, one of which is new."""
    workers = {"tcp://a:1": {"metrics": {"memory": 5}, "memory_limit": 10}, "tcp://b:1": {}}
    client.gather = None
    client.scheduler = SimpleNamespace(address="tcp://127.0.0.1:1", identity="identity")
    client.sync = lambda asked, *_, **__: {"workers": workers} if asked == "identity" else list(outcomes)


def test_the_end_of_a_task_run_counts_and_that_of_a_batch_does_not(all_of_it: Made) -> None:
    """Of a batch, each item is counted by itself."""
    tracker, client, _ = all_of_it
    futures = [made(tracker) for _ in range(3)]
    futures[2].is_batch = True
    before = run_record.current().items
    tracker.submit(futures)
    for each in futures:
        each.sent.status = "finished"
    answers(client, *(ended("tcp://a:1").outcome for _ in futures))
    tracker._handle([(each, each.sent) for each in futures])
    assert [each.state.name for each in futures] == ["Completed"] * 3
    assert run_record.current().items == before + 2


def test_the_workers_are_counted_and_their_memory_noted_while_the_scheduler_answers(all_of_it: Made) -> None:
    tracker, client, _ = all_of_it
    assert tracker._workers() is None, "it does not answer"
    record = run_record.begin()
    answers(client)
    assert tracker._workers() == 2
    assert (record.workers.had, record.workers.memory_peak, record.workers.memory_limit) == (2, 5, 10)
    client.scheduler = None
    assert tracker._workers() is None, "the client is closed"


def test_an_outcome_that_nobody_expected_crashes_its_task_run(
    all_of_it: Made, caplog: pytest.LogCaptureFixture
) -> None:
    """The flow run would wait for it without end."""
    tracker, client, _ = all_of_it
    one = made(tracker)
    tracker.submit([one])
    one.sent.status = "finished"
    answers(client, "no outcome")
    tracker._on_done(one)
    tracker.changed.until(lambda: one.outcome is not None, 20)
    assert one.state.name == "Crashed"
    assert one.state.message.startswith("Its outcome could not be read: AttributeError(")
    assert "Cannot follow 1 task runs" in caplog.text


def test_an_exit_that_is_reported_a_moment_later_is_waited_for() -> None:
    client: Any = SilentClient()
    exits = Exits()
    exits.follow(client)
    event = (0.0, {"worker": "tcp://a:1", "exitcode": -9})
    reporting = threading.Timer(0.1, client.handlers[EXIT_TOPIC], [event])
    reporting.start()
    assert exits.cause("tcp://a:1", None, seconds=60) == "killed by SIGKILL (137)"
    reporting.join()


def test_what_is_left_is_cancelled_and_the_server_told(all_of_it: Made) -> None:
    tracker, client, recorder = all_of_it
    running, waiting = made(tracker), made(tracker)
    tracker.submit([running, waiting])
    sent = [running.sent, waiting.sent]
    client.running = [running.sent.key]
    tracker.stop("the flow run has ended", 60)
    assert not tracker._thread.is_alive()
    assert client.cancelled == sent
    assert client.unsubscribed == ["all"]
    assert recorder.records == [([running.task_run_id], [waiting.task_run_id])]
    assert [(each.state.name, each.state.message) for each in (running, waiting)] == [
        ("Cancelled", "the flow run has ended")
    ] * 2
    assert tracker._open == {}


class ClosingClient(SilentClient):
    """A client that answers no sooner than it is closed, and then as Dask's does: its event loop is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.closed = threading.Event(), threading.Event()
        self.on_cancel: Callable[[], None] = lambda: None
        self.outcomes: list[Outcome] = []
        self.loop.call_later = None

    def gather(self, *_: Any) -> None:
        """Is not called itself."""

    def sync(self, *_: Any, **_options: Any) -> Any:
        self.asked.set()
        assert self.closed.wait(60)
        if self.outcomes:
            return self.outcomes
        raise RuntimeError("IOLoop is closed")

    def cancel(self, futures: list[Any], *, force: bool) -> None:
        super().cancel(futures, force=force)
        self.on_cancel()

    def close(self) -> None:
        self.loop.add_callback = self.sync
        self.status = "closed"
        self.closed.set()


class Closing(NamedTuple):
    tracker: Tracker
    client: ClosingClient
    recorder: Any
    futures: list[TidepoolFuture[Any]]
    log: pytest.LogCaptureFixture


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Closing]:
    """A tracker that reads outcomes of task runs, as its flow run ends before they are there."""
    monkeypatch.setattr(Tracker, "_workers", lambda _: None)
    client, recorder = ClosingClient(), Recorder()
    given: Any = (client, None, recorder, LOG)
    tracker = Tracker(*given, back_pressure=True)
    futures = [made(tracker) for _ in range(4)]
    tracker.submit(futures)
    yield Closing(tracker, client, recorder, futures, caplog)
    client.close()
    tracker._done.put(None)
    tracker._thread.join(60)
    assert not tracker._thread.is_alive()


def _are_cancelled(closing: Closing, reason: str) -> None:
    """Fail unless what was left is cancelled: here, on the server, in log and report."""
    assert {(each.state.name, each.state.message) for each in closing.futures} == {("Cancelled", reason)}
    assert not any(each.crashed for each in closing.futures)
    assert closing.recorder.records == [([], [each.task_run_id for each in closing.futures])]
    warnings = [each.getMessage() for each in closing.log.records if each.levelname != "DEBUG"]
    assert warnings == [f"4 task runs were not final and are cancelled: {reason}"]


@pytest.mark.parametrize("finished", [1, 2])
def test_outcomes_that_are_read_when_the_client_is_closed_are_not_crashes(closing: Closing, finished: int) -> None:
    tracker, client = closing.tracker, closing.client
    for each in closing.futures[:finished]:
        each.sent.status = "finished"
        tracker._done.put((each, each.sent))
    assert client.asked.wait(60)
    tracker.stop("the flow run has ended", 0.01)  # the thread reads an outcome: it is not waited for
    client.close()
    tracker._thread.join(60)
    tracker._crash(closing.futures[0], "its outcome could not be read", RuntimeError())
    _are_cancelled(closing, "the flow run has ended")


def test_an_outcome_that_arrives_after_the_end_changes_nothing(closing: Closing) -> None:
    tracker, client, first = closing.tracker, closing.client, closing.futures[0]
    first.sent.status = "finished"
    tracker._done.put((first, first.sent))
    assert client.asked.wait(60)
    tracker.stop("the flow run has ended", 0.01)
    client.outcomes = [ended("tcp://worker:1").outcome]
    client.close()
    tracker._thread.join(60)
    _are_cancelled(closing, "the flow run has ended")
    tracker.backlog.on_worker_lost("tcp://worker:1")
    tracker.backlog.record_unsent(0)
    assert closing.recorder.unsent == [], "the server knows it as it is"


def test_what_the_end_cancels_in_dask_is_not_a_crash(closing: Closing) -> None:
    """Dask reports each of these as an error, and reading it needs the client."""
    tracker, client = closing.tracker, closing.client
    first, *others = closing.futures
    first.sent.status = "finished"
    tracker._done.put((first, first.sent))
    assert client.asked.wait(60)
    sent = [(each, each.sent) for each in others]

    def cancelled() -> None:
        for _, done in sent:
            done.status, done.result = "cancelled", client.sync
        for each in sent:
            tracker._done.put(each)
        client.close()
        tracker._thread.join(60)  # it has read all of them before anything else happens

    client.on_cancel = cancelled
    tracker.stop("the flow run has ended", 0.01)
    assert not tracker._thread.is_alive()
    _are_cancelled(closing, "the flow run has ended")


def test_after_the_end_nothing_is_submitted_and_an_authors_callback_may_try(closing: Closing) -> None:
    tracker = closing.tracker
    late = made(tracker)
    closing.futures[0].add_done_callback(lambda _: tracker.submit([late]))
    tracker.stop("the flow run has ended", 60)
    with pytest.raises(WorkerLostError, match=r"^the flow run has ended; no more tasks can be submitted$"):
        tracker.submit([late])
    assert tracker._open == {}
    assert len(closing.client.sent) == 4
    _are_cancelled(closing, "the flow run has ended")


def test_a_future_in_an_object_that_prefect_does_not_look_into_is_refused(all_of_it: Made) -> None:
    future = made(all_of_it.tracker)
    expected = f"^the future of task run {future.task_run_id} is inside an object that Prefect does not look into; "
    with pytest.raises(TypeError, match=expected):
        pickle.dumps(future)


def test_what_the_server_cannot_be_told_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fails(error: Exception) -> Any:
        def record(*_: Any) -> None:
            raise error

        return record

    recorder = RealRecorder(contextvars.copy_context(), LOG)
    assert recorder._in_flow(lambda *_: None, [])
    assert not recorder._in_flow(fails(httpx.ConnectError("refused")), [ended("tcp://a:1")] * 2)
    assert not recorder._in_flow(fails(KeyError("a bug")), [ended("tcp://a:1")])
    assert [(each.getMessage(), bool(each.exc_info)) for each in caplog.records] == [
        ("the server may not have recorded the final states of 2 task runs: ConnectError('refused')", False),
        ("the server may not have recorded the final states of 1 task runs", True),
    ]


class Answers:
    """A client of a Prefect server that knows these task runs, one more with each question."""

    def __init__(self, *known: Any) -> None:
        self.known = known
        self.asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def read_task_runs(self, **_: Any) -> list[Any]:
        self.asked += 1
        return list(self.known[: self.asked - 1])


def test_a_server_that_records_an_end_in_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_POLL_SECONDS", 0.001)
    one = ended("tcp://a:1")
    known = SimpleNamespace(id=one.task_run_id, state=Completed(), state_id=None)
    server = Answers(SimpleNamespace(id=uuid4(), state=None), known)
    monkeypatch.setattr(recorder_module, "get_client", lambda **_: server)
    recorder = RealRecorder(contextvars.copy_context(), LOG)
    assert recorder.has_recorded(one, 60)
    assert server.asked == 3, "no longer than needed"
    server.known = ()
    assert not recorder.has_recorded(one, 0)


def test_what_ended_on_a_worker_that_is_lost_is_sent_by_the_driver(all_of_it: Made) -> None:
    tracker, client, recorder = all_of_it
    here, elsewhere = ended("tcp://lost:1"), ended("tcp://other:1")
    tracker.backlog.add([here, elsewhere])
    removed = {"action": "remove-worker", "worker": "tcp://lost:1", "expected": False}
    client.handlers["all"]((0.0, removed | {"worker": "tcp://other:1", "expected": True}))  # retired: it has sent all
    client.handlers["all"]((0.0, removed | {"action": "add-worker"}))
    client.handlers["all"]((0.0, removed))
    late = ended("tcp://lost:1")
    tracker.backlog.add([late])  # its outcome comes after the news of the loss
    tracker.complete()
    assert recorder.unsent == [([here, late], tracker_module._RECORDED_SECONDS)]
    tracker.complete()
    assert len(recorder.unsent) == 1, "once"


def test_what_ended_long_before_a_loss_has_been_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(backlog_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    recorder: Any = Recorder()
    backlog = Backlog(recorder, LOG)
    long_ago, before = ended("tcp://lost:1"), ended("tcp://lost:1")
    backlog.add([long_ago])
    clock.now += backlog_module._UNSENT_SECONDS - 1
    backlog.add([before])
    clock.now += 2
    backlog.on_worker_lost("tcp://lost:1")
    backlog.record_unsent(5)
    assert recorder.unsent == [([before], 5)]


def test_what_ended_long_ago_and_is_recorded_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow run may have a million task runs, and no lost worker."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(backlog_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(backlog_module, "_AHEAD", 0)
    recorder: Any = SimpleNamespace(has_recorded=lambda *_: True)
    backlog = Backlog(recorder, LOG)
    long_ago = ended("tcp://a:1")
    kept = weakref.ref(long_ago)
    backlog.add([long_ago])
    del long_ago
    backlog.wait_for_server()
    assert kept() is not None, "its worker may be lost without having sent it"
    clock.now += backlog_module._UNSENT_SECONDS + 1
    backlog.add([ended("tcp://a:1")])
    gc.collect()
    assert kept() is None


def test_what_the_server_did_not_take_is_sent_again() -> None:
    recorder: Any = Recorder(reached=False)
    backlog = Backlog(recorder, LOG)
    backlog.on_worker_lost("tcp://lost:1")
    here = ended("tcp://lost:1")
    backlog.add([here])
    backlog.record_unsent(5)
    backlog.record_unsent(0)
    assert recorder.unsent == [([here], 5), ([here], 0)]


def test_the_server_may_be_a_thousand_task_runs_behind(caplog: pytest.LogCaptureFixture) -> None:
    recorder: Any = Recorder()
    backlog = Backlog(recorder, LOG)
    some = [ended("tcp://a:1") for _ in range(1003)]
    backlog.add(some[:1000])
    backlog.wait_for_server()
    assert recorder.asked == []
    backlog.add(some[1000:])
    backlog.wait_for_server()
    assert recorder.asked == [(some[2], 60.0)], "the last of the three that are due"
    recorder.recorded = False
    more = [ended("tcp://a:1") for _ in range(2)]
    for each in more:
        backlog.add([each])
        backlog.wait_for_server()
    assert recorder.asked[1:] == [(some[3], 60.0), (some[4], 0.0)], "it is not waited for again"
    assert "Prefect server lags by more than 1000 task runs" in caplog.text
    backlog.record_unsent(1)
    assert recorder.unsent == [(some[3:5], 1)]
    recorder.recorded = True
    for _ in range(2):
        backlog.add([ended("tcp://a:1")])
        backlog.wait_for_server()
    assert [seconds for _, seconds in recorder.asked[3:]] == [0.0, 60.0], "once it follows, it is waited for"
