"""Every panel of the dashboards has data in a real Prometheus that scrapes the exporter and the operator's figures."""

from __future__ import annotations

import asyncio
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from helm import dashboards
from tests.helm.conftest import CHART, need
from tests.integration.server_api import ask
from tests.polling import until
from tests.prometheus import Prometheus, prometheus
from tidepool.operate.allocation import Allocation
from tidepool.operate.exporter.service import Exporter, Snapshot
from tidepool.operate.metrics import OPERATOR, Metrics
from tidepool.operate.sweep.figures import SweepFigures
from tidepool.operate.sweep.leftovers import Leftover
from tidepool.operate.sweep.observation import Observation
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMESPACE = "flow-runs"


def operators() -> tuple[Metrics, SweepFigures, Allocation]:
    """Return an operator's figures, and what writes them."""
    metrics = Metrics(OPERATOR)
    begun = datetime.now(UTC) - timedelta(hours=2)
    return metrics, SweepFigures(metrics, [NAMESPACE]), Allocation(NAMESPACE, metrics, begun)


def observe(figures: SweepFigures, allocation: Allocation, deployment: str, hours: int) -> None:
    """Let the operator see a driver that has run for some hours, a Dask cluster and something left behind."""
    began = datetime.now(UTC) - timedelta(hours=2)
    labels = {"prefect.io/flow-run-id": "r1", "prefect.io/flow-name": "sell", "prefect.io/deployment-name": deployment}
    driver = {
        "metadata": {"name": "driver", "uid": "d1", "labels": labels},
        "spec": {"containers": [{"resources": {"requests": {"cpu": "2", "memory": "4Gi"}}}]},
        "status": {"phase": "Running", "startTime": began.isoformat()},
    }
    allocation.count([driver], [], began + timedelta(hours=hours))
    cluster = {"metadata": {"name": "c1", "uid": "c1", "creationTimestamp": began.isoformat()}}
    left = Leftover("DaskCluster", NAMESPACE, "c1", "c1", "its driver pod is gone")
    figures.observed(Observation(NAMESPACE, clusters=(cluster,)), [left])


@pytest.fixture
def deployment(prefect_server: str) -> Iterator[str]:
    """The name of a deployment with a schedule, a next run, an unfinished and a late one, in a pool with a worker."""
    pool = f"0-{uuid.uuid4().hex[:8]}"
    ask(prefect_server, "POST", "/work_pools/", {"name": pool, "type": "kubernetes", "concurrency_limit": 7})
    ask(prefect_server, "POST", f"/work_pools/{pool}/workers/heartbeat", {"name": "w1"})
    hourly = {"interval": 3600, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": "UTC"}
    body = {
        "name": f"d-{uuid.uuid4().hex[:8]}",
        "flow_id": ask(prefect_server, "POST", "/flows/", {"name": "sell"})["id"],
        "work_pool_name": pool,
        "tags": ["tier:1", "owner:media"],
        "schedules": [{"schedule": hourly, "active": True}],
    }
    made = ask(prefect_server, "POST", "/deployments/", body)["id"]
    for minutes in (7, -60):
        due = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
        ask(prefect_server, "POST", f"/deployments/{made}/create_flow_run", {"state": state})
    yield body["name"]
    ask(prefect_server, "DELETE", f"/work_pools/{pool}")


def finish(api: str, deployment: str, *ends: str) -> None:
    """Let runs of a deployment end one after another."""
    made = ask(api, "GET", f"/deployments/name/sell/{deployment}")["id"]
    for end in ends:
        run = ask(api, "POST", f"/deployments/{made}/create_flow_run", {})["id"]
        for state in ("RUNNING", end):
            ask(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": state}, "force": True})


def test_every_panel_has_data(
    prefect_server: str, deployment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("prometheus")
    from prefect.client.orchestration import get_client
    from prometheus_client import start_http_server

    monkeypatch.setenv("TIDEPOOL_EXPORTER_BUDGETS", '{"media": 12}')
    monkeypatch.setenv("TIDEPOOL_OPERATOR_CORE_HOUR_PRICE", "1")
    settings.cache_clear()
    metrics, figures, allocation = operators()
    served, thread = start_http_server(0, "127.0.0.1", metrics.registry)

    async def scenario(snapshot: Snapshot, prometheus: Prometheus) -> None:
        """Let both pages change once while Prometheus looks."""
        async with get_client() as client:
            exporter = Exporter(client, snapshot)
            await exporter.refresh()
            observe(figures, allocation, deployment, hours=1)
            await asyncio.to_thread(prometheus.scrape)
            await asyncio.to_thread(finish, prefect_server, deployment, "COMPLETED", "FAILED", "CRASHED")
            await exporter.refresh()
            observe(figures, allocation, deployment, hours=2)
            await asyncio.to_thread(prometheus.scrape)

    with (
        Snapshot("127.0.0.1", 0) as snapshot,
        prometheus(tmp_path, CHART / "files" / "alerts.yaml", snapshot.server_port, served.server_port) as found,
    ):
        threading.Thread(target=snapshot.serve_forever, daemon=True).start()
        try:
            asyncio.run(scenario(snapshot, found))
            fired = 'ALERTS{alertname="TidepoolRunsFailing", alertstate="firing"}'
            until(lambda: found.query(fired))
            empty = [
                f"{board.title}: {panel.title}: {legend}"
                for board in dashboards.ALL.values()
                for row in board.rows
                for panel in row.panels
                for legend, expr in panel.queries.items()
                if not found.query(expr.replace("$flow", "sell").replace("$deployment", deployment))
            ]
        finally:
            snapshot.shutdown()
            served.shutdown()
            thread.join(10)
            settings.cache_clear()
    assert empty == []
