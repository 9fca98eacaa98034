"""The future of a mapped task: settled once, by the tracker, with a final state that is read only when asked for."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

from distributed import Future
from prefect.results import ResultRecord  # type: ignore[attr-defined] # public, and not in its __all__

from tidepool.upstream.prefect import raise_if_flow_run_suspension_requested
from tidepool.upstream.prefect_dask import DaskFuture

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture

    from tidepool.upstream.distributed import WorkerSlot

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
        item: The arguments of its own, for people: to read them from the payload may be what kills its workers.
        losses: How often its worker was lost while running it.
        started: Whether the current attempt is known to have begun; attempt 0 does not report it.
    """

    task: Task[..., Any]
    call: list[str]
    context: list[str]
    payload: bytes
    dependencies: dict[str, set[Any]]
    upstreams: list[TidepoolFuture[Any]]
    item: str = ""
    losses: int = 0
    started: bool = False


class Changes(threading.Condition):
    """Notified when futures are settled.

    Args:
        slot: In a Dask worker the place of the task run that waits: others have it meanwhile, so that task runs which
            wait for their own never hold all of the cluster's threads.
    """

    def __init__(self, slot: WorkerSlot | None = None) -> None:
        super().__init__()
        self._slot = slot

    def expect(self) -> None:
        """Let others have the place: something that is not settled will be waited for."""
        if self._slot:
            self._slot.leave()

    def until(self, settled: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until something is settled, for at most that many seconds."""
        with self:
            if not settled():
                self.expect()
                self.wait_for(settled, timeout)
        if self._slot:
            self._slot.take_back()


class EndedFuture(Future[Any]):
    """Dask's future of a task run that is final, without Dask, which keeps no data of it.

    Args:
        of: The future of the task run.
    """

    def __init__(self, of: TidepoolFuture[Any]) -> None:
        super().__init__(of.key)
        self._of = of

    @property
    def status(self) -> Literal["finished", "error"]:
        """`finished`, or `error` if no worker has reported the final state."""
        return "error" if self._of.crashed else "finished"

    def done(self) -> bool:
        """Return True."""
        return True

    def cancelled(self) -> bool:
        """Return False."""
        return False

    def result(self, timeout: float | None = None) -> State[Any]:  # noqa: ARG002 - Dask's
        """Return the final state, as Dask's future of the stock runner does."""
        return self._of.state

    def release(self) -> None:
        """Do nothing: Dask holds nothing of it."""


class TidepoolFuture(DaskFuture[R]):
    """The future of a task run on Dask, settled with a final state whatever happens to its worker or scheduler.

    Args:
        task_run_id: The task run.
        submission: How to send it; dropped once it is settled.
        changed: The tracker's, notified when futures are settled.

    Attributes:
        attempt: How often it was sent again.
        sent: Dask's future of the current attempt; None before it is sent and once it is settled.
        crashed: Whether the tracker settled it, without an answer of a worker.
        is_batch: Whether it runs many items, each of which is counted by itself.
        seen: Whether the author has asked for its result: then it no longer fails the flow run by itself.
    """

    sent: Any = None

    def __init__(self, task_run_id: UUID, submission: Submission, changed: Changes) -> None:
        super().__init__(task_run_id, cast("Any", None))
        self.submission: Submission | None = submission
        self.task_name = submission.task.name
        self.is_batch = hasattr(submission.task, "items_per_run")
        self.attempt = 0
        self.crashed = False
        self.seen = False
        self.callbacks: tuple[Callable[[PrefectFuture[Any]], None], ...] = ()
        self.changed = changed

    @property
    def key(self) -> str:
        """Key of the current attempt in Dask; the stock runner's key begins with the task's name, too."""
        return f"{self.task_name}-{self.task_run_id}" + (f"-{self.attempt}" if self.attempt else "")

    @property
    def wrapped_future(self) -> Any:
        """Dask's future of the last attempt; of a task run that is final an `EndedFuture`: Dask has let it go."""
        sent, outcome = self.sent, self.outcome  # in this order: the first is dropped when the second is there
        return sent if outcome is None else EndedFuture(self)

    @property
    def state(self) -> State[R]:
        """The final state, or the server's until there is one."""
        return super().state if self.outcome is None else self.outcome.state()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the task run has its final state, for at most that many seconds."""
        self.changed.until(lambda: self.outcome is not None, timeout)
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
                # `as_completed` waits for callbacks.
                self.changed.expect()
                return
        fn(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the future of task run {self.task_run_id} is inside an object that Prefect does not look into; "
            "pass futures as arguments, or in lists, tuples, sets, dicts, dataclasses or pydantic models"
        )
