"""What mapped tasks do, as tests of each runner: `tidepool` (ours, on Dask), `threads` and the stock one on Dask.

A difference is a failure here, unless the test names it: `differs(runner="why")` must fail there. It must pass with the
others. What would never end is not run there: `hangs(runner="why")`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import distributed
import pytest
from prefect import allow_failure, flow, get_client, get_run_logger, runtime, tags, task, unmapped
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import INPUTS
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.context import FlowRunContext
from prefect.exceptions import MappingLengthMismatch, MappingMissingIterable
from prefect.futures import as_completed
from prefect.futures import wait as wait_for_futures
from prefect.transactions import transaction
from prefect.utilities.annotations import opaque, quote
from prefect_dask import DaskTaskRunner

from tests.polling import until
from tidepool.compute.clusters.local import set_dask_defaults
from tidepool.compute.limits import ArgumentRefusedError, refuse_hooks
from tidepool.compute.runner.task_runner import TidepoolTaskRunner
from tidepool.compute.runner.worker_loss import ReportingNanny
from tidepool.compute.threads import ThreadsTaskRunner
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prefect.client.schemas.objects import TaskRun

# On a loaded machine the first task of a cluster takes minutes: its workers import Prefect.
pytestmark = pytest.mark.usefixtures("prefect_server")

Run = "Callable[..., Any]"


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    """One cluster for all: what is tested is the runner's, not the cluster's start.

    Its nannies bring back a worker that a test of the stock runner has ended: the next test needs both.
    """
    set_dask_defaults(300)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", worker_class=ReportingNanny
    ) as running:
        yield running


@pytest.fixture(params=[pytest.param("stock", marks=pytest.mark.stock), "tidepool", "threads"])
def runner(request: pytest.FixtureRequest) -> Any:
    for name, runs in (("differs", True), ("hangs", False)):
        marker = request.node.get_closest_marker(name)
        if marker and request.param in marker.kwargs:
            request.applymarker(pytest.mark.xfail(reason=marker.kwargs[request.param], strict=True, run=runs))
    if request.param == "threads":
        return ThreadsTaskRunner(max_workers=2)
    cluster = request.getfixturevalue("cluster")
    cluster.wait_for_workers(2, timeout=120)
    kind = DaskTaskRunner if request.param == "stock" else TidepoolTaskRunner
    return kind(address=cluster.scheduler_address)


class Server:
    """What the server has recorded; asks again until it is there."""

    def __init__(self, flow_run_id: Any) -> None:
        self._of = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        self._id = flow_run_id

    def task_runs(self, count: int, settled: Callable[[TaskRun], bool] | None = None) -> list[TaskRun]:
        def read() -> list[TaskRun]:
            with get_client(sync_client=True) as client:
                found = client.read_task_runs(flow_run_filter=self._of)
            return [run for run in found if run.state and (settled(run) if settled else run.state.is_final())]

        return until(read, lambda runs: len(runs) == count)

    def logs(self, text: str) -> list[Any]:
        def read() -> list[Any]:
            with get_client(sync_client=True) as client:
                found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[self._id])))
            return [log for log in found if text in log.message]

        return until(read, bool)

    def artifacts(self) -> list[Any]:
        def read() -> list[Any]:
            with get_client(sync_client=True) as client:
                return client.read_artifacts(
                    artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[self._id]))
                )

        return until(read, bool)


def run(runner: Any, body: Callable[..., Any], **options: Any) -> tuple[Any, Server]:
    """Runs `body` as a flow on that runner; its final state, and what the server knows."""
    state = flow(task_runner=runner, name="behaviour", **options)(body)(return_state=True)
    if asyncio.iscoroutine(state):
        state = asyncio.run(state)
    return state, Server(state.state_details.flow_run_id)


@task
def double(number: int) -> int:
    return 2 * number


@task
def fail(number: int = 0) -> int:
    raise ValueError(f"no {number}")


@task
def add(first: int, second: int = 10) -> int:
    return first + second


# --- results --------------------------------------------------------------------------------------


def test_map_gives_results_in_the_order_of_the_items(runner: Any) -> None:
    state, _ = run(runner, lambda: double.map(range(10)).result())
    assert state.result() == [2 * number for number in range(10)]


def test_submit_gives_the_result(runner: Any) -> None:
    state, _ = run(runner, lambda: double.submit(4).result())
    assert state.result() == 8


def test_defaults_and_scalars_are_the_same_for_each_item(runner: Any) -> None:
    state, _ = run(runner, lambda: add.map([1, 2]).result() + add.map([1, 2], 5).result())
    assert state.result() == [11, 12, 6, 7]


def test_unmapped_is_passed_whole(runner: Any) -> None:
    @task
    def total(number: int, others: list[int]) -> int:
        return number + sum(others)

    state, _ = run(runner, lambda: total.map([1, 2], unmapped([10, 20])).result())
    assert state.result() == [31, 32]


@pytest.mark.differs(threads="the task runs of a process share the value")
def test_an_unmapped_value_that_a_task_changes_is_whole_for_the_next(runner: Any) -> None:
    @task
    def append(number: int, others: list[int]) -> int:
        others.append(number)
        return len(others)

    state, _ = run(runner, lambda: append.map(range(6), unmapped([0])).result())
    assert state.result() == [2] * 6


def test_keyword_arguments_are_mapped(runner: Any) -> None:
    @task
    def named(**values: int) -> dict[str, int]:
        return values

    state, _ = run(runner, lambda: named.map(a=[1, 2], b=[3, 4]).result())
    assert state.result() == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]


def test_iterables_of_different_length_are_refused(runner: Any) -> None:
    state, _ = run(runner, lambda: add.map([1, 2], [1, 2, 3]))
    with pytest.raises(MappingLengthMismatch):
        state.result()


def test_a_map_over_nothing_iterable_is_refused(runner: Any) -> None:
    state, _ = run(runner, lambda: add.map(1, 2))
    with pytest.raises(MappingMissingIterable):
        state.result()


def test_a_map_over_no_items_gives_none(runner: Any) -> None:
    state, _ = run(runner, lambda: double.map([]).result())
    assert state.result() == []


def test_what_a_task_closes_over_is_as_it_was_when_submitted(runner: Any) -> None:
    def body() -> list[int]:
        factor = 1

        @task
        def times(number: int) -> int:
            return factor * number

        first = times.submit(5).result()
        factor = 3
        return [first, times.submit(5).result()]

    state, _ = run(runner, body)
    assert state.result() == [5, 15]


def test_async_tasks(runner: Any) -> None:
    @task
    async def later(number: int) -> int:
        await asyncio.sleep(0.01)
        return number + 1

    state, _ = run(runner, lambda: later.map([1, 2]).result())
    assert state.result() == [2, 3]


def test_async_flows(runner: Any) -> None:
    async def body() -> list[int]:
        return double.map([1, 2]).result()

    state, _ = run(runner, body)
    assert asyncio.run(state.aresult()) == [2, 4]


@pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send logs:UserWarning")
def test_no_flow_is_needed(runner: Any) -> None:
    with runner.duplicate() as started:
        assert started.submit(double, {"number": 3}).result() == 6


def test_a_runner_that_has_not_begun_refuses(runner: Any) -> None:
    with pytest.raises(RuntimeError, match="started"):
        runner.duplicate().submit(double, {"number": 3})


@pytest.mark.differs(threads="there is nothing to connect to")
def test_a_flow_that_submits_nothing_connects_to_nothing(runner: Any) -> None:
    def body() -> bool:
        double(1)
        return FlowRunContext.get().task_runner._client is None

    state, _ = run(runner, body)
    assert state.result()


# --- failures -------------------------------------------------------------------------------------


def test_a_failed_task_raises_its_own_error(runner: Any) -> None:
    state, server = run(runner, lambda: fail.submit(3).result())
    assert state.is_failed()
    with pytest.raises(ValueError, match="no 3"):
        state.result()
    assert server.task_runs(1)[0].state.is_failed()


def test_a_failed_task_may_be_looked_at(runner: Any) -> None:
    state, _ = run(runner, lambda: repr(fail.submit(3).result(raise_on_failure=False)))
    assert state.result() == "ValueError('no 3')"


def test_a_failure_that_nobody_collects_does_not_fail_the_flow(runner: Any) -> None:
    def body() -> str:
        fail.submit(1).wait()
        return "done"

    state, _ = run(runner, body)
    assert state.is_completed()


def test_returned_futures_decide(runner: Any) -> None:
    state, _ = run(runner, lambda: [double.submit(1), fail.submit(1)])
    assert state.is_failed()
    assert "1/2 states failed" in state.message


def test_retries(runner: Any, tmp_path: Path) -> None:
    marker = tmp_path / "tried"

    @task(retries=2)
    def at_the_second_try() -> str:
        if not marker.exists():
            marker.touch()
            raise ValueError("not yet")
        return "done"

    state, server = run(runner, lambda: at_the_second_try.submit().result())
    assert state.result() == "done"
    assert server.task_runs(1)[0].run_count == 2


def test_a_retry_condition_is_asked(runner: Any, tmp_path: Path) -> None:
    tries = tmp_path / "tries"

    def not_for_value_errors(_task: Any, _run: Any, state: Any) -> bool:
        try:
            state.result()
        except ValueError:
            return False
        return True

    @task(retries=3, retry_condition_fn=not_for_value_errors)
    def once() -> None:
        with tries.open("a") as file:
            file.write("x")
        raise ValueError("never again")

    run(runner, lambda: once.submit().wait())
    assert tries.read_text() == "x"


@pytest.mark.differs(threads="the exit is the flow function's, too")
def test_a_task_that_exits_is_crashed_and_its_worker_lives(runner: Any) -> None:
    @task
    def leave() -> None:
        raise SystemExit(3)

    def body() -> str:
        leave.submit().wait()
        return "done"

    _, server = run(runner, body)
    assert server.task_runs(1)[0].state.is_crashed()


@pytest.mark.differs(stock="Dask cannot read what the worker returns, and the future stays Pending in the flow's eyes")
def test_an_error_that_cannot_be_pickled_back_fails_the_task(runner: Any) -> None:
    class TwoArgumentsError(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} {two}")

    @task
    def raise_it() -> None:
        raise TwoArgumentsError("a", "b")

    def body() -> Any:
        future = raise_it.submit()
        future.wait()
        return future.state.type.value

    state, server = run(runner, body)
    assert server.task_runs(1)[0].state.is_failed()
    assert state.result() == "FAILED"


def test_a_task_that_takes_too_long_fails(runner: Any) -> None:
    @task(timeout_seconds=0.2)
    async def slow() -> None:
        await asyncio.sleep(30)

    _, server = run(runner, lambda: slow.submit().wait())
    assert server.task_runs(1)[0].state.name == "TimedOut"


def test_a_flow_runs_again_with_a_runner_of_its_own(runner: Any) -> None:
    tries: list[int] = []

    def body() -> int:
        tries.append(1)
        if len(tries) == 1:
            return fail.submit(1).result()
        return double.submit(2).result()

    state, _ = run(runner, body, retries=1)
    assert state.result() == 4


@pytest.mark.hangs(
    stock="the function is waited for, however long its call takes",
    threads="the function is waited for, however long its call takes; as Prefect's log reports",
)
def test_a_call_that_cannot_be_interrupted_ends_its_task_run_in_time(runner: Any, tmp_path: Path) -> None:
    """A mapped `sleep(40)` with a timeout of 3 s ended after 46 s."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    begun = tmp_path / "begun"

    @task(timeout_seconds=1, retries=1)
    def read() -> bytes:
        with begun.open("a") as file:
            file.write("x")
        return pipe.read_bytes()  # waits for a writer

    def body() -> str:
        future = read.submit()
        try:
            future.wait(timeout=30)
            return f"{future.state.name} {begun.read_text()}"
        finally:
            for _ in range(2):  # one for each open: a writer that comes and goes
                with suppress(OSError):
                    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    state, _ = run(runner, body)
    # The function does not run twice at a time.
    assert state.result() == "TimedOut x"


