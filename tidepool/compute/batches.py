"""Many items per task run: a task run costs about 5 ms of a worker and 25 ms of the server, an item may cost less.

`map_batched(task, items)` runs the task's function for every item, many of them in one task run. Each item keeps its
own result, error and retries.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import cloudpickle
from prefect import Task, unmapped
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.futures import as_completed
from prefect.states import Failed
from prefect.utilities.math import clamped_poisson_interval

from tidepool.compute.limits import (
    TOGETHER_BYTES,
    readable_error,
    refuse_result,
    refuse_unreadable,
)
from tidepool.compute.progress import ItemProgress
from tidepool.compute.run_log import run_log
from tidepool.errors import FOR_GOOD, TidepoolError, UsageError
from tidepool.report import run_record, show_progress
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture

R = TypeVar("R")

# Items that `auto` measures, one per task run, before it decides.
_PROBES = 12
# Overhead of a task run where the probes do not show it, because there are as many workers as probes.
_USUAL_OVERHEAD_SECONDS = 0.02
# The promise is 5 % of the total; the begin and the end, when not all workers are busy, take their part of it.
_OVERHEAD_SHARE = 0.01
# The time that a lost worker may cost; batches of each worker, so that all end at about the same time.
_LONGEST_BATCH_SECONDS = 60.0
_BATCHES_PER_WORKER = 4
_LARGEST_BATCH = 10_000

_PROGRESS_SECONDS = 2.0
_SHOWN_FAILURES = 10
_SHOWN_ITEM = 80


@dataclass(frozen=True)
class FailedItem:
    """An item without a result.

    Attributes:
        index: Its position among the items, from 0.
        item: The item as text.
        error: The exception of its last try, or `WorkerLostError`.
        tries: How often it was tried.
    """

    index: int
    item: str
    error: BaseException
    tries: int = 1

    def __str__(self) -> str:
        after = f" after {self.tries} tries" if self.tries > 1 else ""
        return f"item {self.index} ({self.item}){after}: {type(self.error).__name__}: {self.error}"


class BatchError(TidepoolError):
    """Some items failed; the text lists them.

    Attributes:
        failed: The items that failed, in order.
        results: The result of every item, in order, or its `FailedItem`.
    """

    def __init__(self, task: str, failed: list[FailedItem], results: list[Any]) -> None:
        super().__init__(f"{len(failed)} of {len(results)} items of task `{task}` failed: {_listed(failed)}")
        self.failed = failed
        self.results = results


def map_batched(
    task: Task[..., R],
    items: Iterable[Any],
    *,
    batch_size: int | Literal["auto"] = "auto",
    raise_on_failure: bool = True,
    progress: bool = True,
    wait_for: Iterable[PrefectFuture[Any]] | None = None,
    **fixed: Any,
) -> list[R]:
    """Run a task for many items, many items per task run, and wait for all of them.

    The task's `retries`, `retry_delay_seconds`, `retry_jitter_factor` and `retry_condition_fn` apply to each item,
    its tags and timeout to each task run; an item with an `InputError` or a `UsageError` is not tried again. A batch
    whose worker is lost is retried; then it is split, until the item that kills its worker is alone. An item whose
    result or error cannot travel fails alone; results that are too large to travel together come in more task runs. No
    other item runs twice.

    Args:
        task: The task; its first parameter takes the item.
        items: The items.
        batch_size: Items per task run; `auto` measures the first items and keeps overhead below 5 %.
        raise_on_failure: Whether failed items raise `BatchError`, or are `FailedItem`s among the results.
        progress: Whether to show progress as an artifact of the flow run.
        wait_for: Futures that have to be completed before.
        fixed: The task's other parameters, the same for each item.

    Returns:
        The results, in the order of the items.

    Raises:
        BatchError: some items failed; it lists them and carries the results of the others.
        UsageError: `batch_size` is neither `auto` nor a number from 1.
        ArgumentRefusedError: items or parameters are too large to travel.
    """
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"batch_size of task `{task.name}` is {batch_size!r}; it takes 'auto' or a number from 1")
    mapped = _Batches(task, list(items), fixed, list(wait_for or []), _Progress(task.name) if progress else None)
    if batch_size == "auto":
        mapped.run(range(min(_PROBES, len(mapped.items))), 1)
        batch_size = mapped.measured_size()
    mapped.run(range(len(mapped.items) - mapped.left(), len(mapped.items)), batch_size)
    failed = _failed(mapped.results)
    if failed and raise_on_failure:
        raise BatchError(task.name, failed, mapped.results)
    return cast("list[R]", mapped.results)


# --- in the flow ----------------------------------------------------------------------------------


class BatchTask(Task[..., Any]):
    """A Prefect task that runs another task's function for each item of a list.

    Args:
        item_task: The other task.
        items_per_run: Maximum items of a task run; its limit on arguments and results grows with them.
    """

    def __init__(self, item_task: Task[..., Any], items_per_run: int) -> None:
        super().__init__(
            fn=_run_batch,
            name=item_task.name,
            task_run_name=f"{item_task.name} {{first}}+{{count}}",
            tags=item_task.tags,
            timeout_seconds=item_task.timeout_seconds,
            log_prints=item_task.log_prints,
            # A cache by inputs would be a cache by batches.
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        self.item_task = item_task
        self.items_per_run = items_per_run


@dataclass
class _Batches:
    """The items of one `map_batched`, and their results so far."""

    task: Task[..., Any]
    items: list[Any]
    fixed: dict[str, Any]
    wait_for: list[PrefectFuture[Any]]
    progress: _Progress | None

    def __post_init__(self) -> None:
        self.results: list[Any] = [None] * len(self.items)
        self.log = ItemProgress(run_log(), lambda: None)
        self.log.submit(len(self.items))
        self._done = 0
        self._seen: list[BatchOutcome] = []

    def left(self) -> int:
        """Return how many items have not been run."""
        return len(self.items) - self._done

    def run(self, indices: Sequence[int], size: int) -> None:
        """Run the items at these indices, `size` per task run; split lost batches and run them again."""
        todo = [indices[start : start + size] for start in range(0, len(indices), size)]
        while todo:
            batch_task = BatchTask(self.task, max(len(batch) for batch in todo))
            futures = batch_task.map(
                [[self.items[index] for index in batch] for batch in todo],
                [batch[0] for batch in todo],
                [len(batch) for batch in todo],
                fixed=unmapped(self.fixed),
                wait_for=self.wait_for,
            )
            batches, todo = dict(zip(futures, todo, strict=True)), []
            for future in as_completed(list(futures)):
                todo += self._take(batches[future], future.result(raise_on_failure=False))
        if self.progress:
            self.progress.show(self._done, len(self.items), last=not self.left())
        if not self.left():
            self.log.finish()

    def _take(self, batch: Sequence[int], outcome: Any) -> list[Sequence[int]]:
        """Take the results of a batch; return the batches to run again."""
        again: list[Sequence[int]] = []
        if isinstance(outcome, BatchOutcome):
            self._seen.append(outcome)
            ran = len(outcome.values)
            each = (outcome.ended - outcome.begun) / max(ran, 1)
            for at, (index, value) in enumerate(zip(batch[:ran], outcome.values, strict=True)):
                self.results[index] = value
                self._note(index, value, outcome.begun + at * each, each, outcome.worker)
            batch, rest = batch[:ran], batch[ran:]
            # As many as had room this time.
            again = [rest[start : start + ran] for start in range(0, len(rest), ran)]
        elif len(batch) > 1:
            # The item at fault shows when they are apart.
            size = math.isqrt(len(batch))
            return [batch[start : start + size] for start in range(0, len(batch), size)]
        else:
            failed = self.results[batch[0]] = FailedItem(batch[0], _shown(self.items[batch[0]]), outcome)
            self._note(batch[0], failed, 0.0, 0.0, "")
        self._done += len(batch)
        if self.progress:
            self.progress.show(self._done, len(self.items))
        self.log.show()
        return again

    def _note(self, index: int, value: Any, begun: float, seconds: float, worker: str) -> None:
        """Note an item's end for log and report; how long each one took is not known, only the batch."""
        failed = value if isinstance(value, FailedItem) else None
        error = f"{type(failed.error).__name__}: {failed.error}".splitlines()[0] if failed else ""
        tries = failed.tries if failed else 1
        name = f"{self.task.name} {index} ({_shown(self.items[index])})" if failed else f"{self.task.name} {index}"
        self.log.end(run_record.Item(name, begun, seconds, worker, tries, error))

    def measured_size(self) -> int:
        """Return the batch size that keeps overhead below its share, from the items that ran one by one."""
        if not self._seen:
            return 1
        by_worker: dict[str, list[BatchOutcome]] = {}
        for outcome in sorted(self._seen, key=lambda one: one.begun):
            by_worker.setdefault(outcome.worker, []).append(outcome)
        # The time between two task runs on the same worker is all overhead.
        gaps = [after.begun - before.ended for runs in by_worker.values() for before, after in itertools.pairwise(runs)]
        overhead = statistics.median(gaps) if gaps else _USUAL_OVERHEAD_SECONDS
        each = max(statistics.median(one.ended - one.begun for one in self._seen), 1e-6)
        wanted = math.ceil(overhead * (1 / _OVERHEAD_SHARE - 1) / each)
        workers = len(by_worker)
        balanced = self.left() // (_BATCHES_PER_WORKER * workers)
        fitting = TOGETHER_BYTES // max(1, *(outcome.bytes for outcome in self._seen))
        size = max(1, min(wanted, balanced, fitting, int(_LONGEST_BATCH_SECONDS / each), _LARGEST_BATCH))
        # The same number for each worker, so that all end at about the same time.
        rounds = math.ceil(self.left() / (size * workers))
        return max(1, math.ceil(self.left() / (rounds * workers)) if rounds else 1)


