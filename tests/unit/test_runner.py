"""The task runner's parts that need no cluster."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import cloudpickle
import dask.config
import distributed
import pytest
from distributed.client import ClosedClientError
from prefect import allow_failure, task
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.assets import Asset, materialize
from prefect.client.schemas.objects import TaskRunResult
from prefect.context import FlowRunContext
from prefect.serializers import PickleSerializer
from prefect.states import Completed, Failed
from prefect.utilities.annotations import opaque, quote

from tidepool.compute.batches import BatchOutcome, _Batches, _delay
from tidepool.compute.clusters import local
from tidepool.compute.runner.completion import before_completed
from tidepool.compute.runner.futures import Outcome, Submission, TidepoolFuture
from tidepool.compute.runner.limits import (
    ArgumentRefusedError,
    ResultRefusedError,
    pickle_argument,
    refuse_arguments,
    refuse_result,
)
from tidepool.compute.runner.task_runner import TidepoolTaskRunner, _assets, _own_scheduler
from tidepool.compute.runner.tracker import Tracker
from tidepool.compute.runner.worker_loss import Exits, ReportingNanny, WorkerLostError, exit_in_words
from tidepool.settings import settings

if TYPE_CHECKING:
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
    assert TidepoolTaskRunner(cluster=given).duplicate()._cluster is given


def test_a_runner_travels_by_its_settings() -> None:
    runner = TidepoolTaskRunner(address="tcp://host:8786", start_early=True)
    copy = cloudpickle.loads(cloudpickle.dumps(runner))
    assert copy == runner
    assert copy.start_early


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (7, "exit code 7"), (-9, "killed by SIGKILL (137)"), (-15, "killed by SIGTERM (143)")],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert exit_in_words(code) == words


def test_the_cluster_may_know_why_a_worker_ended() -> None:
    class Pods:
        def worker_exit(self, address: str) -> str | None:
            return "out of memory (137)" if address == "tcp://a:1" else None

    assert Exits().why("tcp://a:1", Pods()) == "out of memory (137)"
    assert Exits().why("tcp://b:1", Pods()) is None
    assert Exits().why("tcp://a:1", None, seconds=0) is None


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


def test_annotations_travel_as_what_they_are() -> None:
    arguments = [quote([1, 2]), opaque({"a": 1}), allow_failure(3)]
    assert cloudpickle.loads(pickle_argument(arguments)) == arguments


class Client:
    """Takes proposals of states."""

    def __init__(self) -> None:
        self.proposed: list[str] = []

    def set_flow_run_state(self, _flow_run_id: Any, state: Any, force: bool = False) -> str:  # noqa: FBT001, FBT002
        self.proposed.append(state.type.value + ("!" if force else ""))
        return "accepted"


def test_completed_is_proposed_after_the_check_only() -> None:
    client: Any = Client()
    mine, other = uuid4(), uuid4()

    def refuse() -> None:
        raise ValueError("not yet")

    remove = before_completed(client, mine, refuse)
    with pytest.raises(ValueError, match="not yet"):
        client.set_flow_run_state(mine, Completed())
    assert client.set_flow_run_state(mine, Failed(), force=True) == "accepted"
    assert client.set_flow_run_state(other, Completed()) == "accepted"
    remove()
    assert client.set_flow_run_state(mine, Completed()) == "accepted"
    assert client.proposed == ["FAILED!", "COMPLETED", "COMPLETED"]


def _completed(result: object) -> Outcome:
    made = ResultRecordMetadata(storage_key=uuid4().hex, serializer=PickleSerializer())
    state: Any = Completed(data=ResultRecord(metadata=made, result=result))
    state.state_details.task_run_id = uuid4()
    return Outcome.of(state)


def test_a_state_is_kept_as_what_differs_from_another_one() -> None:
    """Ten thousand whole ones were a tenth of the driver's memory."""
    first, second = _completed(1), _completed("two")
    packed = second.packed(like=first.pickled)
    assert len(packed.pickled) < len(second.pickled) / 4
    assert packed.state() == second.state()
    assert packed.state().data.result == "two"
    assert packed.packed(like=second.pickled) is packed
    assert cloudpickle.loads(cloudpickle.dumps(packed)).state() == second.state(), "it goes to task runs that need it"