def test_a_task_with_a_timeout_that_is_not_reached_is_like_any_other(runner: Any) -> None:
    @task(timeout_seconds=60)
    def quick(number: int) -> tuple[int, str]:
        return double.submit(number).result(), str(runtime.task_run.name)

    @task(timeout_seconds=60)
    def fails() -> None:
        raise ValueError("as it is")

    state, _ = run(runner, lambda: [*quick.submit(3).result(), repr(fails.submit().result(raise_on_failure=False))])
    number, name, error = state.result()
    assert (number, name.split("-")[0], error) == (6, "quick", "ValueError('as it is')")


@pytest.mark.differs(
    stock="the worker commits each task run by itself: the hook silently does not run",
    tidepool="refused, in a sentence that says what to do: see the next test",
)
def test_a_transaction_that_fails_rolls_its_task_runs_back(runner: Any, tmp_path: Path) -> None:
    marker = tmp_path / "undone"

    @task
    def write() -> int:
        return 1

    @write.on_rollback
    def undo(_transaction: Any) -> None:
        marker.touch()

    def body() -> None:
        with transaction():
            write.submit().wait()
            raise ValueError("the rest fails")

    run(runner, body)
    assert marker.exists()


def test_hooks_of_a_transaction_that_would_not_run_are_refused() -> None:
    @task
    def write() -> int:
        return 1

    @write.on_rollback
    def undo(_transaction: Any) -> None:
        """Never called."""

    sentence = "task `write` has on_rollback or on_commit hooks and is submitted inside a transaction"
    with transaction(), pytest.raises(UsageError, match=sentence):
        refuse_hooks(write)
    refuse_hooks(write)
    with transaction():
        refuse_hooks(double)


