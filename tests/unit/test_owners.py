"""Which team's objects a flow run may write."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from tidepool.operate import owners
from tidepool.operate.owners import OwnerError, Owners

if TYPE_CHECKING:
    from collections.abc import Collection

MINE, THEIRS, NONE, NEW = (str(UUID(int=number)) for number in range(1, 5))


class Database:
    """Objects of two teams; an id is of the same team in each table."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def look_up(self, kind: str, id_: str) -> str | None:
        self.asked.append((kind, id_))
        return {MINE: "mine", THEIRS: "theirs", NONE: ""}.get(id_)

    async def flow_runs_of(self, task_runs: Collection[str]) -> dict[str, str]:
        """Return the flow run of a task run, which here has the same id."""
        self.asked.append(("flow_runs_of", "all"))
        return {each: each for each in task_runs if each != NEW}


def check(method: str, path: str, content: Any = None, database: Database | None = None) -> None:
    database = database or Database()
    asyncio.run(Owners(database.look_up, database.flow_runs_of).check("mine", method, path, content))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/deployments/{}/create_flow_run"),
        ("POST", "/api/flow_runs/{}/set_state"),
        ("PATCH", "/api/flow_runs/{}"),
        ("PATCH", "/api/flow_runs/{}/labels"),
        ("POST", "/api/task_runs/{}/set_state"),
    ],
)
def test_a_flow_run_writes_only_its_own_teams_objects(method: str, path: str) -> None:
    check(method, path.format(MINE), {})
    check(method, path.format(NEW), {})  # the server answers that there is none
    for other in (THEIRS, NONE):
        with pytest.raises(OwnerError, match=f"{other} is not of work pool mine") as refused:
            check(method, path.format(other), {})
        assert refused.value.status == 403
    check("GET", f"/api/flow_runs/{THEIRS}")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/api/flow_runs/", {"parent_task_run_id": THEIRS}),
        (f"/api/deployments/{MINE}/create_flow_run", {"parent_task_run_id": THEIRS}),
        ("/api/task_runs/", {"flow_run_id": THEIRS}),
        ("/api/artifacts/", {"flow_run_id": THEIRS.upper()}),
        ("/api/logs/", [{"flow_run_id": MINE}, {"flow_run_id": THEIRS}]),
        ("/api/logs/", [{"flow_run_id": MINE, "task_run_id": THEIRS}]),
        ("/api/logs/", [{"task_run_id": MINE}, {"task_run_id": THEIRS}]),
        ("/api/artifacts/", {"flow_run_id": MINE, "task_run_id": THEIRS}),
        ("/api/logs/", [{"flow_run_id": THEIRS.replace("-", "")}]),
        ("/api/flow_runs/", {"name": "x"}),
        ("/api/flow_runs/", {"parent_task_run_id": None}),
    ],
)
def test_what_it_creates_belongs_to_its_own_team(path: str, content: Any) -> None:
    with pytest.raises(OwnerError):
        check("POST", path, content)


@pytest.mark.parametrize("content", [None, [], [1], "x", {}, {"flow_run_id": None}, [{"flow_run_id": MINE}]])
def test_another_body_is_left_to_the_server(content: Any) -> None:
    check("POST", "/api/logs/", content)


def test_the_task_runs_of_a_log_are_looked_up_together() -> None:
    database = Database()
    lines = [{"flow_run_id": MINE, "task_run_id": each} for each in (MINE, NEW, str(UUID(int=9)))]
    check("POST", "/api/logs/", lines, database)
    assert database.asked.count(("flow_runs_of", "all")) == 1
    assert not any(kind == "task_runs" for kind, _ in database.asked)


def test_an_object_is_looked_up_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(owners, "_KEPT", 2)
    database = Database()
    of = Owners(database.look_up, database.flow_runs_of)

    async def ask(*ids: str) -> int:
        database.asked.clear()
        for each in ids:
            await of.check("mine", "PATCH", f"/api/flow_runs/{each}", None)
        return len(database.asked)

    async def asks() -> None:
        assert await ask(MINE, MINE) == 1
        now[0] += 61
        assert await ask(MINE, MINE) == 1
        assert await ask(NEW, NEW) == 2  # it may be created in the next moment
        for _ in range(2):
            with pytest.raises(OwnerError):
                await ask(THEIRS)
        assert len(database.asked) == 0
        for kind in ("deployments", "task_runs"):
            await of.check("mine", "POST", f"/api/{kind}/{MINE}/x", None)
        assert len(of._known) == 2

    asyncio.run(asks())
