"""Private parts of Prefect's server."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.server.api import server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from starlette.types import ASGIApp

# Subflows in subflows.
_MOST_PARENTS = 100
# Faults of the data itself: a PostgreSQL error of these classes, or a Python error of these types. Another one, such as
# that the database is away, may succeed later, and Prefect tries it again.
_DATA_STATES = ("22", "23")
_DATA_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
_LOGGER = logging.getLogger(__name__)


def wrap_application(wrap: Callable[[ASGIApp], ASGIApp]) -> None:
    """Have `prefect server start` in this process serve the wrapped application.

    Why: flow runs authenticate to a proxy, but websockets authenticate with a message that a proxy cannot see.
    Watch: `prefect.cli._server_utils._run_in_foreground`, which imports `create_app` when it is called.
    Delete when: Prefect's server accepts the `Authorization` header of a websocket's handshake.
    """
    create = server.create_app

    @wraps(create)
    def create_wrapped(*args: Any, **kwargs: Any) -> ASGIApp:
        return wrap(create(*args, **kwargs))

    server.create_app = create_wrapped  # type: ignore[assignment]


async def work_pool(kind: str, id_: str) -> str | None:
    """Return the name of the work pool of a deployment, flow run or task run; a subflow has its parent's.

    Why: the API of Prefect's server has one password for all teams, and answers this with several requests.
    Watch: `prefect.server.database.orm_models`.
    Delete when: Prefect's server has users or namespaces.

    Args:
        kind: `deployments`, `flow_runs` or `task_runs`.
        id_: A UUID.

    Returns:
        Empty if it has none; None if there is no such object.
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    tables: dict[str, Any] = {"deployments": db.Deployment, "flow_runs": db.FlowRun}
    current: UUID | None = UUID(id_)
    async with db.session_context() as session:
        for _ in range(_MOST_PARENTS):
            if kind == "task_runs":
                task_run = (await session.execute(sa.select(db.TaskRun.flow_run_id).filter_by(id=current))).first()
                if task_run is None:
                    return None
                kind, current = "flow_runs", task_run[0]
                if current is None:
                    return ""
            table = tables[kind]
            parent = table.parent_task_run_id if kind == "flow_runs" else sa.null()
            found = (
                await session.execute(
                    sa.select(db.WorkPool.name, parent)
                    .select_from(table)
                    .outerjoin(db.WorkQueue, table.work_queue_id == db.WorkQueue.id)
                    .outerjoin(db.WorkPool, db.WorkQueue.work_pool_id == db.WorkPool.id)
                    .where(table.id == current)
                )
            ).first()
            if found is None:
                return None
            name, above = found
            if name or not above:
                return name or ""
            kind, current = "task_runs", above
    return ""


async def flow_runs_of(task_runs: Collection[str]) -> dict[str, str]:
    """Return the flow runs of those of these task runs that exist and have one, by id.

    Why, Watch, Delete when: as `work_pool`.
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    query = sa.select(db.TaskRun.id, db.TaskRun.flow_run_id).where(
        db.TaskRun.id.in_([UUID(each) for each in task_runs])
    )
    async with db.session_context() as session:
        found = (await session.execute(query)).all()
    return {str(id_): str(flow_run) for id_, flow_run in found if flow_run}


def keep_rest_of_batch() -> None:
    """Have the services of this process that write events and task runs leave out only what cannot be stored.

    And a task run's states are recorded only from events of the flow run that it belongs to.

    Why: a batch has the events of all flow runs, and one that the database refuses makes Prefect drop it as a whole.
        And by an event, a flow run could take another one's task run.
    Watch: `prefect.server.events.services.event_persister.create_handler`, `prefect.server.services.task_run_recorder`.
    Delete when: both drop single events.
    """
    from prefect.server.events.services import event_persister
    from prefect.server.events.storage.database import write_events as write
    from prefect.server.services import task_run_recorder

    record = task_run_recorder.record_bulk_task_run_events

    @wraps(write)
    async def write_events(session: Any, events: list[Any]) -> None:
        async def commit(part: list[Any]) -> None:
            try:
                await write(session=session, events=part)
                await session.commit()
            except Exception:
                await session.rollback()
                raise

        await _in_halves(commit, events)

    @wraps(record)
    async def record_events(events: list[Any]) -> None:
        await _in_halves(record, await _of_their_flow_run(events))

    event_persister.write_events = write_events  # type: ignore[attr-defined]
    task_run_recorder.record_bulk_task_run_events = record_events


def refuse_pending_after_the_end() -> None:
    """Have the server of this process refuse Pending for a flow run that has ended: it is Scheduled first.

    Why: a Prefect worker that was slow proposes Pending for a run that another one has taken, and that is over by then;
        the server accepts, and the run is executed a second time: 52 of 3,000 short runs under load.
    Watch: `prefect.server.orchestration.core_policy.PreventPendingTransitions`, which refuses the other states.
    Delete when: its FROM_STATES have COMPLETED, FAILED and CRASHED.
    """
    from prefect.server.orchestration.core_policy import PreventPendingTransitions
    from prefect.server.schemas.states import TERMINAL_STATES

    PreventPendingTransitions.FROM_STATES = {*PreventPendingTransitions.FROM_STATES, *TERMINAL_STATES}


async def _of_their_flow_run(events: Sequence[Any]) -> list[Any]:
    """Return the events without those about a task run of another flow run than they name."""

    def ids(event: Any) -> tuple[str, str]:
        run = event.resource_in_role.get("flow-run")
        named = run.prefect_object_id("prefect.flow-run") if run else ""
        return str(event.resource.prefect_object_id("prefect.task-run")), str(named)

    named: dict[UUID, tuple[str, str]] = {}
    for event in events:
        with suppress(ValueError):  # Prefect refuses it, too
            named[event.id] = ids(event)
    found = await flow_runs_of({task_run for task_run, _ in named.values()})
    kept = []
    for event in events:
        task_run, flow_run = named.get(event.id, ("", ""))
        if found.get(task_run, flow_run) == flow_run:
            kept.append(event)
        else:
            _LOGGER.warning(
                "event %s is dropped: task run %s is not of flow run %s", event.id, task_run, flow_run or "none"
            )
    return kept


async def _in_halves(write: Callable[[list[Any]], Awaitable[None]], events: Sequence[Any]) -> None:
    try:
        await write([*events])
    except Exception as error:
        if not _of_the_data(error):
            raise
        if len(events) <= 1:
            for event in events:
                _LOGGER.warning("event %s cannot be stored, and is dropped: %s", event.id, type(error).__name__)
            return
        half = len(events) // 2
        await _in_halves(write, events[:half])
        await _in_halves(write, events[half:])


def _of_the_data(error: BaseException | None) -> bool:
    import sqlalchemy.exc

    while error is not None:
        if isinstance(error, (sqlalchemy.exc.DataError, sqlalchemy.exc.IntegrityError)):
            return True
        if not isinstance(error, OSError) and isinstance(error, _DATA_ERRORS):
            return True
        if str(getattr(error, "sqlstate", None) or "").startswith(_DATA_STATES):
            return True
        error = getattr(error, "orig", None) or error.__cause__
    return False
