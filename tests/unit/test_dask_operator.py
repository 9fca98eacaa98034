"""The Dask operator's start, and its end when one of its loops fails."""

from __future__ import annotations

import asyncio
import copy
import signal
import threading
from typing import TYPE_CHECKING, Any

import httpx
import kopf
import pytest
from dask_kubernetes.operator.controller import controller

from tidepool.local.server import free_port
from tidepool.operate import allocation, dask_operator, idle_clusters, refusals
from tidepool.operate.sweep import flow_run_loop
from tidepool.operate.sweep import loop as sweep
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.settings import settings as tidepool_settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Watch = Callable[..., Awaitable[None]]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[kopf.OperatorRegistry]:
    """A copy of the controller's handlers, which the operator changes."""
    original = kopf.get_default_registry()
    registry = copy.copy(original)
    registry._spawning = copy.copy(original._spawning)
    registry._changing = copy.copy(original._changing)
    monkeypatch.setattr(controller, "build_default_worker_group_spec", controller.build_default_worker_group_spec)
    kopf.set_default_registry(registry)
    yield registry
    tidepool_settings.cache_clear()
    kopf.set_default_registry(original)


async def forever(*_: object) -> None:
    await asyncio.Event().wait()


async def start(
    monkeypatch: pytest.MonkeyPatch,
    idle: Watch = forever,
    left: Watch = forever,
    runs: Watch = forever,
    counted: Watch = forever,
) -> kopf.Memo:
    monkeypatch.setattr(idle_clusters, "watch", idle)
    monkeypatch.setattr(sweep, "watch", left)
    monkeypatch.setattr(flow_run_loop, "watch", runs)
    monkeypatch.setattr(allocation, "watch", counted)
    memo = kopf.Memo()
    settings = kopf.OperatorSettings()
    await dask_operator.prepare(settings=settings, memo=memo)
    assert settings.scanning.disabled, "a Role allows no list of the cluster's namespaces"
    return memo


def test_loops_replace_the_timer(registry: kopf.OperatorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[tuple[object, ...]] = []
    monkeypatch.setenv("TIDEPOOL_OPERATOR_NAMESPACES", "runs media")
    monkeypatch.setenv("TIDEPOOL_OPERATOR_WORK_POOLS", "kubernetes gpu")
    tidepool_settings.cache_clear()

    async def watch(*given: object) -> None:
        watched.append(given)
        await forever()

    async def scenario() -> None:
        memo = await start(monkeypatch, watch, watch, watch, watch)
        await asyncio.sleep(0)
        idle, left, counted, runs = watched
        assert idle == (["runs", "media"],)
        exchange = left[1]
        assert left[:2] == (["runs", "media"], exchange)
        assert runs[:3] == (["runs", "media"], ["kubernetes", "gpu"], exchange), "the two loops tell each other"
        assert isinstance(runs[3], DaskWorkers)
        assert counted[::2] == (["runs", "media"], runs[3]), "the loop that sees pods tells the one that writes reports"
        await dask_operator.end(memo=memo)
        await asyncio.wait(memo.loops, timeout=30)
        assert all(each.cancelled() for each in memo.loops)

    asyncio.run(scenario())
    [timer] = registry._spawning.get_all_handlers()
    assert timer.fn.__wrapped__ is controller.daskautoscaler_adapt


@pytest.mark.parametrize("kind", ["DaskCluster", "DaskWorkerGroup", "DaskAutoscaler", "DaskJob"])
def test_no_step_of_the_controller_comes_before_the_check(
    kind: str, registry: kopf.OperatorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each handler of each kind, whatever a new controller adds, ends with a refusal."""

    async def no(manifest: dict[str, Any], _: str) -> list[str]:
        return [f"no {manifest['kind']}"]

    async def scenario() -> None:
        memo = await start(monkeypatch)
        monkeypatch.setattr(refusals, "_reasons", no)
        monkeypatch.setattr(kopf, "warn", lambda *_, **__: None)
        handlers = [*registry._changing.get_all_handlers(), *registry._spawning.get_all_handlers()]
        body = kopf.Body({"kind": kind, "metadata": {"name": "x"}, "spec": {}})
        for each in handlers:
            with pytest.raises(kopf.PermanentError, match=f"refused: no {kind}"):
                await each.fn(body=body, namespace="ns", patch=kopf.Patch(), name="x", spec={}, logger=None)
        assert len(handlers) > 10
        await dask_operator.end(memo=memo)

    asyncio.run(scenario())


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("loop", "name"),
    [
        ("idle", "watch over idle clusters"),
        ("left", "sweep of what runs leave behind"),
        ("runs", "watch over flow runs"),
        ("counted", "count of what runs have requested"),
    ],
)
def test_the_operator_ends_with_its_loops(
    loop: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminated = threading.Event()
    monkeypatch.setenv("TIDEPOOL_OPERATOR_WORK_POOLS", "kubernetes")
    tidepool_settings.cache_clear()

    async def watch(*_: object) -> None:
        raise ValueError("no credentials")

    async def scenario() -> None:
        memo = await start(monkeypatch, **{loop: watch})
        await asyncio.wait(memo.loops, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)

    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        asyncio.run(scenario())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert terminated.is_set()
    assert f"the {name} has ended" in caplog.text
    assert "no credentials" in caplog.text


@pytest.mark.usefixtures("registry")
def test_metrics_are_served_at_their_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("TIDEPOOL_OPERATOR_METRICS_PORT", str(port))
    monkeypatch.setenv("TIDEPOOL_OPERATOR_NAMESPACES", "runs")
    tidepool_settings.cache_clear()

    async def scenario() -> str:
        memo = await start(monkeypatch)
        answer = await asyncio.to_thread(httpx.get, f"http://127.0.0.1:{port}/metrics", timeout=60)
        await dask_operator.end(memo=memo)
        return answer.text

    assert (
        'tidepool_reaper_last_sweep_timestamp_seconds{run_namespace="runs"} 0.0' in asyncio.run(scenario()).splitlines()
    )
