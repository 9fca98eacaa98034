"""`tidepool exporter` beside a real Prefect server: the figures of real deployments, runs, schedules and workers."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.server_api import ask, make_unreadable
from tidepool.operate.exporter import reader as reader_module
from tidepool.operate.exporter.service import Exporter, Snapshot
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

Labels = dict[str, str]
FINISHED = "tidepool_flow_runs_finished_total"


@dataclass
class Shop:
    """Deployments and runs of one test on the server.

    Attributes:
        api: The server's URL.
        pool: Name of its work pool.
    """

    api: str
    pool: str = field(default_factory=lambda: f"0-{uuid.uuid4().hex[:8]}")  # the first of the server's

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask(self.api, method, path, body)

    def deploy(self, name: str, **more: Any) -> str:
        flow = self.ask("POST", "/flows/", {"name": "sell"})["id"]
        body = {"name": name, "flow_id": flow, "work_pool_name": self.pool, "tags": ["tier:1", "owner:media"]} | more
        return str(self.ask("POST", "/deployments/", body)["id"])

    def run(self, deployment: str, *states: str, at: datetime | None = None) -> str:
        """Create a run and bring it into these states at a time."""
        run = str(self.ask("POST", f"/deployments/{deployment}/create_flow_run", {})["id"])
        for name in states:
            body = {"state": {"type": name.upper()}, "force": True}
            answer = self.ask("POST", f"/flow_runs/{run}/set_state", body)
            assert answer["status"] == "ACCEPT", answer
        if at is not None:
            self.backdate(run, at)
        return run

    def backdate(self, run: str, at: datetime) -> None:
        """Write into the database that all of a run happened at a time: the API sets the present one."""
        text = f"{at:%Y-%m-%d %H:%M:%S.%f}"
        database = sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db", timeout=60)
        with closing(database), database:
            found = database.execute(
                "UPDATE flow_run SET expected_start_time=?1, start_time=iif(start_time IS NULL, NULL, ?1),"
                " end_time=iif(end_time IS NULL, NULL, ?1), state_timestamp=?1 WHERE id=?2",
                (text, run),
            )
            assert found.rowcount == 1
            database.execute(
                "UPDATE flow_run_state SET timestamp=? WHERE id=(SELECT state_id FROM flow_run WHERE id=?)", (text, run)
            )


@pytest.fixture
def shop(prefect_server: str) -> Iterator[Shop]:
    made = Shop(prefect_server)
    body = {"name": made.pool, "type": "kubernetes", "base_job_template": {}, "concurrency_limit": 7}
    made.ask("POST", "/work_pools/", body)
    yield made
    # A pass has requests for the workers of some pools only.
    made.ask("DELETE", f"/work_pools/{made.pool}")


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    with Snapshot("127.0.0.1", 0) as server:
        yield server


class Page:
    """The series of a page of figures."""

    def __init__(self, text: bytes) -> None:
        self.samples = [each for family in text_string_to_metric_families(text.decode()) for each in family.samples]

    def get(self, name: str, **labels: str) -> float | None:
        found = [each.value for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        assert len(found) <= 1, (name, labels, found)
        return found[0] if found else None


class Loop:
    """The exporter's loop, one pass at a time."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def passes(self, *steps: Any) -> list[Page]:
        """Return the page after a first pass, and after each step and a pass; a step gets the exporter."""

        async def scenario() -> list[Page]:
            from prefect.client.orchestration import get_client

            async with get_client() as client:
                exporter = Exporter(client, self.snapshot)
                pages = []
                for step in (lambda _: None, *steps):
                    await asyncio.to_thread(step, exporter)
                    await exporter.refresh()
                    pages.append(Page(self.snapshot.page()))
                return pages

        return asyncio.run(scenario())


@pytest.fixture
def loop(snapshot: Snapshot, prefect_server: str) -> Loop:
    del prefect_server
    return Loop(snapshot)


def labels(shop: Shop, name: str) -> Labels:
    return {"flow": "sell", "deployment": name, "tier": "1", "team": "media", "work_pool": shop.pool}


