"""Prefect's server with tidepool.upstream.prefect_server, as the server's pods execute it.

If it fails: compare `wrap_application` with `prefect.cli._server_utils._run_in_foreground`,
`keep_rest_of_batch` with the services that it names, and `refuse_pending_after_the_end` with Prefect's rule. To do
without: `flowRuns.api: open`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tidepool.local.server import free_port

if TYPE_CHECKING:
    from pathlib import Path

# Prefect calls the web server with the application; tests/integration/test_flow_run_api.py lets it serve.
PROGRAM = """
import sys
import uvicorn
from prefect.cli import app
from tidepool.upstream.prefect_server import wrap_application

class Wrapped:
    def __init__(self, application):
        self.application = application

wrap_application(Wrapped)
uvicorn.run = lambda app, **_: print("served:", type(app).__name__, "around", app.application.title)
sys.argv = ["prefect", "server", "start", *sys.argv[1:]]
app()
"""


def ran(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_the_servers_command_serves_the_wrapped_application(tmp_path: Path) -> None:
    options = ["--host", "127.0.0.1", "--port", str(free_port()), "--no-ui"]
    done = ran(PROGRAM, *options, PREFECT_HOME=str(tmp_path))
    assert "served: Wrapped around Prefect" in done.stdout, f"{done.stdout}\n{done.stderr}"


# Both services write a batch in which one event cannot be stored; then one while the database does not answer.
BATCHES = """
import asyncio
from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4
from prefect.server.database import provide_database_interface
from prefect.server.events.schemas.events import Event, RelatedResource
from prefect.server.events.services import event_persister
from prefect.server.services import task_run_recorder
from prefect.types._datetime import now
from tidepool.upstream.prefect_server import keep_rest_of_batch

keep_rest_of_batch()

def event(name, **payload):
    resource = {
        "prefect.resource.id": f"prefect.task-run.{uuid4()}", "prefect.orchestration": "client",
        "prefect.state-name": "Running", "prefect.state-type": "RUNNING", "prefect.state-message": "",
        "prefect.state-timestamp": now("UTC").isoformat(),
    }
    return Event(occurred=now("UTC"), event=name, id=uuid4(), resource=resource, payload=payload).receive()

def started(key, **changed):
    task_run = {"task_key": "t", "dynamic_key": key, "tags": [], "name": key}
    state = {"type": "RUNNING", "name": "Running"}
    return event("prefect.task-run.Running", task_run=task_run, validated_state=state).model_copy(update=changed)

