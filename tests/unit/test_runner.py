"""The task runner's parts that need no cluster."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import uuid4

import cloudpickle
import distributed
import pytest
from distributed.client import ClosedClientError
from prefect import allow_failure, task
from prefect.assets import Asset, materialize
from prefect.client.schemas.objects import TaskRunResult
from prefect.context import FlowRunContext
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import PickleSerializer
from prefect.states import Completed
from prefect.task_engine import TaskRunTimeoutError
from prefect.utilities.annotations import opaque, quote

from tidepool import settings as settings_module
from tidepool.compute.batches import BatchOutcome, _Batches, _delay
from tidepool.compute.clusters.local import local_cluster
from tidepool.compute.limits import (
    ArgumentRefusedError,
    ResultRefusedError,
    pickle_argument,
    pickle_arguments,
    readable_error,
    refuse_arguments,
    refuse_result,
)
from tidepool.compute.runner import submission as submission_module
from tidepool.compute.runner.futures import Submission, TidepoolFuture
from tidepool.compute.runner.submission import Mapping, Publisher, _assets
from tidepool.compute.runner.task_runner import TidepoolTaskRunner
from tidepool.compute.runner.tracker import Tracker
from tidepool.compute.runner.worker_loss import Exits, ReportingNanny, WorkerLostError
from tidepool.compute.worker import entry
from tidepool.compute.worker.engine import _SyncEngine
from tidepool.compute.worker.outcome import Outcome
from tidepool.report import run_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from uuid import UUID


def cluster(**_options: Any) -> None:
    raise AssertionError("no cluster is wanted here")


def test_a_duplicate_has_the_same_settings() -> None:
    runner = TidepoolTaskRunner(cluster_class=cluster, cluster_kwargs={"n": 1}, start_early=True)
    copy = runner.duplicate()
    assert copy == runner
    assert copy.start_early
    assert copy is not runner


def test_a_duplicate_keeps_a_cluster_that_was_given() -> None:
    given: Any = SimpleNamespace()
    assert TidepoolTaskRunner(cluster=given).duplicate().cluster is given


def test_a_runner_travels_by_its_settings() -> None:
    runner = TidepoolTaskRunner(address="tcp://host:8786", start_early=True)
    copy = cloudpickle.loads(cloudpickle.dumps(runner))
    assert copy == runner
    assert copy.start_early


def test_the_cluster_may_know_why_a_worker_ended() -> None:
    class Pods:
        def worker_exit(self, address: str) -> str | None:
            return "out of memory (137)" if address == "tcp://a:1" else None

    assert Exits().cause("tcp://a:1", Pods()) == "out of memory (137)"
    assert Exits().cause("tcp://b:1", Pods()) is None
    assert Exits().cause("tcp://a:1", None, seconds=0) is None


def test_arguments_up_to_the_limit_pass() -> None:
    refuse_arguments("score", {"frame": 1024}, 1024)
    with pytest.raises(ArgumentRefusedError, match=r"`frame` of task `score` has 1.0 KiB, the limit is 1023 bytes"):
        refuse_arguments("score", {"frame": 1024}, 1023)


def test_results_are_refused_by_size_and_when_they_cannot_be_pickled() -> None:
    refuse_result("score", "x" * 100, 1000)
    with pytest.raises(ResultRefusedError, match=r"the result of task `score` has 2.0 MiB"):
        refuse_result("score", b"x" * 2 * 1024**2, 1000)
    with pytest.raises(ResultRefusedError, match="the result of task `score` cannot be pickled"):
        refuse_result("score", (number for number in range(3)), 1000)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (threading.Lock(), ""),
        ([1, threading.Lock()], " at [1]"),
        ({"a": (1, {"b": threading.Lock()})}, " at ['a'][1]['b']"),
    ],
)
def test_the_place_of_what_cannot_be_pickled_is_named(value: Any, place: str) -> None:
    message = (
        rf"^argument `x` of task `score` cannot be pickled{re.escape(place)}: cannot pickle '_thread.lock' object; "
    )
    with pytest.raises(ArgumentRefusedError, match=message):
        pickle_arguments("score", {"number": 1, "x": value})


class StubbornError(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise OSError("no")


def test_errors_travel_as_what_they_are_or_as_text() -> None:
    error = ValueError("as it is")
    assert readable_error(error, 1000) is error
    assert str(readable_error(StubbornError("x"), 1000)) == "StubbornError: x (unpicklable: no)"
    shortened = str(readable_error(ValueError("x" * 5000), 4000))
    assert shortened == f"ValueError: {'x' * 1000} (shortened: 5.0 KiB)"


def test_annotations_travel_as_what_they_are() -> None:
    arguments = [quote([1, 2]), opaque({"a": 1}), allow_failure(3)]
    assert cloudpickle.loads(pickle_argument(arguments)) == arguments


def _completed(result: object) -> Outcome:
    made = ResultRecordMetadata(storage_key=uuid4().hex, serializer=PickleSerializer())
    state: Any = Completed(data=ResultRecord(metadata=made, result=result))
    state.state_details.task_run_id = uuid4()
    return Outcome.of(state)


def test_an_outcome_gives_the_state_back() -> None:
    made = ResultRecordMetadata(storage_key=uuid4().hex, serializer=PickleSerializer())
    state: Any = Completed(data=ResultRecord(metadata=made, result="two"), message="done")
    state.state_details.task_run_id = uuid4()
    outcome = cloudpickle.loads(cloudpickle.dumps(Outcome.of(state)))
    assert outcome.state() == state
    assert (outcome.state().id, outcome.state().data.result) == (state.id, "two")


def test_ten_thousand_outcomes_take_little_memory() -> None:
    """Whole states were a tenth of the driver's memory."""
    first, second = _completed(1), _completed(2)
    assert len(first.header) + len(first.data) < 1000
    kept = second.packed(first.common)
    assert len(kept.header) + len(kept.data) < 200
    assert kept.state() == second.state()
    assert kept.without_data().state().data is None
    assert not kept.common, "what is packed itself is not a dictionary"


