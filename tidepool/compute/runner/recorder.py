"""Final states of task runs that no worker can report, sent to the server by the driver."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.context import FlowRunContext
from prefect.utilities.engine import emit_task_run_state_change_event

from tidepool.upstream.prefect import new_task_run

if TYPE_CHECKING:
    import contextvars
    import logging
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

    from tidepool.compute.runner.futures import TidepoolFuture
    from tidepool.compute.worker.outcome import Outcome

# Maximum of one answer of the server.
_PAGE = 200
_POLL_SECONDS = 0.5

_NOT_RECORDED = "the server may not have recorded the final states"


@dataclass(frozen=True)
class Conclusion:
    """The end of a task run: its future without what is needed to run it."""

    task_run_id: UUID
    task: Task[..., Any]
    dependencies: dict[str, set[Any]]
    outcome: Outcome

    @classmethod
    def of(cls, future: TidepoolFuture[Any], outcome: Outcome) -> Conclusion:
        """Return the conclusion of a future that is not settled yet."""
        assert future.submission is not None  # noqa: S101 - settled futures have their state from elsewhere
        return cls(future.task_run_id, future.submission.task, future.submission.dependencies, outcome)


class Recorder:
    """Sends final states as the events that Prefect's engine sends, so that server and UI treat them alike.

    Args:
        context: Context variables of the flow run that the task runs belong to.
        log: Reports what could not be sent.
    """

    def __init__(
        self, context: contextvars.Context, log: logging.Logger | logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._context = context
        self._log = log

    def record(self, concluded: Sequence[Conclusion], if_known: Sequence[Conclusion] = ()) -> None:
        """Record final states; those of `if_known` only if the server knows the task run, not final."""
        self._in_flow(self._record, concluded, if_known)

    def record_unsent(self, ended: Sequence[Conclusion], seconds: float) -> bool:
        """Record the final states that a lost worker may not have sent; return whether the server was reached.

        The server may take that many seconds to hear of them from the worker. The events have the ids that the worker
        gave them: the server takes each once.
        """
        return self._in_flow(self._record_unsent, ended, seconds)

    def has_recorded(self, ended: Conclusion, seconds: float) -> bool:
        """Return whether the server has recorded the end of a task run, or does within that many seconds."""
        unheard: list[Any] = []
        return self._in_flow(lambda ended: unheard.extend(_unheard(ended, seconds)), [ended]) and not unheard

    def _in_flow(self, record: Callable[..., None], task_runs: Sequence[Conclusion], *more: Any) -> bool:
        try:
            self._context.copy().run(record, task_runs, *more)
        except httpx.HTTPError as error:
            self._log.warning("%s of %d task runs: %r", _NOT_RECORDED, len(task_runs), error)
        except Exception:  # noqa: BLE001 - the results of the flow stand, whatever the server knows of them
            self._log.exception("%s of %d task runs", _NOT_RECORDED, len(task_runs))
        else:
            return True
        return False

    def _record(self, concluded: Sequence[Conclusion], if_known: Sequence[Conclusion]) -> None:
        known = _known([*concluded, *if_known])
        for conclusion in concluded:
            _emit_now(known.get(conclusion.task_run_id) or _announce(conclusion), conclusion.outcome.state())
        for conclusion in if_known:
            task_run = known.get(conclusion.task_run_id)
            if task_run is not None and not _is_final(task_run):
                _emit_now(task_run, conclusion.outcome.state())

    def _record_unsent(self, ended: Sequence[Conclusion], seconds: float) -> None:
        unheard = _unheard(ended, seconds)
        for conclusion, known in unheard:
            _emit_as_it_was(known, conclusion)
        if unheard:
            self._log.warning("sent the final states of %d task runs that a lost worker had not sent", len(unheard))


def _unheard(ended: Sequence[Conclusion], seconds: float) -> list[tuple[Conclusion, TaskRun | None]]:
    """Return those whose end the server does not record within that many seconds, with its task run."""
    deadline = time.monotonic() + seconds
    while True:
        known = _known(ended)
        ended = [each for each in ended if not _has_ended(known.get(each.task_run_id), each)]
        if not ended or time.monotonic() > deadline:
            return [(each, known.get(each.task_run_id)) for each in ended]
        time.sleep(_POLL_SECONDS)


def _is_final(task_run: TaskRun) -> bool:
    return bool(task_run.state and task_run.state.is_final())


def _has_ended(known: TaskRun | None, conclusion: Conclusion) -> bool:
    """Return whether the server has recorded the end; one that waits for a failed one ends Pending, as NotReady."""
    return known is not None and (_is_final(known) or known.state_id == conclusion.outcome.state().id)


def _known(conclusions: Sequence[Conclusion]) -> dict[UUID, TaskRun]:
    found: dict[UUID, TaskRun] = {}
    # Own settings give a client of its own: the flow's is in use by another thread.
    with get_client(sync_client=True, httpx_settings={"timeout": 30}) as client:
        for start in range(0, len(conclusions), _PAGE):
            wanted = [conclusion.task_run_id for conclusion in conclusions[start : start + _PAGE]]
            runs = client.read_task_runs(task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=wanted)), limit=_PAGE)
            found.update({run.id: run for run in runs})
    return found


def _announce(conclusion: Conclusion, at: datetime | None = None) -> TaskRun:
    """Announce a task run that is unknown to the server: its worker died before it sent its events."""
    task_run = new_task_run(conclusion.task, conclusion.task_run_id, FlowRunContext.get())
    task_run.task_inputs = {name: list(inputs) for name, inputs in conclusion.dependencies.items()}
    task_run.name = conclusion.outcome.name or task_run.name
    assert task_run.state is not None  # noqa: S101 - Prefect makes it Pending
    task_run.state.timestamp = cast("Any", at) or task_run.state.timestamp
    emit_task_run_state_change_event(task_run=task_run, initial_state=None, validated_state=task_run.state)
    return task_run


def _emit_now(task_run: TaskRun, state: State[Any]) -> None:
    # Later than a Pending that was announced just now: the server takes an older state for history.
    state.timestamp = cast("Any", datetime.now(UTC))
    _emit(task_run, state)


def _emit_as_it_was(task_run: TaskRun | None, conclusion: Conclusion) -> None:
    state, begun = conclusion.outcome.state(), conclusion.outcome.start_time
    if task_run is None:
        # Before anything that the worker may have sent.
        task_run = _announce(conclusion, (begun or state.timestamp) - timedelta(seconds=1))
    task_run.start_time = cast("Any", begun)
    if begun:
        task_run.run_count = max(task_run.run_count, 1)
        task_run.total_run_time = state.timestamp - begun
    _emit(task_run, state)


def _emit(task_run: TaskRun, state: State[Any]) -> None:
    state.state_details.task_run_id = task_run.id
    state.state_details.flow_run_id = task_run.flow_run_id
    before = task_run.state
    task_run.state = state
    if task_run.start_time:
        task_run.end_time = cast("Any", state.timestamp)
    emit_task_run_state_change_event(task_run=task_run, initial_state=before, validated_state=state)
