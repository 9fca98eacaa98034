"""Many items per task run: results, errors and retries of each item."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import distributed
import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import FlowRunContext

from tidepool.compute.batches import BatchError, FailedItem, map_batched
from tidepool.compute.clusters.local import set_dask_defaults
from tidepool.compute.limits import ResultRefusedError
from tidepool.compute.runner.task_runner import TidepoolTaskRunner
from tidepool.compute.runner.worker_loss import ReportingNanny
from tidepool.errors import InputError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# On a loaded machine the first task of a cluster takes minutes: its workers import Prefect.
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def runner() -> Iterator[TidepoolTaskRunner]:
    set_dask_defaults(300)
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        worker_class=ReportingNanny,
        scheduler_kwargs={"allowed_failures": 0},
    ) as cluster:
        yield TidepoolTaskRunner(address=cluster.scheduler_address)


def run(runner: TidepoolTaskRunner, body: Callable[[], Any]) -> Any:
    return flow(task_runner=runner, name="batches")(body)()


@task
def double(number: int, plus: int = 0) -> int:
    return 2 * number + plus


@pytest.mark.parametrize("size", [7, 1000, "auto"])
def test_results_are_in_the_order_of_the_items(runner: TidepoolTaskRunner, size: Any) -> None:
    results = run(runner, lambda: map_batched(double, range(100), batch_size=size, plus=1))
    assert results == [2 * number + 1 for number in range(100)]


def test_no_items_give_no_results(runner: TidepoolTaskRunner) -> None:
    assert run(runner, lambda: map_batched(double, [])) == []


def test_one_failure_lists_the_failed_items(runner: TidepoolTaskRunner) -> None:
    @task
    def odd_only(number: int) -> int:
        if number % 4 == 0:
            raise ValueError(f"{number} is not good")
        return number

    with pytest.raises(BatchError) as raised:
        run(runner, lambda: map_batched(odd_only, range(10), batch_size=3))
    error = raised.value
    assert str(error) == (
        "3 of 10 items of task `odd_only` failed: item 0 (0): ValueError: 0 is not good; "
        "item 4 (4): ValueError: 4 is not good; item 8 (8): ValueError: 8 is not good"
    )
    assert [one.index for one in error.failed] == [0, 4, 8]
    assert error.results[:4] == [error.failed[0], 1, 2, 3]


def test_failures_may_stand_among_the_results(runner: TidepoolTaskRunner) -> None:
    @task
    def inverse(number: int) -> float:
        return 1 / number

    results = run(runner, lambda: map_batched(inverse, [1, 0, 2], batch_size=2, raise_on_failure=False))
    assert (results[0], results[2]) == (1, 0.5)
    assert isinstance(results[1], FailedItem)
    assert isinstance(results[1].error, ZeroDivisionError)


def test_retries_are_those_of_an_item(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    @task(retries=2, retry_delay_seconds=0.01)
    def flaky(number: int) -> int:
        with (tmp_path / str(number)).open("a") as file:
            file.write("x")
        if number == 3 and len((tmp_path / "3").read_text()) < 3:
            raise ValueError("not yet")
        return number

    assert run(runner, lambda: map_batched(flaky, range(5), batch_size=5)) == [0, 1, 2, 3, 4]
    assert [len((tmp_path / str(number)).read_text()) for number in range(5)] == [1, 1, 1, 3, 1]


def test_a_retry_condition_decides_for_each_item(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    def only_os_errors(_task: Any, _run: Any, state: Any) -> bool:
        return isinstance(state.data, OSError)

    @task(retries=2, retry_condition_fn=only_os_errors)
    def fails(kind: str) -> None:
        with (tmp_path / kind).open("a") as file:
            file.write("x")
        raise {"value": ValueError, "os": OSError}[kind]("no")

    results = run(runner, lambda: map_batched(fails, ["value", "os"], batch_size=2, raise_on_failure=False))
    assert [one.tries for one in results] == [1, 3]


def test_a_retry_condition_that_fails_costs_its_item_alone(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    def broken(_task: Any, _run: Any, state: Any) -> bool:
        return bool(state.no_such_attribute)

    @task(retries=2, retry_condition_fn=broken)
    def inverse(number: int) -> float:
        with (tmp_path / str(number)).open("a") as file:
            file.write("x")
        return 1 / number

    results = run(runner, lambda: map_batched(inverse, [1, 0, 2], batch_size=3, raise_on_failure=False))
    assert (results[0], results[2]) == (1, 0.5)
    assert (type(results[1].error), results[1].tries) == (ZeroDivisionError, 1)
    assert [len((tmp_path / str(number)).read_text()) for number in range(3)] == [1, 1, 1]


def test_a_result_that_is_too_large_is_not_tried_again(runner: TidepoolTaskRunner) -> None:
    @task(retries=2)
    def large(size: int) -> bytes:
        return bytes(size)

    results = run(runner, lambda: map_batched(large, [1, 1_000_000], batch_size=2, raise_on_failure=False))
    assert results[0] == b"\0"
    assert (type(results[1].error), results[1].tries) == (ResultRefusedError, 1)


def test_an_item_that_another_try_does_not_change_is_not_tried_again(runner: TidepoolTaskRunner) -> None:
    @task(retries=2)
    def fails(kind: str) -> None:
        raise {"input": InputError, "storage": StorageError}[kind]("no")

    results = run(runner, lambda: map_batched(fails, ["input", "storage"], batch_size=2, raise_on_failure=False))
    assert [one.tries for one in results] == [1, 3]


class TwoArgumentsError(Exception):
    """Can be pickled, and not be read again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class UnreadableResult:
    """Can be pickled, and not be read again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("x",)


def test_an_outcome_that_cannot_travel_costs_its_item_alone(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    """The whole batch was lost, and was run again in smaller ones."""

    @task
    def awkward(kind: str) -> Any:
        with (tmp_path / kind).open("a") as file:
            file.write("x")
        if kind == "error":
            raise TwoArgumentsError("a", "b")
        if kind == "large":
            raise ValueError(b"x" * 1_000_000)
        return {"unreadable": UnreadableResult(), "unpicklable": (each for each in "a")}.get(kind, kind)

    kinds = ["good", "error", "large", "unreadable", "unpicklable", "fine"]
    results = run(runner, lambda: map_batched(awkward, kinds, batch_size=6, raise_on_failure=False))
    assert (results[0], results[-1]) == ("good", "fine")
    assert [len((tmp_path / kind).read_text()) for kind in kinds] == [1] * 6
    texts = [str(each) for each in results[1:-1]]
    assert texts[0].startswith("item 1 ('error'): RuntimeError: TwoArgumentsError: a b (unpicklable: ")
    assert texts[1].startswith("item 2 ('large'): RuntimeError: ValueError: b'xxx")
    assert "x (shortened: 977." in texts[1]
    assert "the result of task `awkward` cannot be read from its pickle: invalid literal" in texts[2]
    assert "the result of task `awkward` cannot be pickled: " in texts[3]


def test_results_that_are_too_large_together_travel_apart(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    @task
    def large(number: int) -> bytes:
        with (tmp_path / str(number)).open("a") as file:
            file.write("x")
        return bytes([number]) * 250_000

    results = run(runner, lambda: map_batched(large, range(40), batch_size=40))
    assert [(each[0], len(each)) for each in results] == [(number, 250_000) for number in range(40)]
    assert [len((tmp_path / str(number)).read_text()) for number in range(40)] == [1] * 40


def test_items_that_fail_at_first_have_room_for_their_results(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    @task(retries=1)
    def second(number: int) -> bytes:
        with (tmp_path / str(number)).open("a") as file:
            file.write("x")
        if len((tmp_path / str(number)).read_text()) == 1:
            raise ValueError("not yet")
        return bytes([number]) * 250_000

    results = run(runner, lambda: map_batched(second, range(40), batch_size=40))
    assert [(each[0], len(each)) for each in results] == [(number, 250_000) for number in range(40)]
    assert [len((tmp_path / str(number)).read_text()) for number in range(40)] == [2] * 40


def test_async_tasks_run_in_batches(runner: TidepoolTaskRunner) -> None:
    @task
    async def later(number: int) -> int:
        await asyncio.sleep(0)
        return number

    assert run(runner, lambda: map_batched(later, range(4), batch_size=2)) == [0, 1, 2, 3]


def test_the_item_that_kills_its_worker_is_found(runner: TidepoolTaskRunner) -> None:
    @task
    def fragile(number: int) -> int:
        if number == 2:
            os._exit(1)
        return number

    results = run(runner, lambda: map_batched(fragile, range(4), batch_size=4, raise_on_failure=False))
    assert (results[:2], results[3]) == ([0, 1], 3)
    assert "worker lost 3 times" in str(results[2])


def test_progress_is_an_artifact_and_failures_are_on_the_server(runner: TidepoolTaskRunner) -> None:
    flow_runs = []

    def body() -> None:
        flow_runs.append(FlowRunContext.get().flow_run.id)
        map_batched(double, range(10), batch_size=5)

    run(runner, body)
    with get_client(sync_client=True) as client:
        of = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=flow_runs))
        artifacts = client.read_artifacts(artifact_filter=of)
    assert [(artifact.type, artifact.data, artifact.description) for artifact in artifacts] == [
        ("progress", 100.0, "double: 10 of 10 items done")
    ]


@pytest.mark.parametrize("size", [0, -1, "big", 1.5])
def test_a_wrong_size_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match=r"batch_size of task `double` is .*; it takes 'auto' or a number from 1"):
        map_batched(double, [1], batch_size=size)