def test_a_run_that_cannot_be_listed_hides_no_other(shop: Shop, loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    name = f"d-{uuid.uuid4().hex[:8]}"
    deployment = shop.deploy(name)
    bad: list[str] = []

    def poison(_: Exporter) -> None:
        for _ in range(3):
            shop.run(deployment, "Running", "Completed")
        bad.append(shop.run(deployment, "Running"))
        make_unreadable(shop.api, bad[0], "COMPLETED")

    try:
        page = loop.passes(poison, lambda _: None)[-1]
    finally:
        shop.ask("DELETE", f"/flow_runs/{bad[0]}")
    assert page.get(FINISHED, **labels(shop, name), state="Completed") == 3
    assert caplog.text.count("cannot write out a flow run") == 1


def test_a_finished_run_is_counted_once_with_its_deployments_labels(shop: Shop, loop: Loop) -> None:
    name = f"d-{uuid.uuid4().hex[:8]}"
    deployment = shop.deploy(name)
    shop.run(deployment, "Running", "Completed")  # before the exporter: a fact, not a count

    def finish(_: Exporter) -> None:
        shop.run(deployment, "Running", "Completed")
        shop.run(deployment, "Running", "Failed")
        shop.run(deployment, "Crashed")

    first, second, third = loop.passes(finish, lambda _: None)
    who = labels(shop, name)
    states = ("Completed", "Failed", "Crashed", "Cancelled")
    assert [first.get(FINISHED, **who, state=each) for each in states] == [0, 0, 0, 0], "there before the first one"
    for page in (second, third):
        assert [page.get(FINISHED, **who, state=each) for each in states] == [1, 1, 1, 0]
    short = {"flow": "sell", "deployment": name}
    assert third.get("tidepool_flow_run_duration_seconds_count", **short) == 2, "one did not start"
    assert third.get("tidepool_flow_run_start_delay_seconds_count", **short) == 2
    assert first.get("tidepool_consecutive_failures", **who) == 0
    assert third.get("tidepool_consecutive_failures", **who) == 2
    success = third.get("tidepool_last_success_timestamp_seconds", **who)
    assert success is not None
    assert abs(success - time.time()) < 300


def test_what_happened_before_the_start_is_read(shop: Shop, loop: Loop) -> None:
    name, never = (f"d-{uuid.uuid4().hex[:8]}" for _ in range(2))
    deployment, other = shop.deploy(name), shop.deploy(never)
    ago = datetime.now(UTC) - timedelta(hours=5)
    shop.run(deployment, "Running", "Failed", at=ago - timedelta(hours=1))
    shop.run(deployment, "Running", "Completed", at=ago)
    for hours in (1, 2, 3):
        shop.run(deployment, "Running", "Crashed", at=ago + timedelta(hours=hours))
    shop.run(other, "Running", "Failed", at=ago)
    [page] = loop.passes()
    assert page.get("tidepool_consecutive_failures", **labels(shop, name)) == 3
    success = page.get("tidepool_last_success_timestamp_seconds", **labels(shop, name))
    assert success == pytest.approx(ago.timestamp(), abs=1)
    assert page.get("tidepool_consecutive_failures", **labels(shop, never)) == 1
    assert page.get("tidepool_last_success_timestamp_seconds", **labels(shop, never)) is None


def test_unfinished_runs_by_state_and_age(shop: Shop, loop: Loop) -> None:
    name = f"d-{uuid.uuid4().hex[:8]}"
    deployment = shop.deploy(name)
    ago = datetime.now(UTC) - timedelta(hours=1)
    shop.run(deployment, "Pending", "Running", at=ago)
    shop.run(deployment, "Pending")
    late = shop.run(deployment)
    state = {"type": "SCHEDULED", "name": "Late", "state_details": {"scheduled_time": ago.isoformat()}}
    shop.ask("POST", f"/flow_runs/{late}/set_state", {"state": state, "force": True})
    shop.backdate(late, ago)
    [page] = loop.passes()
    who = labels(shop, name)
    assert [page.get("tidepool_flow_runs", **who, state=each) for each in ("Running", "Pending", "Late")] == [1, 1, 1]
    assert page.get("tidepool_flow_runs", **who, state="Cancelling") is None
    assert page.get("tidepool_flow_run_oldest_seconds", **who, state="Running") == pytest.approx(3600, abs=300)
    assert page.get("tidepool_flow_run_oldest_seconds", **who, state="Pending") < 300
    assert page.get("tidepool_pool_slots_used", work_pool=shop.pool) == 2
    assert page.get("tidepool_pool_slots_limit", work_pool=shop.pool) == 7


def test_schedules(shop: Shop, loop: Loop) -> None:
    hourly = {"schedule": {"interval": 3600, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": "UTC"}}
    weekdays = {"schedule": {"cron": "15 3 * * 1-5", "timezone": "America/New_York"}}
    soon, working, paused, none = (f"d-{uuid.uuid4().hex[:8]}" for _ in range(4))
    deployment = shop.deploy(soon, schedules=[hourly | {"active": True}])
    shop.deploy(working, schedules=[weekdays | {"active": True}])
    shop.deploy(paused, schedules=[hourly | {"active": True}], paused=True)
    shop.deploy(none)
    due = datetime.now(UTC) + timedelta(minutes=7)
    for later in (timedelta(0), timedelta(hours=1)):
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": (due + later).isoformat()}}
        shop.ask("POST", f"/deployments/{deployment}/create_flow_run", {"state": state})
    [page] = loop.passes()
    active = [page.get("tidepool_schedule_active", deployment=each) for each in (soon, working, paused, none)]
    assert active == [1, 1, 0, None]
    assert page.get("tidepool_schedule_interval_seconds", deployment=soon) == 3600
    # Over a weekend, whose Sunday may have a clock change.
    assert page.get("tidepool_schedule_interval_seconds", deployment=working) == pytest.approx(3 * 86400, abs=3600)
    assert page.get("tidepool_schedule_interval_seconds", deployment=paused) is None
    # The server's own scheduler may have created the run of the full hour before that.
    coming = page.get("tidepool_schedule_next_timestamp_seconds", deployment=soon)
    assert time.time() - 60 < coming <= due.timestamp()
    assert page.get("tidepool_schedule_paused_seconds", deployment=paused) < 300
    assert page.get("tidepool_schedule_paused_seconds", deployment=soon) is None
    # No worker has ever polled a pool that active schedules use: as silent as one that died.
    assert page.get("tidepool_worker_last_heartbeat_timestamp_seconds", work_pool=shop.pool) == 0


def test_a_workers_heartbeat(shop: Shop, loop: Loop) -> None:
    shop.ask("POST", f"/work_pools/{shop.pool}/workers/heartbeat", {"name": "w1", "heartbeat_interval_seconds": 30})
    page = loop.passes(*[lambda _: None] * 10)[-1]  # two pools at a time, and other tests have some
    assert page.get("tidepool_workers_online", work_pool=shop.pool) == 1
    beat = page.get("tidepool_worker_last_heartbeat_timestamp_seconds", work_pool=shop.pool)
    assert beat == pytest.approx(time.time(), abs=300)


def test_a_removed_deployment_loses_its_series(shop: Shop, loop: Loop) -> None:
    name = f"d-{uuid.uuid4().hex[:8]}"
    deployment = shop.deploy(name)

    def remove(exporter: Exporter) -> None:
        shop.ask("DELETE", f"/deployments/{deployment}")
        exporter._inventory_due = 0

    before, after = loop.passes(remove)
    assert [each for each in before.samples if each.labels.get("deployment") == name]
    assert [each for each in after.samples if each.labels.get("deployment") == name] == []


def test_more_deployments_than_allowed_are_counted_together(
    shop: Shop, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_EXPORTER_DEPLOYMENTS", "1")
    settings.cache_clear()
    first, last = f"0-{uuid.uuid4().hex}", f"z-{uuid.uuid4().hex}"
    shop.deploy(first)
    deployment = shop.deploy(last)
    _, after = loop.passes(lambda _: shop.run(deployment, "Running", "Completed"))
    settings.cache_clear()
    [info] = [each.labels for each in after.samples if each.name == "tidepool_deployment_info"]
    assert info["deployment"] != last, "the first one by name"
    assert after.get("tidepool_exporter_truncated", part="deployments") == 1
    assert after.get(FINISHED, deployment="other", state="Completed") == 1
    assert after.get(FINISHED, deployment=last, state="Completed") is None


def test_more_than_a_refresh_reads_is_read_by_the_next_ones(
    shop: Shop, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of two: no end of a run is lost, no refresh takes more requests, and what is missing is reported."""
    monkeypatch.setattr(reader_module, "PAGE", 2)
    monkeypatch.setattr(reader_module, "_LIVE_PAGES", 1)
    # Otherwise each scan would read the runs of the one before it again.
    monkeypatch.setattr(reader_module, "_OVERLAP_SECONDS", 0.0)
    name = f"d-{uuid.uuid4().hex[:8]}"
    deployment = shop.deploy(name)

    def finish(_: Exporter) -> None:
        for _number in range(25):
            shop.run(deployment, "Completed")
        for _number in range(3):
            shop.run(deployment, "Running")

    pages = loop.passes(finish, *[lambda _: None] * 8)
    assert all(each.get("tidepool_exporter_refresh_requests") <= reader_module.REQUESTS for each in pages)
    assert pages[1].get("tidepool_exporter_truncated", part="live") == 1
    assert pages[1].get("tidepool_exporter_truncated", part="finished") == 1
    assert pages[-1].get("tidepool_exporter_truncated", part="finished") == 0
    assert pages[-1].get(FINISHED, deployment=name, state="Completed") == 25


def test_a_server_that_is_away_is_reported_and_the_figures_stay_for_a_while(
    shop: Shop, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client

    from tidepool.operate.exporter import figures

    name = f"d-{uuid.uuid4().hex[:8]}"
    shop.deploy(name)

    async def scenario() -> list[Page]:
        pages = []
        async with get_client() as client:
            exporter = Exporter(client, snapshot)
            for kept in (300, 300, 0):
                monkeypatch.setattr(figures, "KEPT_SECONDS", kept)
                await exporter.refresh()
                pages.append(Page(snapshot.page()))
                client._client.base_url = httpx.URL("http://127.0.0.1:9/api/")
        return pages

    pages = asyncio.run(scenario())
    assert [each.get("tidepool_prefect_api_up") for each in pages] == [1, 0, 0]
    info = [each.get("tidepool_deployment_info", deployment=name) for each in pages]
    assert info == [1, 1, None]
    # A counter stays: it would be a reset otherwise.
    assert pages[2].get(FINISHED, deployment=name, state="Completed") == 0
