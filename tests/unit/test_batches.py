"""Batches without a server: what becomes of a lost one, and when what failed is tried again."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prefect import Task, task
from prefect.context import TaskRunContext

from tidepool.compute import batches
from tidepool.compute.batches import BatchOutcome, BatchTask, FailedItem, _Batches, _run_batch
from tidepool.compute.runner.worker_loss import WorkerLostError

if TYPE_CHECKING:
    import pytest


@task
def double(number: int) -> int:
    return 2 * number


def run_batch(item_task: Task[..., Any], items: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[float]]:
    """Run a batch as its task run does; return the outcome, and how long it slept each time."""
    slept: list[float] = []
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(batches, "time", SimpleNamespace(sleep=sleep, time=lambda: clock.now))
    with TaskRunContext.model_construct(task=BatchTask(item_task, len(items)), task_run=None):
        return _run_batch(items, 10, len(items), {}), slept


def test_a_lost_batch_is_split_into_as_many_parts_as_each_has_items() -> None:
    """Apart at once, a batch of 10,000 items would be 10,000 task runs."""
    made = _Batches(double, list(range(100)), {}, [], None)
    lost = WorkerLostError("lost")
    again = made._take(range(100), lost)
    assert [list(part) for part in again] == [list(range(start, start + 10)) for start in range(0, 100, 10)]
    assert [len(part) for part in made._take(range(4, 7), lost)] == [1, 1, 1]
    assert made.left() == 100
    assert made._take([3], lost) == []
    assert made.results[3] == FailedItem(3, "3", lost)
    assert made._take(range(10, 12), BatchOutcome([20, 22])) == []
    assert (made.results[10:12], made.left()) == ([20, 22], 97)
    part = made._take(range(20, 25), BatchOutcome([40, 42]))
    assert [list(each) for each in part] == [[22, 23], [24]], "what had no room, as many at a time as had"
    assert (made.results[20:23], made.left()) == ([40, 42, None], 95)


def test_there_is_a_delay_between_the_tries_of_items_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    @task(retries=3, retry_delay_seconds=[5, 20])
    def flaky(number: int) -> int:
        tries.append(number)
        if number and tries.count(number) <= number:
            raise ValueError("not yet")
        return number

    outcome, slept = run_batch(flaky, [0, 1, 2], monkeypatch)
    assert (outcome.values, slept) == ([0, 1, 2], [5, 20])
    assert tries == [0, 1, 2, 1, 2, 2], "only what failed, and once for all"
    assert outcome.ended == 125


def test_a_batch_with_failed_items_is_failed_and_has_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    @task(retries=1)
    def inverse(number: int) -> float:
        return 1 / number

    state, slept = run_batch(inverse, [1, 0], monkeypatch)
    assert state.is_failed()
    expected = "1 of 2 items failed: item 11 (0) after 2 tries: ZeroDivisionError: division by zero"
    assert state.message == expected
    assert (state.data.values[0], state.data.values[1].tries, slept) == (1, 2, [0])


def test_results_that_are_too_large_together_end_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task run's own result could not travel: the other items go with another task run."""

    @task
    def large(_number: int) -> bytes:
        return bytes(300)

    monkeypatch.setattr(batches, "TOGETHER_BYTES", 1000)
    outcome, _ = run_batch(large, list(range(10)), monkeypatch)
    assert outcome.values == [bytes(300)] * 3
    assert 900 < outcome.bytes <= 1000
    monkeypatch.setattr(batches, "TOGETHER_BYTES", 100)
    outcome, _ = run_batch(large, list(range(10)), monkeypatch)
    assert outcome.values == [bytes(300)], "one is tried in any case"


def test_one_item_per_task_run_is_a_size() -> None:
    assert batches.map_batched(double, [], batch_size=1, progress=False) == []


def test_a_retry_condition_that_fails_retries_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_task: Any, _run: Any, state: Any) -> bool:
        return bool(state.no_such_attribute)

    @task(retries=2, retry_condition_fn=broken)
    def inverse(number: int) -> float:
        return 1 / number

    monkeypatch.setattr(batches, "run_log", lambda: logging.getLogger("tidepool.test"))
    state, slept = run_batch(inverse, [0, 2], monkeypatch)
    assert ([state.data.values[0].tries, state.data.values[1]], slept) == ([1, 0.5], [])
    assert "The retry condition of task `inverse` failed; the item is not retried" in caplog.text


def test_an_error_lists_ten_items_and_shortens_each() -> None:
    error = ValueError("no")
    failed = [FailedItem(at, batches._shown("x" * 200), error) for at in range(12)]
    text = str(batches.BatchError("t", failed, [*failed, 1]))
    assert text.startswith("12 of 13 items of task `t` failed: item 0 ('" + "x" * 79 + "…): ValueError: no; item 1 (")
    assert text.endswith("; item 9 ('" + "x" * 79 + "…): ValueError: no; and 2 more")
    assert batches._shown("x" * 78) == repr("x" * 78), "80 characters are whole"
    assert "more" not in str(batches.BatchError("t", failed[:10], failed))


def test_progress_is_shown_every_two_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(batches, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown: list[Any] = []

    def show(_function: Any, **values: Any) -> str:
        shown.append((values.get("artifact_id"), values["progress"], values["description"]))
        return "id"

    monkeypatch.setattr(batches, "show_progress", show)
    progress = batches._Progress("t")
    clock.now += 1.9
    progress.show(1, 4)
    clock.now += 0.2
    progress.show(2, 4)
    clock.now += 1
    progress.show(3, 4)
    progress.show(4, 4, last=True)
    assert shown == [
        (None, 0.0, "t: items done"),
        ("id", 50.0, "t: 2 of 4 items done"),
        ("id", 100.0, "t: 4 of 4 items done"),
    ]