class _Progress:
    """A progress artifact of the flow run."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._artifact = show_progress(create_progress_artifact, progress=0.0, description=f"{task}: items done")
        self._shown = time.monotonic()

    def show(self, done: int, total: int, *, last: bool = False) -> None:
        """Show how many items are done, at most every two seconds."""
        if self._artifact and (last or time.monotonic() - self._shown > _PROGRESS_SECONDS):
            self._shown = time.monotonic()
            show_progress(
                update_progress_artifact,
                artifact_id=self._artifact,
                progress=100.0 * done / max(total, 1),
                description=f"{self._task}: {done} of {total} items done",
            )


# --- in the task run ------------------------------------------------------------------------------


@dataclass
class BatchOutcome:
    """The results of a batch.

    Attributes:
        values: The result of each item, or its `FailedItem`; of the first items only, where more would be too large to
            travel together.
        bytes: Size of the values, pickled one by one.
        begun: Start time, in seconds since the epoch.
        ended: End time, in seconds since the epoch.
        worker: The node, process and thread that ran it.
    """

    values: list[Any] = field(default_factory=list)
    bytes: int = 0
    begun: float = field(default_factory=time.time)
    ended: float = 0.0
    worker: str = field(default_factory=lambda: f"{os.uname().nodename}/{os.getpid()}/{threading.get_ident()}")


def _run_batch(items: list[Any], first: int, count: int, fixed: dict[str, Any]) -> BatchOutcome | State[Any]:  # noqa: ARG001 - `count` is for the task run's name
    context = TaskRunContext.get()
    assert context is not None  # noqa: S101 - Prefect runs it
    task, limit = cast("BatchTask", context.task).item_task, settings().compute.argument_limit_bytes
    outcome = BatchOutcome()
    values, sizes, todo = outcome.values, list[int](), list[int]()
    total = largest = 0
    with asyncio.Runner() as loop:
        for at, item in enumerate(items):
            # The next one may be as large as the largest so far. The first one runs anyway.
            if values and total + largest > TOGETHER_BYTES:
                break
            value, size = _value(task, item, first + at, 1, fixed, limit, loop)
            if isinstance(value, FailedItem) and _may_retry(task, context, value, loop):
                todo.append(at)
                size = limit  # room for what it may become
            values.append(value)
            sizes.append(size)
            total, largest = total + size, max(largest, size)
        for tries in range(2, task.retries + 2):
            if not todo:
                break
            # Once for all that failed, not once for each.
            time.sleep(_delay(task, tries - 1))
            for at in todo:
                values[at], sizes[at] = _value(task, items[at], first + at, tries, fixed, limit, loop)
            failed = [(at, values[at]) for at in todo]
            todo = [at for at, each in failed if isinstance(each, FailedItem) and _may_retry(task, context, each, loop)]
    # What cannot travel costs its item, and not the results of the others.
    values[:] = [
        replace(each, error=readable_error(each.error, limit)) if isinstance(each, FailedItem) else each
        for each in values
    ]
    outcome.bytes = sum(sizes)
    outcome.ended = time.time()
    if failures := _failed(values):
        return Failed(message=f"{len(failures)} of {len(values)} items failed: {_listed(failures)}", data=outcome)
    return outcome


def _value(
    task: Task[..., Any],
    item: Any,
    index: int,
    tries: int,
    fixed: dict[str, Any],
    limit: int,
    loop: asyncio.Runner,
) -> tuple[Any, int]:
    """Return the result of an item, or its `FailedItem`, and how many bytes travel."""
    try:
        value = task.fn(item, **fixed)
        if inspect.iscoroutine(value):
            value = loop.run(value)
        pickled = refuse_result(task.name, value, limit)
        refuse_unreadable(task.name, pickled)
    except Exception as error:  # noqa: BLE001 - any exception of the author's function is the item's outcome
        failed = FailedItem(index, _shown(item), error, tries)
        return failed, len(cloudpickle.dumps(replace(failed, error=readable_error(error, limit))))
    return value, len(pickled)


def _may_retry(task: Task[..., Any], context: TaskRunContext, failed: FailedItem, loop: asyncio.Runner) -> bool:
    if failed.tries > task.retries or isinstance(failed.error, FOR_GOOD):
        return False  # as where each item is a task run
    if task.retry_condition_fn is None:
        return True
    try:
        state: State[Any] = Failed(data=failed.error, message=repr(failed.error))
        answer = task.retry_condition_fn(task, context.task_run, state)
        return bool(loop.run(answer) if inspect.iscoroutine(answer) else answer)
    except Exception:  # noqa: BLE001 - an author's function; as in Prefect's engine, the item's own error stands
        run_log().exception("The retry condition of task `%s` failed; the item is not retried", task.name)
        return False


def _delay(task: Task[..., Any], tries: int) -> float:
    delays: Any = task.retry_delay_seconds or 0
    delay = float(delays[min(tries, len(delays)) - 1] if isinstance(delays, Sequence) else delays)
    if task.retry_jitter_factor and delay > 0:
        return float(clamped_poisson_interval(delay, clamping_factor=task.retry_jitter_factor))
    return delay


def _shown(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= _SHOWN_ITEM else text[:_SHOWN_ITEM] + "…"


def _failed(values: Iterable[Any]) -> list[FailedItem]:
    return [each for each in values if isinstance(each, FailedItem)]


def _listed(failed: list[FailedItem]) -> str:
    more = f"; and {len(failed) - _SHOWN_FAILURES} more" if len(failed) > _SHOWN_FAILURES else ""
    return "; ".join(str(each) for each in failed[:_SHOWN_FAILURES]) + more
