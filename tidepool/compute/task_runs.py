"""Tells the server how task runs ended that no worker can speak for any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.context import FlowRunContext
from prefect.task_engine import _create_task_run_locally
from prefect.types._datetime import now
from prefect.utilities.engine import emit_task_run_state_change_event

if TYPE_CHECKING:
    import contextvars
    import logging
    from collections.abc import Sequence
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

    from tidepool.compute.futures import TidepoolFuture

# The most that the server gives in one answer.
_PAGE = 200


@dataclass(frozen=True)
class Conclusion:
    """How a task run ended.

    Attributes:
        task_run_id: The task run.
        task: Its task.
        dependencies: The task runs that each parameter comes from.
        state: Its final state.
    """

    task_run_id: UUID
    task: Task[..., Any]
    dependencies: dict[str, set[Any]]
    state: State[Any]

    @classmethod
    def of(cls, future: TidepoolFuture[Any], state: State[Any]) -> Conclusion:
        """The conclusion for a future that is not settled yet."""
        assert future.submission is not None  # noqa: S101 - settled futures have their state from elsewhere
        return cls(future.task_run_id, future.submission.task, future.submission.dependencies, state)


class Recorder:
    """Sends final states as the events that Prefect's engine sends, so that server and UI treat them alike.

    Args:
        context: Context variables of the flow run that the task runs belong to.
        log: Where it says what could not be told.
    """

    def __init__(
        self, context: contextvars.Context, log: logging.Logger | logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._context = context
        self._log = log

    def record(self, concluded: Sequence[Conclusion], if_known: Sequence[Conclusion] = ()) -> None:
        """Records final states.

        Args:
            concluded: Task runs to record, also if the server has not heard of them.
            if_known: Task runs to record only if the server knows them and they are not final there.
        """
        try:
            self._context.copy().run(self._record, concluded, if_known)
        except httpx.HTTPError as error:
            self._log.warning(
                "The server was not told how %d task runs ended: %r", len(concluded) + len(if_known), error
            )

    def _record(self, concluded: Sequence[Conclusion], if_known: Sequence[Conclusion]) -> None:
        known = _known([*concluded, *if_known])
        for conclusion in concluded:
            _emit(known.get(conclusion.task_run_id) or _announce(conclusion), conclusion.state)
        for conclusion in if_known:
            task_run = known.get(conclusion.task_run_id)
            if task_run is not None and not (task_run.state and task_run.state.is_final()):
                _emit(task_run, conclusion.state)


def _known(conclusions: list[Conclusion]) -> dict[UUID, TaskRun]:
    found: dict[UUID, TaskRun] = {}
    # Settings of its own, so that it is not the flow's client: that one is in use by another thread.
    with get_client(sync_client=True, httpx_settings={"timeout": 30}) as client:
        for start in range(0, len(conclusions), _PAGE):
            wanted = [conclusion.task_run_id for conclusion in conclusions[start : start + _PAGE]]
            runs = client.read_task_runs(task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=wanted)), limit=_PAGE)
            found.update({run.id: run for run in runs})
    return found


def _announce(conclusion: Conclusion) -> TaskRun:
    """A task run that the server has not heard of: its worker died with what it had to say."""
    task_run = _create_task_run_locally(
        task=conclusion.task, id=conclusion.task_run_id, flow_run_context=FlowRunContext.get()
    )
    task_run.task_inputs = {name: list(inputs) for name, inputs in conclusion.dependencies.items()}
    assert task_run.state is not None  # noqa: S101 - Prefect makes it Pending
    emit_task_run_state_change_event(task_run=task_run, initial_state=None, validated_state=task_run.state)
    return task_run


def _emit(task_run: TaskRun, state: State[Any]) -> None:
    state.state_details.task_run_id = task_run.id
    state.state_details.flow_run_id = task_run.flow_run_id
    # Later than the Pending that may have been announced just now: the server takes an older state for history.
    state.timestamp = now("UTC")
    before = task_run.state
    task_run.state = state
    if task_run.start_time:
        task_run.end_time = cast("Any", state.timestamp)
    emit_task_run_state_change_event(task_run=task_run, initial_state=before, validated_state=state)