@pytest.mark.differs(
    stock="the error is that of pickle, which names no argument", threads="it is the same process: nothing is pickled"
)
def test_an_argument_that_cannot_be_pickled_is_named(runner: Any) -> None:
    @task
    def take(number: int, options: Any) -> None:
        """Never reached."""

    def body() -> list[str]:
        texts = []
        for call in (
            lambda: take.submit(1, {"a": [1, threading.Lock()]}),
            lambda: take.map([1], unmapped({"a": [1, threading.Lock()]})),
        ):
            with pytest.raises(ArgumentRefusedError) as raised:
                call()
            texts.append(str(raised.value))
        return texts

    state, _ = run(runner, body)
    first, second = state.result()
    assert first == second
    assert first.startswith(
        "argument `options` of task `take` cannot be pickled at ['a'][1]: cannot pickle '_thread.lock"
    )


@pytest.mark.differs(threads="it is the same process: nothing is pickled")
def test_a_task_that_refers_to_what_cannot_be_pickled_is_refused(runner: Any) -> None:
    lock = threading.Lock()

    @task
    def take(number: int) -> bool:
        return lock.locked() and number > 0

    state, _ = run(runner, lambda: take.map([1, 2]).wait())
    with pytest.raises((TypeError, ArgumentRefusedError), match=r"cannot pickle '_thread\.lock'"):
        state.result()