def of(flow_run):
    return [{"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}]

async def send(handler, events):
    for each in events:
        await handler(SimpleNamespace(data=each.model_dump_json()))

async def main():
    db = provide_database_interface()
    await db.create_db()

    async with event_persister.create_handler(batch_size=5, flush_every=timedelta(hours=1)) as handler:
        good = [event(f"good-{number}") for number in range(4)]
        bad = event("bad")
        object.__setattr__(bad, "event", "bad\\ud800")
        event_persister.ReceivedEvent = SimpleNamespace(model_validate_json=lambda each: each)
        for each in [*good[:2], bad, *good[2:]]:
            await handler(SimpleNamespace(data=each))
    async with db.session_context() as session:
        names = (await session.execute(db.Event.__table__.select())).all()
    print("stored:", sorted(each.event for each in names))

    async with task_run_recorder.consumer(write_batch_size=5, flush_every=3600) as handler:
        await send(handler, [started("a"), started("b"), event("prefect.task-run.Running"), started("c"), started("d")])
    async with db.session_context() as session:
        keys = (await session.execute(db.TaskRun.__table__.select())).all()
    print("recorded:", sorted(each.dynamic_key for each in keys))

    async with db.session_context(begin_transaction=True) as session:
        flow = db.Flow(name="f")
        session.add(flow)
        await session.flush()
        mine, theirs = db.FlowRun(flow_id=flow.id), db.FlowRun(flow_id=flow.id)
        session.add_all([mine, theirs])
        await session.flush()
        runs = [RelatedResource.model_validate(of(each.id)[0]) for each in (mine, theirs)]
    of_theirs = started("e", related=[runs[1]])
    resource = of_theirs.resource
    forged = [started(key, resource=resource, related=related) for key, related in (("f", runs[:1]), ("g", []))]
    for batch in ([of_theirs], forged):
        async with task_run_recorder.consumer(write_batch_size=len(batch), flush_every=3600) as handler:
            await send(handler, batch)
    async with db.session_context() as session:
        [kept] = [each for each in (await session.execute(db.TaskRun.__table__.select())).all() if each.flow_run_id]
    print("kept:", kept.dynamic_key, kept.flow_run_id == theirs.id)

asyncio.run(main())
"""


def test_what_cannot_be_stored_takes_nothing_else_with_it(tmp_path: Path) -> None:
    database = f"sqlite+aiosqlite:///{tmp_path}/x.db"
    done = ran(BATCHES, PREFECT_HOME=str(tmp_path), PREFECT_API_DATABASE_CONNECTION_URL=database)
    assert "stored: ['good-0', 'good-1', 'good-2', 'good-3']" in done.stdout, f"{done.stdout}\n{done.stderr}"
    assert "recorded: ['a', 'b', 'c', 'd']" in done.stdout, f"{done.stdout}\n{done.stderr}"
    assert done.stderr.count("cannot be stored, and is dropped") == 2
    # An event about another flow run's task run, which it would have taken.
    assert "kept: e True" in done.stdout, f"{done.stdout}\n{done.stderr}"
    assert done.stderr.count("is not of flow run") == 2


def test_a_database_that_is_away_drops_nothing() -> None:
    import asyncio

    import sqlalchemy.exc

    from tidepool.upstream.prefect_server import _in_halves

    asked = []

    async def write(events: list[object]) -> None:
        asked.append(len(events))
        raise sqlalchemy.exc.OperationalError("x", {}, ConnectionRefusedError("gone"))

    with pytest.raises(sqlalchemy.exc.OperationalError):
        asyncio.run(_in_halves(write, [1, 2, 3, 4]))
    assert asked == [4]


def test_the_services_command_starts_the_services(tmp_path: Path) -> None:
    """Both services are those that were changed: in this process."""
    program = """
import sys
from prefect.server.services.base import Service
from tidepool.operate import server

async def run(*_, **__):
    from prefect.server.events.services import event_persister
    print("services run here:", event_persister.write_events.__module__)

Service.run_services = run
sys.argv = ["x", "services"]
server.main()
"""
    done = ran(program, PREFECT_HOME=str(tmp_path))
    assert "services run here:" in done.stdout, f"{done.stdout}\n{done.stderr}"


# Each run has ended; then a Prefect worker that was slow wants to execute it, and a person retries it.
ENDED = """
import asyncio
import httpx
from prefect.server.api.server import create_app
from prefect.server.database import provide_database_interface
from tidepool.upstream.prefect_server import refuse_pending_after_the_end

refuse_pending_after_the_end()

async def main():
    await provide_database_interface().create_db()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app()), base_url="http://server/api") as client:
        async def post(path, **body):
            return (await client.post(path, json=body)).raise_for_status().json()

        flow = (await post("/flows/", name="f"))["id"]
        deployment = (await post("/deployments/", name="d", flow_id=flow))["id"]
        for end in ("COMPLETED", "FAILED", "CRASHED"):
            run = (await post(f"/deployments/{deployment}/create_flow_run"))["id"]
            for state in ("PENDING", "RUNNING", end, "PENDING", "SCHEDULED", "PENDING"):
                answer = await post(f"/flow_runs/{run}/set_state", state={"type": state})
                print(end, state, answer["status"])

asyncio.run(main())
"""


def test_a_run_that_has_ended_is_pending_again_only_if_it_was_scheduled(tmp_path: Path) -> None:
    done = ran(ENDED, PREFECT_HOME=str(tmp_path))
    answers = [line.split() for line in done.stdout.splitlines()]
    assert len(answers) == 18, f"{done.stdout}\n{done.stderr}"
    refused = [(end, state) for end, state, status in answers if status != "ACCEPT"]
    assert refused == [(end, "PENDING") for end in ("COMPLETED", "FAILED", "CRASHED")]
