"""Core-seconds, GiB-seconds and their price, from the pods of flow runs."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tidepool.operate import allocation
from tidepool.operate.allocation import Allocation
from tidepool.operate.metrics import OPERATOR, Metrics
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.operate.sweep.observation import Observation
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import KubernetesServer

START = datetime(2026, 11, 27, 3, 0, tzinfo=UTC)
Object = dict[str, Any]


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def pod(name: str, began: float, cpu: str, memory: str, phase: str = "Running", **labels: str) -> Object:
    resources = {"requests": {"cpu": cpu}, "limits": {"memory": memory}}  # memory: a limit counts as a request
    return {
        "metadata": {"name": name, "namespace": "ns", "uid": f"uid-{name}", "labels": labels},
        "spec": {"containers": [{"resources": resources}]},
        "status": {"phase": phase, "startTime": at(began).isoformat()},
    }


def driver(began: float, **more: Any) -> Object:
    names = {"prefect.io/flow-run-id": "r1", "prefect.io/flow-name": "sell", "prefect.io/deployment-name": "nightly"}
    return pod("driver", began, "500m", "1Gi", **names, **more)


def worker(name: str, began: float, run: str = "r1", **more: Any) -> Object:
    return pod(name, began, "2", "4Gi", **{"dask.org/component": "worker", "tidepool.dev/flow-run-id": run}, **more)


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    def put(core: str, gib: str) -> None:
        monkeypatch.setenv("TIDEPOOL_OPERATOR_CORE_HOUR_PRICE", core)
        monkeypatch.setenv("TIDEPOOL_OPERATOR_GIB_HOUR_PRICE", gib)
        settings.cache_clear()

    yield put
    settings.cache_clear()


class Counted:
    """An allocation of namespace `ns`, since START, and its figures."""

    def __init__(self) -> None:
        self.metrics = Metrics(OPERATOR)
        self.allocation = Allocation("ns", self.metrics, START)

    def get(self, name: str, kind: str, flow: str = "sell", deployment: str = "nightly") -> float | None:
        labels = {"run_namespace": "ns", "flow": flow, "deployment": deployment, "component": kind}
        return self.metrics.registry.get_sample_value(f"tidepool_run_{name}_total", labels)


def test_a_pod_counts_from_its_start_to_where_it_was_last_seen() -> None:
    counted = Counted()
    counted.allocation.count([driver(10)], [worker("w1", 30)], at(40))
    assert (counted.get("core_seconds", "driver"), counted.get("core_seconds", "worker")) == (15, 20)
    assert (counted.get("gib_seconds", "driver"), counted.get("gib_seconds", "worker")) == (30, 40)
    # One worker was killed after 40 s: it counts until then. Another one began.
    counted.allocation.count([driver(10)], [worker("w2", 45)], at(50))
    assert (counted.get("core_seconds", "driver"), counted.get("core_seconds", "worker")) == (20, 30)
    assert counted.get("cost", "driver") is None, "no price is set"


def test_pods_that_do_not_run_do_not_count() -> None:
    counted = Counted()
    ended = [worker("w1", 0, phase="Succeeded"), worker("w2", 0, phase="Pending")]
    counted.allocation.count([driver(0, phase="Failed")], ended, at(60))
    assert counted.get("core_seconds", "driver") is None
    assert counted.get("core_seconds", "worker") is None


def test_what_the_last_operator_counted_is_not_counted_again() -> None:
    counted = Counted()
    counted.allocation.count([driver(-7200)], [], at(10))
    assert counted.get("core_seconds", "driver") == 5


def test_pods_of_an_unknown_run_are_counted_together() -> None:
    """A run writes this label itself: it must not make series."""
    counted = Counted()
    counted.allocation.count([driver(0)], [worker("w1", 0, run="invented"), worker("w2", 0, run="none")], at(10))
    assert counted.get("core_seconds", "worker", "other", "other") == 40
    assert counted.get("core_seconds", "worker") is None


def test_the_price_of_core_hours_and_gib_hours(prices: Callable[[str, str], None]) -> None:
    prices("0.04", "0.005")
    counted = Counted()
    counted.allocation.count([], [worker("w1", 0, run="none")], at(3600))
    assert counted.get("cost", "worker", "other", "other") == pytest.approx(2 * 0.04 + 4 * 0.005)


def test_the_loop_reads_both_kinds_of_pods(kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    began = datetime.now(UTC) - START
    monkeypatch.setattr(allocation, "_POLL_SECONDS", 0.001)

    def answer(request: str) -> tuple[int, Any]:
        seconds = began.total_seconds()
        return 200, {"items": [driver(seconds)] if "flow-run" in request else [worker("w1", seconds)]}

    kubernetes.answers = answer
    metrics, workers = Metrics(OPERATOR), DaskWorkers(START)
    workers.see_clusters(Observation("ns", drivers=(driver(0),)), datetime.now(UTC))
    labels = {"run_namespace": "ns", "flow": "sell", "deployment": "nightly", "component": "worker"}

    async def scenario() -> None:
        watch = asyncio.create_task(allocation.watch(["ns"], metrics, workers))
        async with asyncio.timeout(60):
            while not metrics.registry.get_sample_value("tidepool_run_core_seconds_total", labels):  # noqa: ASYNC110 - the server is another thread
                await asyncio.sleep(0.001)
        watch.cancel()

    asyncio.run(scenario())
    found = workers.of("r1")
    assert found is not None, "the same pods are shown to what writes reports"
    assert found.workers.had == 1