def test_a_task_may_use_a_process_pool(runner: Any) -> None:
    """`daemonic processes are not allowed to have children`."""

    @task
    def compute(number: int) -> int:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(abs, -number).result()

    state, _ = run(runner, lambda: compute.map([1]).result())
    assert state.result() == [1]


# --- what depends on what -------------------------------------------------------------------------


def test_a_future_is_an_argument(runner: Any) -> None:
    state, server = run(runner, lambda: double.submit(double.submit(3)).result())
    assert state.result() == 12
    inputs = [run.task_inputs.get("number") for run in server.task_runs(2)]
    assert sorted(len(one or []) for one in inputs) == [0, 1]


def test_futures_in_lists_and_dicts_are_arguments(runner: Any) -> None:
    @task
    def total(values: dict[str, list[int]]) -> int:
        return sum(values["all"])

    state, _ = run(runner, lambda: total.submit({"all": [double.submit(1), double.submit(2), 5]}).result())
    assert state.result() == 11


def test_futures_are_mapped_over(runner: Any) -> None:
    state, _ = run(runner, lambda: double.map(double.map([1, 2])).result())
    assert state.result() == [4, 8]


def test_a_future_of_a_list_is_mapped_over(runner: Any) -> None:
    @task
    def numbers() -> list[int]:
        return [1, 2, 3]

    state, _ = run(runner, lambda: double.map(numbers.submit()).result())
    assert state.result() == [2, 4, 6]