def test_a_large_result_is_kept_as_it_is_and_by_none_else() -> None:
    large, small = _completed("x" * 10_000), _completed(1)
    assert not large.common
    assert small.packed(large.common) is small
    assert large.packed(small.common) is large


class _Unreadable:
    def __init__(self) -> None:
        self.room = "x" * 10_000

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.room,)


def test_a_result_is_not_read_to_do_without_it() -> None:
    """One that cannot be read crashed the task runs whose states came together with it."""
    outcome = _completed(_Unreadable())
    small = outcome.without_data().state()
    assert (small.type.value, small.data) == ("COMPLETED", None)
    assert small.state_details.task_run_id
    with pytest.raises(ValueError, match="invalid literal"):
        outcome.state()


def test_assets_are_noted_for_those_task_runs_only_that_have_some() -> None:
    """Prefect notes an empty set for every other one too: 2.5 MB for ten thousand."""
    asset = Asset(key="s3://bucket/table")
    noted: dict[UUID, set[Asset]] = {}
    with FlowRunContext.model_construct(task_run_assets=noted):
        assert _assets(nothing, uuid4(), {"item": set()}) is None
        assert noted == {}
        made, wanted = materialize(asset)(nothing.fn), uuid4()
        described = _assets(made, wanted, {"item": set()})
        assert described
        assert described["downstream_assets"][0]["key"] == asset.key
        upstream = TaskRunResult(id=wanted)
        described = _assets(nothing, uuid4(), {"item": {upstream}})
        assert described
        assert described["upstream_assets"][0]["key"] == asset.key
        assert described["copy_to_child_ctx"], "Prefect's engine would begin with none, and the lineage would be lost"
        assert _assets(nothing, uuid4(), {"item": set()}) is None
        assert list(noted.values()) == [{asset}, {asset}]


@task
def nothing(item: int) -> int:
    return item


def test_a_context_or_a_task_is_published_once() -> None:
    published: list[tuple[list[str], bytes]] = []
    client: Any = SimpleNamespace(id="c", set_metadata=lambda path, data: published.append((path, data)))
    publisher = Publisher()
    first, second = publisher.call(client, nothing, {}), publisher.call(client, nothing, {"item": b"1"})
    assert first != second
    assert publisher.call(client, nothing, {}) == first
    assert [path for path, _ in published] == [first, second]


