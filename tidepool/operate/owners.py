"""Owners of the Prefect server's objects: an object belongs to the team whose work pool executes it."""

from __future__ import annotations

import json
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from tidepool.operate.bodies import BodyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

# An object rarely changes its work pool, and each lookup is a query of the database.
_KEPT_SECONDS = 60.0
_KEPT = 10_000
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WRITTEN = re.compile(rf"/api/(deployments|flow_runs|task_runs)/({UUID.pattern})(?:/.*)?")
_REFERENCES = {"flow_run_id": "flow_runs", "task_run_id": "task_runs", "parent_task_run_id": "task_runs"}
# Events of the server and of Prefect workers, on which drivers and automations act.
_NOT_OF_RUNS = tuple(
    f"prefect.{kind}." for kind in ("automation", "deployment", "flow-run", "work-pool", "work-queue", "worker")
)
_HEARTBEAT = "prefect.flow-run.heartbeat"
_TASK_RUN_EVENT = "prefect.task-run."
_RUN_RESOURCE = re.compile(r"prefect\.(flow|task)-run\.(.*)", re.DOTALL)
_KINDS = {"deployments": "deployment", "flow_runs": "flow run", "task_runs": "task run"}


class OwnerError(BodyError):
    """A flow run writes an object of another team, or one of no team."""

    status = HTTPStatus.FORBIDDEN


class Owners:
    """The work pools of deployments, flow runs and task runs, remembered for a minute.

    Args:
        look_up: Returns the name of an object's work pool, of a kind in the words of the API and an id: empty if it
            has none, None if there is no such object.
        flow_runs_of: Returns the flow runs of those of these task runs that exist and have one, by id.
    """

    def __init__(
        self,
        look_up: Callable[[str, str], Awaitable[str | None]],
        flow_runs_of: Callable[[Collection[str]], Awaitable[Mapping[str, str]]],
    ) -> None:
        self._look_up = look_up
        self._flow_runs_of = flow_runs_of
        self._known: dict[tuple[str, str], tuple[str, float]] = {}

    async def check(self, team: str, method: str, path: str, content: Any) -> None:
        """Check that a request writes to objects of one team only.

        Args:
            team: The name of its work pool.
            method: Of the request.
            path: Of the request.
            content: The JSON of its body; None without one.

        Raises:
            OwnerError: it does not.
        """
        if method == "GET":
            return
        alone = isinstance(content, dict) and not content.get("parent_task_run_id")
        if method == "POST" and path == "/api/flow_runs/" and alone:
            raise OwnerError("a flow run creates runs of deployments and subflows only: parent_task_run_id is missing")
        await self._check({*_written(path), *_referred(content)}, team)

    async def check_event(self, team: str, event: Any) -> None:
        """Check that a message is an event that a flow run may send: about runs of its team, and not the server's own.

        Which flow run a task run belongs to is checked when its state is recorded, of a whole batch at a time.

        Args:
            team: The name of its work pool.
            event: The JSON of the message.

        Raises:
            BodyError: it is not.
        """
        name = event.get("event") if isinstance(event, dict) else None
        if not isinstance(name, str) or not name.isprintable():
            raise BodyError("an event is a JSON object with a name without control characters")
        if name.startswith(_NOT_OF_RUNS) and name != _HEARTBEAT:
            raise OwnerError(f"a flow run does not send {name}")
        resource, related = event.get("resource"), event.get("related") or []
        if not isinstance(related, list):
            raise BodyError("the related resources of an event are a list")
        own, *others = (_run_resource(each) for each in (resource, *related))
        if name.startswith(_TASK_RUN_EVENT):
            _check_task_run(event, own)
            own = None
        await self._check({each for each in (own, *others) if each}, team)

    async def _check(self, written: set[tuple[str, str]], team: str) -> None:
        task_runs = [id_ for kind, id_ in written if kind == "task_runs"]
        if len(task_runs) > 1:  # lines of a log
            found = await self._flow_runs_of(task_runs)
            written = {each for each in written if each[0] != "task_runs"} | {
                ("flow_runs", each) for each in found.values()
            }
        for kind, id_ in written:
            pool = await self._pool(kind, id_)
            if pool not in {None, team}:
                raise OwnerError(f"{_KINDS[kind]} {id_} is not of work pool {team}: a flow run writes only its team's")

    async def _pool(self, kind: str, id_: str) -> str | None:
        """Return the work pool; None if the object does not exist, which the server's own answer says."""
        now = time.monotonic()
        pool, until = self._known.pop((kind, id_), ("", 0.0))
        if until < now:
            found = await self._look_up(kind, id_)
            if found is None:
                return None
            pool, until = found, now + _KEPT_SECONDS
        self._known[kind, id_] = pool, until
        while len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]
        return pool


def _written(path: str) -> Iterator[tuple[str, str]]:
    if match := _WRITTEN.fullmatch(path):
        yield match[1], match[2]


def _referred(content: Any) -> Iterator[tuple[str, str]]:
    """Yield what an object, or each of a list, is to belong to."""
    for each in content if isinstance(content, list) else [content]:
        for key, kind in _REFERENCES.items():
            found = each.get(key) if isinstance(each, dict) else None
            if found is not None:
                id_ = str(found).lower()
                if not UUID.fullmatch(id_):
                    raise OwnerError(f"{key} must be a UUID as Prefect writes it")
                yield kind, id_


def _run_resource(labels: Any) -> tuple[str, str] | None:
    """Return the kind and id of a resource that is a run; None of another one."""
    name = labels.get("prefect.resource.id") if isinstance(labels, dict) else None
    if not isinstance(name, str) or not name.isprintable():
        raise BodyError("a resource of an event is an object with a prefect.resource.id without control characters")
    if not (match := _RUN_RESOURCE.fullmatch(name)):
        return None
    if not UUID.fullmatch(match[2]):
        raise OwnerError(f"{json.dumps(name)} is not a run: prefect.{match[1]}-run. and a UUID as Prefect writes it")
    return f"{match[1]}_runs", match[2]


def _check_task_run(event: Mapping[str, Any], resource: tuple[str, str] | None) -> None:
    if not resource or resource[0] != "task_runs":
        raise OwnerError(f"the resource of {event['event']} is a task run")
    payload = event.get("payload")
    fields = payload.get("task_run") if isinstance(payload, dict) else None
    # They would count instead of the resources.
    if not isinstance(fields, dict) or fields.keys() & {"id", "flow_run_id", "state", "state_id"}:
        raise OwnerError(f"{event['event']} has no task_run, or one with ids of its own")
