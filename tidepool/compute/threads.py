"""The task runner of the provider `threads`: Prefect's thread pool, for tasks that submit tasks too."""

from __future__ import annotations

import contextvars
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self, cast

from prefect.task_runners import ThreadPoolTaskRunner

from tidepool.compute.progress import ItemProgress, sketched
from tidepool.compute.run_log import log_for_people, mapped, run_log
from tidepool.report.reason import plain
from tidepool.report.run_record import Item

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from prefect import Task
    from prefect.client.schemas.objects import RunInput
    from prefect.futures import PrefectConcurrentFuture, PrefectFuture

# How many task runs the current code is inside of.
_depth: ContextVar[int] = ContextVar("depth", default=0)


class ThreadsTaskRunner(ThreadPoolTaskRunner[Any]):
    """Prefect's thread pool, and for what its task runs submit more of them, one for each level.

    In one pool, task runs that wait for their own may hold all of its threads, and nothing goes on.
    """

    def __init__(self, max_workers: int | None = None) -> None:
        super().__init__(max_workers)
        self._size = max_workers
        self._levels: list[ThreadPoolTaskRunner[Any]] = []
        self._entering = threading.Lock()
        self._progress: ItemProgress | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        log_for_people()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if self._progress:
            self._progress.finish()

    def submit(
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> PrefectConcurrentFuture[Any]:
        """Run a task in a thread; the arguments are those of Prefect's runner."""
        depth = _depth.get()
        pool: Any = self._level(depth) if depth and self._started else super()
        # The task run gets a copy of this context.
        token, also = _depth.set(depth + 1), mapped.set(True)
        try:
            future = cast("PrefectConcurrentFuture[Any]", pool.submit(task, parameters, wait_for, dependencies))
        finally:
            _depth.reset(token)
            mapped.reset(also)
        if not depth:
            self._follow(task, parameters, future)
        return future

    def _follow(self, task: Task[..., Any], parameters: dict[str, Any], future: PrefectConcurrentFuture[Any]) -> None:
        """Have the end of a task run noted on the run's log and record; those inside of task runs are not items."""
        with self._entering:
            if self._progress is None:
                log = run_log()
                log.info("Mapped tasks run in up to %s threads of this process", self._size or "any number of")
                self._progress = ItemProgress(log, lambda: None)
        if hasattr(task, "items_per_run"):
            return  # a batch counts its items itself
        self._progress.submit(1)
        # Without the run's context, a line of its log would go to the server of the settings at the process's start.
        context, begun = contextvars.copy_context(), time.time()
        future.add_done_callback(lambda each: context.run(self._ended, task.name, parameters, begun, each))

    def _ended(self, task: str, parameters: dict[str, Any], submitted: float, future: Any) -> None:
        try:
            # Not the state of Prefect's future, which it asks the server for.
            state = future.wrapped_future.result()
            error = "" if state.is_completed() else plain(state.message) or state.name or "no result"
        except BaseException as ended:  # noqa: BLE001 - cancelled, or an error of the engine; the future keeps it
            error = f"{type(ended).__name__}: {ended}"
        if self._progress:
            name = f"{task}: {sketched(parameters)}"
            self._progress.end(Item(name, submitted, time.time() - submitted, "threads", 1, error))
            self._progress.show()

    def _level(self, depth: int) -> ThreadPoolTaskRunner[Any]:
        with self._entering:
            while len(self._levels) < depth:
                level: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(self._size)
                self._levels.append(level.__enter__())
            return self._levels[depth - 1]

    def cancel_all(self) -> None:
        """Cancel what runs, and end all threads; the context manager's end calls it too."""
        super().cancel_all()
        for level in self._levels:
            level.cancel_all()