def test_task_runs_are_sent_while_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin at once, and the memory that unsent ones take is bounded."""
    monkeypatch.setattr(submission_module, "_GRAPH_TASKS", 2)
    sent: list[list[Any]] = []
    tracker: Any = SimpleNamespace(submit=sent.append, changed=None)
    mapping = Mapping(tracker, nothing, ["call"], {})
    futures = [mapping.add({"item": item}, None, None, ["context"]) for item in range(3)]
    assert sent == [futures[:2]]
    mapping.send()
    mapping.send()
    assert sent == [futures[:2], futures[2:]]
    monkeypatch.setattr(submission_module, "_GRAPH_BYTES", 1)
    large = mapping.add({"item": 4}, None, None, ["context"])
    assert sent[2:] == [[large]], "of a size that is sent alone"


class UnusedCluster:
    """A cluster that is made early, and takes a moment to close."""

    closed: ClassVar[list[str]] = []
    made: ClassVar[threading.Event] = threading.Event()
    release: ClassVar[threading.Event] = threading.Event()

    def __init__(self, name: str) -> None:
        self.made.wait(60)
        self.name = name

    def close(self) -> None:
        self.release.wait(0.2 if self.name == "quick" else 60)
        self.closed.append(self.name)


@pytest.fixture
def early() -> Iterator[Callable[[str], TidepoolTaskRunner]]:
    """Makes a runner that begins at once to create such a cluster."""
    UnusedCluster.closed.clear()
    UnusedCluster.release.clear()
    UnusedCluster.made.set()
    kind: Any = UnusedCluster
    yield lambda name: TidepoolTaskRunner(cluster_class=kind, cluster_kwargs={"name": name}, start_early=True)
    UnusedCluster.release.set()


def test_a_cluster_that_nothing_used_is_closed_before_the_flow_run_ends(
    early: Callable[[str], TidepoolTaskRunner], caplog: pytest.LogCaptureFixture
) -> None:
    UnusedCluster.made.clear()
    with early("quick") as runner:
        [starting] = [each for each in threading.enumerate() if each.name == "tidepool-start-cluster"]
        UnusedCluster.made.set()
    assert starting.daemon, "a process that ends would wait for it"
    assert UnusedCluster.closed == ["quick"]
    assert "was not closed within" not in caplog.text
    with pytest.raises(RuntimeError, match="must be started before"):
        runner.submit(nothing, {"item": 1})


def test_a_cluster_that_does_not_close_is_not_waited_for(
    early: Callable[[str], TidepoolTaskRunner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_CLOSE_SECONDS", "1")
    settings_module.settings.cache_clear()
    with early("slow"):
        pass
    settings_module.settings.cache_clear()
    assert UnusedCluster.closed == []
    assert "The Dask cluster was not closed within 1 s; continuing" in caplog.text


def test_a_cluster_that_cannot_be_made_early_fails_where_it_is_used() -> None:
    found: list[AssertionError] = []

    def use() -> None:
        try:
            runner.submit(nothing, {"item": 1})
        except AssertionError as error:
            found.append(error)

    with TidepoolTaskRunner(cluster_class=cluster, start_early=True) as runner:
        using = threading.Thread(target=use, daemon=True)
        using.start()
        using.join(20)
        assert [str(each) for each in found] == ["no cluster is wanted here"]


def test_all_workers_of_a_cluster_are_in_the_runs_record() -> None:
    record = run_record.begin()
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with TidepoolTaskRunner(cluster_kwargs=options) as runner:
        runner._ready()
    assert (record.workers.asked, record.workers.had) == (2, 2)
    assert [text for _, text in record.events] == ["Dask cluster with 2 workers"]


def test_a_driver_does_not_print_what_dask_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Prefect's handler on the root logger, each INFO of a scheduler was on the terminal."""
    logger = logging.getLogger("distributed")
    monkeypatch.setattr(logger, "level", logging.INFO)
    with TidepoolTaskRunner(cluster_class=cluster):
        assert logger.level == logging.WARNING


def _measured(*runs: tuple[float, float, str], items: int, size: int = 5) -> int:
    batches = _Batches(nothing, list(range(items)), {}, [], None)
    batches._seen = [BatchOutcome([0], size, begun, ended, worker) for begun, ended, worker in runs]
    batches._done = len(runs)
    return batches.measured_size()


def test_auto_makes_overhead_a_hundredth_of_each_batch() -> None:
    # Items of 0.1 s, 0.02 s between them: 99 * 0.02 / 0.1 items.
    runs = [(0.0, 0.1, "a"), (0.12, 0.22, "a"), (0.24, 0.34, "a")]
    assert _measured(*runs, items=1003) == 20