def test_a_large_result_is_kept_as_it_is() -> None:
    outcome = _completed("x" * 10_000)
    assert outcome.packed(like=_completed(1).pickled) is outcome
    assert not outcome.is_small, "each state that is packed like it would carry it"


class _Unreadable:
    def __init__(self) -> None:
        self.room = "x" * 10_000

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.room,)


def test_a_large_result_is_not_read_to_do_without_it() -> None:
    """One that cannot be read crashed the task runs whose states came together with it."""
    outcome = _completed(_Unreadable())
    small = outcome.small().state()
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
        assert _assets(nothing, uuid4(), {"item": set()}) is None
        assert list(noted.values()) == [{asset}, {asset}]


def test_threads_that_create_clusters_at_the_same_time_leave_no_settings_behind() -> None:
    """Of two, the first to leave took them from the second, which then put back what it had found: these, for good."""
    name = "distributed.scheduler.allowed-failures"
    before = dask.config.get(name)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(_own_scheduler)
        second.enter_context(_own_scheduler)
        assert dask.config.get(name) == 0
        first.close()
        assert dask.config.get(name) == 0
    assert dask.config.get(name) == before != 0


@task
def nothing(item: int) -> int:
    return item


def _measured(*runs: tuple[float, float, str], items: int) -> int:
    batches = _Batches(nothing, list(range(items)), {}, [], None)
    batches._seen = [BatchOutcome([0], begun, ended, worker) for begun, ended, worker in runs]
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


def test_items_wait_for_their_retry_as_task_runs_do() -> None:
    after_each = nothing.with_options(retry_delay_seconds=[1, 5])
    assert [_delay(after_each, tries) for tries in (1, 2, 3)] == [1, 5, 5]
    assert _delay(nothing, 1) == 0
    jittered = nothing.with_options(retry_delay_seconds=10, retry_jitter_factor=0.5)
    delays = {_delay(jittered, 1) for _ in range(20)}
    assert len(delays) > 1
    assert all(5 <= delay <= 15 for delay in delays)


def test_a_local_cluster_has_patience_with_a_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 15 s Dask took the nanny of a worker that was still coming back, and the flow run waited for nobody."""
    seen: list[str] = []

    def read(_cluster: Any, _op: str, _address: str) -> None:
        seen.append(dask.config.get("distributed.deploy.lost-worker-timeout"))

    monkeypatch.setattr(distributed.LocalCluster, "_update_worker_status", read)
    local.PatientCluster._update_worker_status(object.__new__(local.PatientCluster), "remove", "tcp://127.0.0.1:1")
    assert seen == [f"{settings().compute.no_worker_seconds}s"]
    assert TidepoolTaskRunner().resolved_cluster_class is local.PatientCluster


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
    scheduler = SimpleNamespace(address="tcp://127.0.0.1:1")

    def subscribe_topic(self, _topic: str, _handler: Any) -> None:
        """Nothing is heard."""

    def unsubscribe_topic(self, _topic: str) -> None:
        """Nothing is heard."""

    def map(self, *_args: Any, **_options: Any) -> None:
        raise ClosedClientError("the client is closed")


def test_what_cannot_be_sent_is_not_waited_for() -> None:
    recorder: Any = SimpleNamespace(record=list, record_unsent=bool)
    client: Any = ClosedClient()
    tracker = Tracker(client, None, recorder, logging.getLogger("tidepool.test"), paced=True)
    submission = Submission(nothing, ["call"], ["context"], b"", {}, [])
    with pytest.raises(ClosedClientError):
        tracker.submit([TidepoolFuture(uuid4(), submission, tracker)])
    tracker.complete()
    client.status = "closed"
    with pytest.raises(WorkerLostError, match=r"connection to the Dask scheduler at tcp://127\.0\.0\.1:1 was lost"):
        tracker.submit([TidepoolFuture(uuid4(), submission, tracker)])
    tracker.stop("over", 5)


def test_what_is_kept_of_a_large_result_is_small() -> None:
    state = Completed(data=b"x" * 100_000, message="done")
    kept = Outcome.of(state).small()
    assert len(kept.pickled) < 4096
    assert (kept.state().id, kept.state().message, kept.state().timestamp) == (state.id, "done", state.timestamp)
