"""The future of a mapped task: settled once, by the tracker, with a final state that is read only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from prefect.results import ResultRecord  # type: ignore[attr-defined] # public, and not in its __all__

from tidepool.upstream.prefect import raise_if_flow_run_suspension_requested
from tidepool.upstream.prefect_dask import DaskFuture

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture

R = TypeVar("R")


@dataclass
class Submission:
    """Everything needed to send a task run to Dask, and to send it again if its worker is lost.

    Attributes:
        task: The Prefect task.
        call: Metadata path of the pickled `worker.engine.Call` on the scheduler.
        context: Metadata path of the pickled Prefect context.
        payload: The pickled `worker.engine.Payload`.
        dependencies: The task runs that each parameter comes from.
        upstreams: The futures that the payload refers to.
        attempt: How often it was sent again.
        losses: How often its worker was lost while running it.
        started: Whether the current attempt is known to have begun; attempt 0 does not report it.
    """

    task: Task[..., Any]
    call: list[str]
    context: list[str]
    payload: bytes
    dependencies: dict[str, set[Any]]
    upstreams: list[TidepoolFuture[Any]]
    attempt: int = 0
    losses: int = 0
    started: bool = False


class TidepoolFuture(DaskFuture[R]):
    """The future of a task run on Dask, settled with a final state whatever happens to its worker or scheduler.

    Args:
        task_run_id: The task run.
        submission: How to send it; dropped once it is settled.
        changed: The tracker's condition, notified when futures are settled.

    Attributes:
        wrapped_future: Dask's future of the current attempt; None before it is sent and once it is settled.
        crashed: Whether the tracker settled it, without an answer of a worker.
        seen: Whether the author has asked for its result: then it no longer fails the flow run by itself.
    """

    wrapped_future: Any = None

    def __init__(self, task_run_id: UUID, submission: Submission, changed: threading.Condition) -> None:
        super().__init__(task_run_id, cast("Any", None))
        self.submission: Submission | None = submission
        self.crashed = False
        self.seen = False
        self.callbacks: tuple[Callable[[PrefectFuture[Any]], None], ...] = ()
        self.changed = changed

    @property
    def state(self) -> State[R]:
        """The final state, or the server's until there is one."""
        return super().state if self.outcome is None else self.outcome.state()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the task run has its final state, for at most that many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.outcome is not None, timeout)
        raise_if_flow_run_suspension_requested()

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:  # noqa: FBT001, FBT002 - Prefect's
        """Return the task's result.

        Args:
            timeout: Seconds to wait for it.
            raise_on_failure: Whether to raise the exception of a task run that did not complete, or return it.

        Raises:
            TimeoutError: It is not there in time.
            WorkerLostError: The task run lost its worker too often, or the cluster is gone.
        """
        self.wait(timeout)
        if self.outcome is None:
            raise TimeoutError(f"Task run {self.task_run_id} did not complete within {timeout} seconds")
        self.seen = True
        state: Any = self.outcome.state()
        if state.is_completed() and isinstance(state.data, ResultRecord):
            # As Prefect does, without a detour to its event loop: a seventh of the driver's CPU time at thousands.
            return cast("R", state.data.result)
        return cast("R", state.result(raise_on_failure=raise_on_failure, _sync=True))

    def add_done_callback(self, fn: Callable[[PrefectFuture[R]], None]) -> None:
        """Call `fn` with this future when it is settled: at once if it is."""
        with self.changed:
            if self.outcome is None:
                self.callbacks = (*self.callbacks, fn)
                return
        fn(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the future of task run {self.task_run_id} is inside an object that Prefect does not look into; "
            "pass futures as arguments, or in lists, tuples, sets, dicts, dataclasses or pydantic models"
        )