def test_auto_gives_each_worker_as_many_batches() -> None:
    runs = [(0.0, 0.1, "a"), (0.12, 0.22, "a"), (0.0, 0.1, "b"), (0.12, 0.22, "b")]
    # By overhead alone 20 and so 51 batches, the last one alone on its worker.
    assert _measured(*runs, items=1004) == 20
    assert _measured(*runs, items=1014) == math.ceil(1010 / 52)


def test_auto_leaves_batches_for_each_worker_and_none_too_long() -> None:
    quick = [(0.0, 0.0001, "a"), (0.0, 0.0001, "b")]
    assert _measured(*quick, items=802) == 100
    slow = [(0.0, 30.0, "a"), (31.0, 61.0, "a")]
    assert _measured(*slow, items=1000) == 2


def test_auto_leaves_room_for_the_results_of_each_batch() -> None:
    quick = [(0.0, 0.0001, "a"), (0.0, 0.0001, "b")]
    assert _measured(*quick, items=802, size=200_000) == 20


def test_items_wait_for_their_retry_as_task_runs_do() -> None:
    after_each = nothing.with_options(retry_delay_seconds=[1, 5])
    assert [_delay(after_each, tries) for tries in (1, 2, 3)] == [1, 5, 5]
    assert _delay(nothing, 1) == 0
    jittered = nothing.with_options(retry_delay_seconds=10, retry_jitter_factor=0.5)
    delays = {_delay(jittered, 1) for _ in range(20)}
    assert len(delays) > 1
    assert all(5 <= delay <= 15 for delay in delays)


def test_a_local_cluster_keeps_a_worker_that_restarts() -> None:
    """After 15 s Dask removed the nanny of a worker that was still coming back, and the flow run waited without end."""
    script = """
import dask.config
from tidepool.compute.clusters.local import set_dask_defaults
set_dask_defaults(30)
print(dask.config.get("distributed.deploy.lost-worker-timeout"))
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}

    def printed(**more: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", script], env=variables | more, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()

    assert printed() == "30s"
    assert printed(DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT="7s") == "7s", "a user's own setting"


@pytest.mark.parametrize("kind", [None, distributed.LocalCluster, local_cluster])
def test_a_lost_worker_is_reported_at_once_by_clusters_of_the_runner_only(kind: Any) -> None:
    options = TidepoolTaskRunner(cluster_class=kind).cluster_kwargs
    assert options["scheduler_kwargs"] == {"allowed_failures": 0}
    assert options["worker_class"] is ReportingNanny
    given = {"scheduler_kwargs": {"allowed_failures": 5}, "processes": False}
    options = TidepoolTaskRunner(cluster_class=kind, cluster_kwargs=given).cluster_kwargs
    assert options["scheduler_kwargs"] == {"allowed_failures": 5}
    assert "worker_class" not in options
    assert TidepoolTaskRunner(cluster_class=cluster).cluster_kwargs == {}


@pytest.mark.parametrize(
    ("given", "preloaded"),
    [
        ({}, ([], [])),
        ({"preload": "a.py"}, (["a.py"], [])),
        ({"preload": ["a.py"], "preload_argv": ["--for", "a"]}, (["a.py"], ["--for", "a"])),
        ({"preload": ["a.py"], "preload_argv": [["--for", "a"]]}, (["a.py"], [["--for", "a"], []])),
    ],
)
def test_what_else_a_worker_preloads_stays(given: dict[str, Any], preloaded: Any, tmp_path: Path) -> None:
    async def built() -> tuple[Any, Any]:
        nanny = ReportingNanny("tcp://127.0.0.1:1", local_directory=str(tmp_path), **given)
        return nanny.preload, nanny.preload_argv

    modules, arguments = asyncio.run(built())
    assert modules == [*preloaded[0], "tidepool.compute.clusters.preload.local_worker"]
    assert arguments == preloaded[1]


class ClosedClient:
    """A Dask client whose scheduler went away while nothing was on its way."""

    status = "running"
    scheduler = SimpleNamespace(address="tcp://127.0.0.1:1", identity=None)
    loop = None

    def sync(self, *_args: Any, **_options: Any) -> None:
        raise OSError("the connection is closed")

    def subscribe_topic(self, _topic: str, _handler: Any) -> None:
        """Nothing is heard."""

    def unsubscribe_topic(self, _topic: str) -> None:
        """Nothing is heard."""

    def map(self, *_args: Any, **_options: Any) -> None:
        raise ClosedClientError("the client is closed")


def test_what_cannot_be_sent_is_not_waited_for() -> None:
    recorder: Any = SimpleNamespace(record=list, record_unsent=bool)
    client: Any = ClosedClient()
    tracker = Tracker(client, None, recorder, logging.getLogger("tidepool.test"), back_pressure=True)
    submission = Submission(nothing, ["call"], ["context"], b"", {}, [])
    with pytest.raises(ClosedClientError):
        tracker.submit([TidepoolFuture(uuid4(), submission, tracker.changed)])
    tracker.complete()
    client.status = "closed"
    with pytest.raises(WorkerLostError, match=r"connection to the Dask scheduler at tcp://127\.0\.0\.1:1 was lost"):
        tracker.submit([TidepoolFuture(uuid4(), submission, tracker.changed)])
    tracker.stop("over", 5)


@pytest.mark.parametrize("refusals", [0, 3, 4])
def test_a_scheduler_that_accepts_no_connection_is_asked_again(monkeypatch: pytest.MonkeyPatch, refusals: int) -> None:
    """Ten clusters starting on two cores: a connection took longer than Dask's 30 s, and the task failed."""
    left = iter(range(refusals))

    def sync(_loop: Any, function: Any, **arguments: Any) -> Any:
        if next(left, None) is not None:
            raise OSError("Timed out trying to connect")
        return function, arguments

    worker = SimpleNamespace(loop=None, scheduler=SimpleNamespace(get_metadata="get"))
    monkeypatch.setattr(entry, "get_worker", lambda: worker)
    monkeypatch.setattr(entry, "sync", sync)
    if refusals < 4:
        assert entry.ask_scheduler("get_metadata", keys=["a"]) == ("get", {"keys": ["a"]})
    else:
        with pytest.raises(OSError, match="Timed out"):
            entry.ask_scheduler("get_metadata", keys=["a"])


