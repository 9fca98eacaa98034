"""`tidepool status` against a real server: what finds a run, what is wrong now, and the exit code."""

from __future__ import annotations

import json
import re
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow, get_client, get_run_logger, task
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import RRuleSchedule
from prefect.states import Failed, Scheduled

from tests.integration.small_repository import command
from tests.polling import until
from tidepool import settings as settings_module
from tidepool.operate.status import schedules, sources
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prefect.client.schemas.objects import FlowRun

    from tidepool.operate.status.picture import Overview, RunStatus

pytestmark = [pytest.mark.usefixtures("prefect_server", "no_kubernetes"), pytest.mark.timeout(600)]


@pytest.fixture
def no_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And as much time as a loaded machine needs."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("TIDEPOOL_STATUS_TIMEOUT_SECONDS", "60")
    settings_module.settings.cache_clear()
    yield
    settings_module.settings.cache_clear()


@task(task_run_name="score-{number}")
def score(number: int) -> None:
    if number == 2:
        raise ValueError("bad item")


@flow(name="status scoring", flow_run_name="scoring of friday")
def scoring() -> None:
    get_run_logger().warning("one partition was empty")
    states = [score(number, return_state=True) for number in range(3)]
    for each in states:
        each.result()


@pytest.fixture(scope="module")
def failed(prefect_server: str) -> FlowRun:
    del prefect_server
    state = scoring(return_state=True)
    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id)


async def _read(wanted: str) -> RunStatus:
    async with sources.connect() as opened:
        return await opened.run(wanted)


async def _overview() -> Overview:
    async with sources.connect() as opened:
        return await opened.overview()


def _run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


@pytest.mark.parametrize(
    "wanted", ["{id}", "{id:.8}", "scoring of friday", "http://host/v2/runs/flow-run/{id}?tab=Logs", "status scoring"]
)
def test_a_run_is_found_by_whatever_on_call_has_at_hand(failed: FlowRun, wanted: str) -> None:
    status = _run(_read(wanted.format(id=str(failed.id))))
    assert (status.id, status.state, status.wrong) == (str(failed.id), "Failed", True)
    assert status.why.startswith("ValueError: bad item")


def test_a_run_has_its_items_its_timeline_and_its_warnings(failed: FlowRun) -> None:
    def complete(status: RunStatus) -> bool:
        return bool(status.warnings) and sum(status.items.values()) == 3 and bool(status.failed)

    status = until(lambda: _run(_read(str(failed.id))), complete)
    assert status.items == {"COMPLETED": 2, "FAILED": 1}
    assert status.failed == [("score-2", "ValueError: bad item")]
    assert [name for _, name, _ in status.timeline] == ["Pending", "Running", "Failed"]
    assert "one partition was empty" in status.warnings
    assert status.unknown == {}


@pytest.mark.parametrize("wanted", ["00000000-0000-4000-8000-000000000000", "ffffff", "no such flow"])
def test_a_run_that_does_not_exist_is_a_sentence(failed: FlowRun, wanted: str) -> None:
    del failed
    with pytest.raises(sources.NotFoundError, match=wanted):
        _run(_read(wanted))


def _deployment(name: str, **options: Any) -> Any:
    with get_client(sync_client=True) as client:
        return client.create_deployment(flow_id=client.create_flow(scoring), name=name, **options)


def test_work_pools_that_were_not_looked_at_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_POOLS", 1)
    with get_client(sync_client=True) as client:
        for name in ("status-one", "status-two"):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"), overwrite=True)
        pools = len(client.read_work_pools())
    assert _run(_overview()).unknown["work pools"] == f"only 1 of {pools} were looked at"


def test_what_is_wrong_now_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_POOLS", 200)  # other tests have pools on this server
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="status-silent", type="process"), overwrite=True)
        late = client.create_flow_run_from_deployment(
            _deployment("status-late"), state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=10))
        )
        failing = _deployment("status-failing")
        for _ in range(2):
            run = client.create_flow_run_from_deployment(failing)
            client.set_flow_run_state(run.id, Failed(message="no space left"), force=True)
        _deployment("status-paused", paused=True)
        found = _run(_overview())
        client.delete_flow_run(late.id)
    kinds = {(each.kind, each.subject): each for each in found.findings}
    assert kinds["late", "status-late"].text.startswith("a flow run has been due for 10 min")
    failed = kinds["failing", "status-failing"].text
    assert re.fullmatch(r"the last 2 flow runs failed or crashed, the newest [\d.]+ s ago: no space left", failed)
    assert not kinds["paused", "status-paused"].wrong
    assert (
        kinds["worker silent", "work pool status-silent"].text
        == "no Prefect worker sends heartbeats: none has polled it"
    )
    assert found.wrong
    assert found.unknown.keys() == {"kubernetes"}


def test_a_schedule_without_a_next_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_NEW", timedelta(0))
    monkeypatch.setattr(schedules, "STOPPED_SHARE", 1.0)  # other tests may have schedules on this server

    def unscheduled() -> list[str]:
        return [each.subject for each in _run(_overview()).findings if each.kind == "unscheduled"]

    ended = RRuleSchedule(rrule="DTSTART:20200101T000000Z\nRRULE:FREQ=DAILY;UNTIL=20200102T000000Z")
    with get_client(sync_client=True) as client:
        made = _deployment("status-unscheduled", schedules=[DeploymentScheduleCreate(schedule=ended)])
        assert "status-unscheduled" in unscheduled()
        future = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(minutes=10))
        client.create_flow_run_from_deployment(made, state=future)
        assert "status-unscheduled" not in unscheduled()
        client.delete_deployment(made)


def test_a_server_that_is_away_is_named_and_wrong() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        found = _run(_overview())
    assert found.wrong
    assert {"prefect", "pauses", "work pools", "drift"} <= found.unknown.keys()


def test_the_command_prints_json_and_its_exit_code_says_whether_something_is_wrong(
    failed: FlowRun, tmp_path: Path
) -> None:
    for options in ([], ["--json"], ["--watch"]):
        done = subprocess.run(
            command("status", str(failed.id)[:8], *options),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, ""), done.stderr
        if options == ["--json"]:
            assert json.loads(done.stdout)["id"] == str(failed.id)
        else:
            assert done.stdout.startswith("FAILED  status scoring / scoring of friday"), done.stdout