def test_a_generator_may_submit_the_task_that_is_mapped_over_it(runner: Any) -> None:
    state, _ = run(runner, lambda: double.map(double.submit(number) for number in [1, 2]).result())
    assert state.result() == [4, 8]


def test_a_future_that_is_done_is_an_argument(runner: Any) -> None:
    def body() -> int:
        first = double.submit(3)
        first.wait()
        return double.submit(first).result()

    state, _ = run(runner, body)
    assert state.result() == 12


def test_wait_for_waits(runner: Any, tmp_path: Path) -> None:
    marker = tmp_path / "first"

    @task
    def first() -> None:
        time.sleep(0.5)
        marker.touch()

    @task
    def second() -> bool:
        return marker.exists()

    state, _ = run(runner, lambda: second.submit(wait_for=[first.submit()]).result())
    assert state.result()


def test_what_waits_for_a_failure_does_not_run(runner: Any) -> None:
    def body() -> str:
        future = double.submit(1, wait_for=[fail.submit()])
        future.wait()
        return future.state.name

    state, server = run(runner, body)
    assert state.result() == "NotReady"
    names = {
        run.name.rsplit("-", 1)[0]: run.state.name
        for run in server.task_runs(2, lambda run: run.state.name != "Running")
    }
    assert names == {"fail": "Failed", "double": "NotReady"}


def test_what_gets_a_failure_as_argument_does_not_run(runner: Any) -> None:
    def body() -> str:
        future = double.submit(fail.submit())
        future.wait()
        return future.state.name

    state, _ = run(runner, body)
    assert state.result() == "NotReady"


@pytest.mark.differs(stock="Dask takes the annotation for a plain tuple, so the task never runs")
def test_a_failure_may_be_allowed(runner: Any) -> None:
    @task
    def look(value: Any) -> str:
        return repr(value)

    state, _ = run(runner, lambda: look.submit(allow_failure(fail.submit(7))).result())
    assert state.result() == "ValueError('no 7')"


@pytest.mark.differs(stock="an annotation is a tuple, and comes back from pickle as a tuple in a tuple")
def test_quoted_and_opaque_arguments_arrive_as_they_are(runner: Any) -> None:
    @task
    def look(value: Any) -> Any:
        return value

    state, _ = run(runner, lambda: [look.submit(quote([1, 2])).result(), look.submit(opaque([3])).result()])
    assert state.result() == [[1, 2], [3]]


def test_a_task_submits_tasks(runner: Any) -> None:
    @task
    def outer() -> int:
        return double.submit(5).result()

    state, server = run(runner, lambda: outer.submit().result())
    assert state.result() == 10
    assert len(server.task_runs(2)) == 2


def test_a_subflow_has_a_runner_of_its_own(runner: Any) -> None:
    @flow(task_runner=runner)
    def inner() -> list[int]:
        return double.map([1, 2]).result()

    state, _ = run(runner, lambda: double.map(inner()).result())
    assert state.result() == [4, 8]


@pytest.mark.hangs(stock="the task runs that wait hold all threads of the workers")
@pytest.mark.parametrize("way", ["result", "wait", "as_completed"])
def test_task_runs_that_wait_for_their_own_do_not_hold_all_threads(runner: Any, way: str) -> None:
    @task
    def parent(number: int) -> int:
        futures = double.map([number, number + 1])
        if way == "wait":
            futures.wait()
        if way == "as_completed":
            return sum(future.result() for future in as_completed(list(futures)))
        return sum(futures.result())

    state, server = run(runner, lambda: parent.map(range(5)).result())
    assert state.result() == [4 * number + 2 for number in range(5)]
    assert len(server.task_runs(15)) == 15