def test_an_outcome_without_data_is_small() -> None:
    state = Completed(data=b"x" * 100_000, message="done")
    kept = Outcome.of(state).without_data()
    assert len(kept.header) + len(kept.data) < 1000
    assert (kept.state().id, kept.state().message, kept.state().timestamp) == (state.id, "done", state.timestamp)


def test_a_workers_log_lines_are_printed_as_they_are() -> None:
    """In a process of its own: it changes the handlers of all loggers."""
    script = """
import prefect.main
from prefect.logging import get_logger
from tidepool.compute.run_log import print_plainly
print_plainly()
get_logger("test").warning("one [bold]line[/bold] :smile: " + 50 * "long ")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.endswith(f"| WARNING | prefect.test - one [bold]line[/bold] :smile: {50 * 'long '}\n")


def test_a_wait_for_a_call_ends_without_prefects_exception() -> None:
    """Once in CI it came half a minute late, and the task run was still Retrying."""
    hung = threading.Event()
    engine = _SyncEngine.__new__(_SyncEngine)
    engine.task = cast("Any", SimpleNamespace(fn=hung.wait))
    engine.parameters = {}
    try:
        for _ in range(2):  # waits for the call, then for the one before it
            with pytest.raises(TaskRunTimeoutError, match=r"after 0\.1 second"):
                engine._call_in_time(0.1)
    finally:
        hung.set()


def test_a_hung_call_does_not_stop_a_traced_process() -> None:
    """As under a debugger or coverage: on CPython 3.11 the process stood still until the call returned."""
    script = """
import sys, threading, time
from types import SimpleNamespace
from prefect.task_engine import TaskRunTimeoutError
from tidepool.compute.worker.engine import _SyncEngine

threading.settrace(lambda *_: None)
sys.settrace(lambda *_: None)
engine = _SyncEngine.__new__(_SyncEngine)
engine.task, engine.parameters = SimpleNamespace(fn=lambda: time.sleep(60)), {}
try:
    engine._call_in_time(0.1)
except TaskRunTimeoutError as error:
    print(error)
other = threading.Thread(target=lambda: print("another thread goes on"))
other.start()
other.join(20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=40)
    assert done.stdout == "Scope timed out after 0.1 second(s).\nanother thread goes on\n"
