"""The future of a mapped task: settled once, by the tracker, with a final state that is read when somebody asks."""

from __future__ import annotations

import sys
import zlib
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import cloudpickle
from prefect._flow_run_suspension import raise_if_flow_run_suspension_requested
from prefect._internal.result_records import ResultRecord
from prefect_dask.task_runners import PrefectDaskFuture

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.futures import PrefectFuture

    from tidepool.compute.runner.tracker import Tracker

R = TypeVar("R")

_SMALL_BYTES = 4096


@dataclass
class Submission:
    """What it takes to send a task run to Dask, once more if its worker is lost.

    Attributes:
        task: The Prefect task.
        call: Where the scheduler keeps the pickled `worker.Call`.
        context: Where it keeps the pickled Prefect context.
        payload: The pickled `worker.Payload`.
        dependencies: The task runs that each parameter comes from.
        upstreams: The futures that the payload refers to.
        attempt: How often it was sent again.
        losses: How often its worker was lost while running it.
        started: Whether the current attempt is known to have begun; attempt 0 does not say.
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """A final state as it came from the worker.

    Attributes:
        pickled: The state, pickled: ten thousand objects would fill the driver's memory.
        name: The task run's name; None if no worker ran it.
        start_time: When it began to run, if it did.
        worker: Address of the Dask worker that ran it.
        like: If given, `pickled` is compressed, with this as the dictionary.
        brief: The state without its result, pickled, where the result takes room.
    """

    pickled: bytes
    name: str | None = None
    start_time: datetime | None = None
    worker: str | None = None
    like: bytes | None = None
    brief: bytes | None = None

    @classmethod
    def of(cls, state: State[Any], run: TaskRun | None = None, worker: str | None = None) -> Outcome:
        """The outcome with that state.

        Args:
            state: A final state.
            run: The task run, as the worker knows it that ran it.
            worker: That worker's address.
        """
        pickled, brief = cloudpickle.dumps(state), None
        if len(pickled) > _SMALL_BYTES:
            # Made where the result is: reading it may fail, and takes time.
            without = copy(state)  # not `model_copy`: Prefect's gives a state another id and no time
            without.data = None
            brief = cloudpickle.dumps(without)
        if run is None:
            return cls(pickled, brief=brief)
        return cls(pickled, run.name, run.start_time, worker, brief=brief)

    def state(self) -> State[Any]:
        """The final state."""
        pickled = self.pickled
        if self.like is not None:
            pickled = zlib.decompressobj(zdict=self.like).decompress(pickled)
        return cast("State[Any]", cloudpickle.loads(pickled))

    @property
    def is_small(self) -> bool:
        """Whether it may serve as `like` for others."""
        return self.like is None and len(self.pickled) <= _SMALL_BYTES

    def packed(self, like: bytes | None) -> Outcome:
        """The same in less memory, unless its result is most of it.

        Args:
            like: Another pickled state: nine tenths of a small one are what all have in common. None if there is none.
        """
        if like is None or not self.is_small:
            return self
        packer = zlib.compressobj(level=1, zdict=like)
        packed = packer.compress(self.pickled) + packer.flush()
        return replace(self, pickled=packed, like=like, worker=self.worker and sys.intern(self.worker))

    def small(self) -> Outcome:
        """The same to be kept for a while: without a result that takes room."""
        return self if self.brief is None else replace(self, pickled=self.brief, brief=None)


class TidepoolFuture(PrefectDaskFuture[R]):
    """The future of a task run on Dask.

    It is settled with the task run's final state whatever happens to the worker or the scheduler.

    Args:
        task_run_id: The task run.
        submission: How to send it; dropped once it is settled.
        tracker: Who settles it.
    """

    def __init__(self, task_run_id: UUID, submission: Submission, tracker: Tracker) -> None:
        super().__init__(task_run_id=task_run_id, wrapped_future=cast("Any", None))
        self.submission: Submission | None = submission
        self.outcome: Outcome | None = None
        self.crashed = False  # settled by the tracker, without a word from a worker
        self.callbacks: tuple[Callable[[PrefectFuture[Any]], None], ...] = ()
        self.tracker = tracker

    # Prefect's wait() and as_completed() look here whether a future is done; they never read it.
    @property  # type: ignore[override] # read for its truth only
    def _final_state(self) -> Outcome | None:
        return self.outcome

    @_final_state.setter  # type: ignore[override] # nothing but None is ever set
    def _final_state(self, _value: None) -> None:
        """Prefect's constructor sets it to None."""

    def sent_as(self, dask_future: Any) -> None:
        """Notes Dask's future of the current attempt."""
        self._wrapped_future = dask_future

    def drop(self) -> None:
        """Forgets what it takes to run it: it is settled."""
        self._wrapped_future = cast("Any", None)
        self.submission = None

    @property
    def state(self) -> State[R]:
        """The final state, or what the server says until there is one."""
        if self.outcome is not None:
            return self.outcome.state()
        return super().state

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the task run has its final state, for at most that many seconds."""
        self.tracker.wait(self, timeout)
        raise_if_flow_run_suspension_requested()

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:  # noqa: FBT001, FBT002 - Prefect's
        """The task's result.

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
        self.tracker.acknowledge(self)
        state: Any = self.outcome.state()
        if state.is_completed() and isinstance(state.data, ResultRecord):
            # What Prefect does too, after a detour to its event loop: a seventh of the driver's CPU at thousands.
            return cast("R", state.data.result)
        return cast("R", state.result(raise_on_failure=raise_on_failure, _sync=True))

    def add_done_callback(self, fn: Callable[[PrefectFuture[R]], None]) -> None:
        """Calls `fn` with this future when it is settled: at once if it is."""
        if not self.tracker.call_when_done(self, fn):
            fn(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the future of task run {self.task_run_id} is inside an object that Prefect does not look into; "
            "pass futures as arguments, or in lists, tuples, sets, dicts, dataclasses or pydantic models"
        )
