"""The parts of the Kubernetes provider that need no cluster: diagnosis, usage, versions, plugin, API."""

from __future__ import annotations

import inspect
import json
import sys
from contextlib import asynccontextmanager
from subprocess import run
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import kr8s
import pytest
from dask.config import collect_env

from tidepool.compute.clusters.kubernetes import pod_status, usage
from tidepool.compute.clusters.kubernetes.api import KubernetesApi, Unavailable
from tidepool.compute.clusters.preload import versions
from tidepool.errors import ClusterError
from tidepool.settings import SizeSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SIZE = SizeSettings(workers=2, cpu=0.5, memory_gib=2)


def pod(component: str = "worker", *containers: dict[str, Any], **conditions: dict[str, str]) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "labels": {"dask.org/component": component}},
        "spec": {},
        "status": {
            "containerStatuses": list(containers),
            "conditions": [{"type": name, **value} for name, value in conditions.items()],
        },
    }


OOM = {
    "restartCount": 1,
    "state": {"running": {}},
    "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
}
LOOP = {
    "restartCount": 2,
    "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}},
    "lastState": {
        "terminated": {"reason": "Error", "exitCode": 1, "message": "Traceback …\nImportError: no module x\n"}
    },
}
STARTING = {"restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}}
PULL = {"restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
NAME = {"restartCount": 0, "state": {"waiting": {"reason": "InvalidImageName", "message": "couldn't parse"}}}


# --- why a pod does not run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pods", "sentence"),
    [
        ([], ""),
        ([pod("worker", STARTING)], ""),
        ([pod("worker", PULL), pod("worker", PULL)], "worker waits: ImagePullBackOff not found"),
        ([pod("scheduler", LOOP)], "scheduler ended: Error (1), last line: ImportError: no module x"),
        (
            [
                pod(
                    "worker",
                    PodScheduled={"status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu."},
                )
            ],
            "worker not scheduled: 0/3 nodes are available: 3 Insufficient cpu.",
        ),
    ],
)
def test_the_reason_is_said_once_and_in_words(pods: list[dict[str, Any]], sentence: str) -> None:
    assert pod_status.why(pods) == sentence


@pytest.mark.parametrize(
    ("status", "never"), [(LOOP, True), (NAME, True), (PULL, False), (STARTING, False), (OOM, False)]
)
def test_only_what_time_does_not_heal_ends_the_wait(status: dict[str, Any], *, never: bool) -> None:
    assert bool(pod_status.hopeless([pod("worker", status)])) is never


def test_an_out_of_memory_kill_is_named() -> None:
    assert pod_status.last_end(pod("worker", OOM)) == "OOMKilled (137)"
    assert pod_status.last_end(pod("worker", STARTING)) == ""


# --- what was used ----------------------------------------------------------------------------------------------------


def counted(**worker: float) -> dict[str, Any]:
    one = {"name": "w", "seconds": 10.0, "threads": 2, "memory_limit": 2**31, "memory_peak": 2**29, "cpu_seconds": 3.0}
    return {"busy_seconds": 10.0, "workers": [{**one, **worker}, one]}


def test_usage_adds_up() -> None:
    used = usage.measure(counted(memory_peak=2**30), SIZE)
    assert (used.core_seconds, used.gib_seconds, used.cpu_seconds) == (10.0, 40.0, 6.0)
    assert used.idle_share == pytest.approx(1 - 10 / 40)
    assert used.memory_peak_gib == 1.0


def test_a_cluster_without_a_worker_used_nothing() -> None:
    used = usage.measure({"busy_seconds": 0.0, "workers": []}, SIZE)
    assert (used.core_seconds, used.idle_share) == (0, 1)


def test_the_page_holds_the_ends_of_the_logs_and_stays_within_its_limit() -> None:
    logs = [usage.PodLog(f"pod-{n}", "node", 1, "OOMKilled (137)", f"first {'x' * 50_000} last") for n in range(4)]
    page = usage.page("c", "where", {"asked for": 0.1}, usage.measure(counted(), SIZE), logs, limit=20_000)
    assert len(page.encode()) <= 20_000
    assert page.count("last\n") == 4
    assert "first" not in page
    assert "1 restarts, OOMKilled (137)" in page


def test_the_page_says_when_the_scheduler_was_lost() -> None:
    assert "not known" in usage.page("c", "where", {}, None, [], limit=20_000)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_difference_is_named() -> None:
    here = versions.versions()
    assert versions.difference(here, here) == ""
    assert versions.difference("python 3.11.7, dask 2026.8.0", "python 3.11.7, dask 2026.1.0") == (
        "dask 2026.8.0 here, dask 2026.1.0 there"
    )


def test_a_scheduler_imports_neither_prefect_nor_pandas() -> None:
    """That is most of a scheduler's start-up time; `remote` is what it unpickles with each graph."""
    code = (
        "import sys, tidepool.compute.clusters.preload.scheduler, tidepool.compute.worker.entry; "
        "sys.exit(', '.join({'prefect', 'pandas', 'pydantic', 'bokeh'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# --- the scheduler's plugin -------------------------------------------------------------------------------------------


def test_only_idle_workers_may_be_closed() -> None:
    from distributed.scheduler import Scheduler

    from tidepool.compute.clusters.preload.scheduler import ClusterPlugin

    # The hook is upstream's: workers_to_close asks it for each request to scale down.
    assert "valid_workers_downscaling" in inspect.getsource(Scheduler.workers_to_close)
    scheduler: Any = SimpleNamespace(workers={}, task_prefixes={})
    plugin = ClusterPlugin(scheduler)
    busy: Any = SimpleNamespace(processing={"a task"})
    idle: Any = SimpleNamespace(processing={})
    assert plugin.valid_workers_downscaling(scheduler, [busy, idle]) == [idle]


def test_a_worker_that_left_still_counts() -> None:
    from tidepool.compute.clusters.preload.scheduler import ClusterPlugin

    state = SimpleNamespace(
        name="w", nthreads=1, memory_limit=10, metrics={"tidepool": {"memory_peak": 7, "cpu_seconds": 2.0}}
    )
    prefix = SimpleNamespace(all_durations={"compute": 1.5})
    scheduler: Any = SimpleNamespace(workers={"tcp://w:1": state}, task_prefixes={"p": prefix})
    plugin = ClusterPlugin(scheduler)
    plugin.add_worker(scheduler, "tcp://w:1")
    scheduler.workers.clear()
    plugin.remove_worker(scheduler, "tcp://w:1", stimulus_id="s")
    told = plugin.usage()
    assert told["busy_seconds"] == 1.5
    assert told["workers"][0]["memory_peak"] == 7
    json.dumps(told)


def test_a_worker_does_not_pause_for_memory_that_its_libraries_hold() -> None:
    """It paused at 80 % and never went on: 410 of 512 MiB were imports. The flow waited for a worker that was there."""
    from tidepool.compute.clusters.kubernetes.cluster import _WORKER_VARIABLES

    assert collect_env(_WORKER_VARIABLES)["distributed"]["worker"]["memory"]["pause"] is False


# --- the Kubernetes API -----------------------------------------------------------------------------------------------


class Connection:
    """Stands for kr8s: answers what it is told, one after another."""

    namespace = "ns"

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    @asynccontextmanager
    async def call_api(self, method: str, *, url: str, **_options: object) -> AsyncIterator[httpx.Response]:
        self.asked.append((method, url))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer.is_error:
            raise kr8s.ServerError(answer.text, response=answer)
        yield answer


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[KubernetesApi, Connection]]:
    monkeypatch.setattr("tidepool.compute.clusters.kubernetes.api._RETRY_SECONDS", 0.001)

    def make(*answers: httpx.Response | Exception) -> tuple[KubernetesApi, Connection]:
        connection: Any = Connection(*answers)
        return KubernetesApi(connection, "ns"), connection

    return make


CLUSTER = {"kind": "DaskCluster", "metadata": {"name": "c"}}


@pytest.mark.anyio
async def test_a_name_that_is_taken_creates_nothing(api: Callable[..., tuple[KubernetesApi, Connection]]) -> None:
    client, _ = api(httpx.Response(409, text="exists"))
    assert await client.create(CLUSTER) is None


@pytest.mark.anyio
async def test_an_api_that_is_away_is_asked_again(api: Callable[..., tuple[KubernetesApi, Connection]]) -> None:
    client, connection = api(
        httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(200, json={"items": []})
    )
    client.be_patient(60)
    assert await client.pods("c") == []
    assert len(connection.asked) == 3


@pytest.mark.anyio
async def test_without_patience_it_is_not(api: Callable[..., tuple[KubernetesApi, Connection]]) -> None:
    client, _ = api(httpx.ConnectError("refused"))
    with pytest.raises(Unavailable, match="refused"):
        await client.pods("c")


@pytest.mark.anyio
async def test_a_refusal_is_said_with_the_apis_own_words(api: Callable[..., tuple[KubernetesApi, Connection]]) -> None:
    client, _ = api(httpx.Response(403, text="exceeded quota: dask"))
    client.be_patient(60)
    with pytest.raises(ClusterError, match="refused POST daskclusters in namespace ns: exceeded quota: dask"):
        await client.create(CLUSTER)


@pytest.mark.anyio
async def test_what_is_gone_is_gone(api: Callable[..., tuple[KubernetesApi, Connection]]) -> None:
    client, _ = api(httpx.Response(404), httpx.Response(404), httpx.Response(400))
    assert await client.cluster("c") is None
    await client.delete_cluster("c")
    assert await client.log("p", 10) == ""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