@pytest.mark.hangs(stock="the task runs that wait hold all threads of the workers")
def test_task_runs_may_wait_for_those_that_wait(runner: Any) -> None:
    @task
    def inner(number: int) -> int:
        return double.submit(number).result()

    @task
    def outer(number: int) -> int:
        return sum(inner.map([number, 1]).result())

    state, _ = run(runner, lambda: outer.map(range(4)).result())
    assert state.result() == [2 * number + 2 for number in range(4)]


@pytest.mark.hangs(stock="the task runs that wait hold all threads of the workers")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_task_runs_call_flows_that_map(runner: Any, kind: str) -> None:
    @flow(task_runner=runner)
    def inner(number: int) -> str:
        double.map([number])  # nothing is awaited: the flow run is not over before
        return "over"

    @flow(task_runner=runner)
    async def inner_later(number: int) -> str:
        double.map([number])
        return "over"

    @task
    def parent(number: int) -> str:
        return asyncio.run(inner_later(number)) if kind == "async" else inner(number)

    state, _ = run(runner, lambda: parent.map(range(3)).result())
    assert state.result() == ["over"] * 3


@pytest.mark.hangs(stock="the task runs that wait hold all threads of the workers")
def test_no_more_task_runs_than_threads_go_on_after_a_wait(runner: Any, tmp_path: Path) -> None:
    """What waited takes its place again before it goes on: else all of a map would compute at once."""

    @task
    def parent(number: int) -> int:
        double.submit(number).wait()
        (tmp_path / str(number)).touch()
        working, deadline = 0, time.monotonic() + 4
        # Time enough for others to come as far as this.
        while working <= 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            working = max(working, len(list(tmp_path.iterdir())))
        (tmp_path / str(number)).unlink()
        return working

    state, _ = run(runner, lambda: parent.map(range(5)).result())
    assert max(state.result()) <= 2


# --- futures --------------------------------------------------------------------------------------


def test_a_result_may_be_late(runner: Any) -> None:
    @task
    def slow() -> int:
        time.sleep(2)
        return 1

    def body() -> int:
        future = slow.submit()
        with pytest.raises(TimeoutError):
            future.result(timeout=0.05)
        future.wait(timeout=0.05)
        return future.result()

    state, _ = run(runner, body)
    assert state.result() == 1


def test_futures_as_they_complete(runner: Any) -> None:
    def body() -> list[int]:
        futures = double.map([1, 2, 3])
        seen = sorted(future.result() for future in as_completed(list(futures)))
        assert not wait_for_futures(list(futures), timeout=30).not_done
        return seen

    state, _ = run(runner, body)
    assert state.result() == [2, 4, 6]


def test_a_done_callback_is_called(runner: Any) -> None:
    def body() -> list[int]:
        called: list[int] = []
        future = double.submit(1)
        future.add_done_callback(lambda done: called.append(done.result()))
        return until(lambda: called, seconds=30)

    state, _ = run(runner, body)
    assert state.result() == [2]


@pytest.mark.differs(threads="a thread's future has no key")
def test_a_future_keeps_its_dask_future(runner: Any) -> None:
    """Once the task run was final, it was None."""

    def body() -> list[Any]:
        future = double.submit(1)
        before = future.wrapped_future.key
        future.wait()
        after = future.wrapped_future
        assert isinstance(after, distributed.Future)
        assert (after.key, after.status, after.done(), after.cancelled()) == (before, "finished", True, False)
        assert after.result().is_completed()
        return [after.key]

    state, _ = run(runner, body)
    assert state.result()[0].startswith("double-")


def test_a_future_knows_its_task_run(runner: Any) -> None:
    def body() -> str:
        future = double.submit(1)
        future.wait()
        assert future.state.is_completed()
        return str(future.task_run_id)

    state, server = run(runner, body)
    assert [str(run.id) for run in server.task_runs(1)] == [state.result()]


# --- what the server knows ------------------------------------------------------------------------


def test_each_item_is_a_task_run_with_its_name_and_tags(runner: Any) -> None:
    @task(task_run_name="item-{number}", tags={"mine"})
    def named(number: int) -> int:
        return number

    def body() -> None:
        with tags("more"):
            named.map([1, 2]).wait()

    _, server = run(runner, body)
    runs = server.task_runs(2)
    assert {run.name for run in runs} == {"item-1", "item-2"}
    assert all(set(run.tags) == {"mine", "more"} and run.state.is_completed() for run in runs)


def test_names_without_a_template_are_the_task_and_a_key(runner: Any) -> None:
    _, server = run(runner, lambda: double.map([1, 2]).wait())
    assert all(run.name.startswith("double-") and run.task_key.startswith("double-") for run in server.task_runs(2))


def test_a_task_knows_its_run(runner: Any) -> None:
    @task
    def who(number: int) -> tuple[str, str, Any]:  # noqa: ARG001 - shown as a parameter
        return str(runtime.task_run.id), str(runtime.flow_run.id), runtime.task_run.parameters

    state, server = run(runner, lambda: who.submit(5).result())
    assert state.result() == (str(server.task_runs(1)[0].id), str(state.state_details.flow_run_id), {"number": 5})


def test_logs_arrive_with_their_task_run(runner: Any) -> None:
    @task(log_prints=True)
    def talk(number: int) -> None:
        get_run_logger().info("logged %d", number)
        print(f"printed {number}")  # noqa: T201 - what is tested

    _, server = run(runner, lambda: talk.submit(7).wait())
    of = server.task_runs(1)[0].id
    assert [log.task_run_id for log in server.logs("logged 7")] == [of]
    assert [log.task_run_id for log in server.logs("printed 7")] == [of]


def test_an_artifact_belongs_to_its_task_run(runner: Any) -> None:
    @task
    def write() -> None:
        create_markdown_artifact("hello", key="runner-behaviour")

    _, server = run(runner, lambda: write.submit().wait())
    assert [artifact.task_run_id for artifact in server.artifacts()] == [server.task_runs(1)[0].id]


def test_hooks_are_called(runner: Any, tmp_path: Path) -> None:
    marker = tmp_path / "hook"

    def note(_task: Any, _run: Any, state: Any) -> None:
        with marker.open("a") as file:
            file.write(f"{state.name} ")

    @task(on_completion=[note], on_running=[note])
    def hooked() -> None:
        pass

    run(runner, lambda: hooked.submit().wait())
    assert marker.read_text() == "Running Completed "


def test_a_cached_result_is_not_computed_again(runner: Any, tmp_path: Path) -> None:
    marker = tmp_path / "computed"

    @task(cache_policy=INPUTS, persist_result=True)
    def once(path: str) -> int:
        with marker.open("a") as file:
            file.write("x")
        return len(path)

    def body() -> list[int]:
        return [once.submit(str(tmp_path)).result(), once.submit(str(tmp_path)).result()]

    _, server = run(runner, body)
    assert marker.read_text() == "x"
    assert sorted(run.state.name for run in server.task_runs(2)) == ["Cached", "Completed"]


def test_a_concurrency_limit_of_a_tag_holds(runner: Any, tmp_path: Path) -> None:
    tag = f"one-at-a-time-{tmp_path.name}-{id(runner)}"
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=tag, concurrency_limit=1)

    @task(tags={tag})
    def alone(_number: int) -> bool:
        busy = tmp_path / "busy"
        try:
            busy.touch(exist_ok=False)
        except FileExistsError:
            return False
        time.sleep(0.3)
        busy.unlink()
        return True

    state, _ = run(runner, lambda: alone.map(range(3)).result())
    assert state.result() == [True] * 3


# --- what only ours does --------------------------------------------------------------------------


@pytest.mark.differs(stock="the Dask future is forgotten with Prefect's, so the task may never run")
def test_what_was_submitted_runs_although_nobody_collects_it(runner: Any, tmp_path: Path) -> None:
    @task
    def leave_a_trace(number: int) -> None:
        time.sleep(0.3)
        (tmp_path / str(number)).touch()

    def body() -> str:
        for number in range(4):
            leave_a_trace.submit(number)
        return "done"

    state, server = run(runner, body)
    assert state.is_completed()
    assert len(list(tmp_path.iterdir())) == 4
    assert len(server.task_runs(4)) == 4
