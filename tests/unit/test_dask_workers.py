"""The Dask workers of a run as the operator sees them, and what the report of a dead driver says of them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.test_sweep_reports import DEPLOYMENT, RUN
from tidepool.operate.sweep import flow_run_loop, reports
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.operate.sweep.loop import Exchange
from tidepool.operate.sweep.observation import Observation, connect
from tidepool.operate.sweep.records import Decision, FlowRun, Policy, State

if TYPE_CHECKING:
    from tests.conftest import KubernetesServer

START = datetime(2026, 11, 27, 11, 58, tzinfo=UTC)
ID = RUN["id"]
OOM = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
Object = dict[str, Any]


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def named(name: str, labels: dict[str, str], **more: Any) -> Object:
    return {"name": name, "uid": f"uid-{name}", "namespace": "ns", "labels": labels, **more}


def driver(phase: str = "Running", run: str = ID, **more: Any) -> Object:
    return {"metadata": named("driver", {"prefect.io/flow-run-id": run}, **more), "status": {"phase": phase}}


def cluster(name: str = "c-1", asked: str = "3 x 2 threads, 2 CPU, 4 GiB", run: str = ID, **labels: str) -> Object:
    written = {"annotations": {"tidepool.dev/workers": asked}, "creationTimestamp": at(2).isoformat()}
    return {"metadata": named(name, {"tidepool.dev/flow-run-id": run, **labels}, **written)}


def worker(name: str, began: float = 10, phase: str = "Running", run: str = ID, **more: Any) -> Object:
    labels = {"dask.org/component": more.pop("component", "worker"), "tidepool.dev/flow-run-id": run}
    resources = {"limits": {"cpu": "2", "memory": "4Gi"}}
    status: Object = {"phase": phase, "startTime": at(began).isoformat()}
    if restarts := more.pop("restarts", 0):
        status["containerStatuses"] = [{"restartCount": restarts, "lastState": more.pop("last", {})}]
    status |= more.pop("status", {})
    return {
        "metadata": named(name, labels, **more),
        "spec": {"containers": [{"resources": resources}]},
        "status": status,
    }


class Watched:
    """A run with a driver and one cluster, from START on; the operator began a minute before."""

    def __init__(self, *clusters: Object, since: float = -60) -> None:
        self.workers = DaskWorkers(at(since))
        self.look(2, *(clusters or [cluster()]))

    def look(self, seconds: float, *clusters: Object, drivers: tuple[Object, ...] = (driver(),)) -> None:
        self.workers.see_clusters(Observation("ns", drivers=drivers, clusters=clusters), at(seconds))

    def pods(self, seconds: float, *pods: Object, of: Object | None = None) -> None:
        self.workers.see_pods([of or driver()], pods, at(seconds))

    def figures(self) -> tuple[int, int, int, float, float]:
        found = self.workers.of(ID)
        assert found is not None
        of = found.workers
        return of.asked, of.had, of.lost, of.core_seconds, of.gib_seconds

    def page(self) -> str:
        return str(reports.artifact("x", DEPLOYMENT, RUN, [], [], 200, self.workers)["data"])


def test_workers_count_from_their_start_to_where_they_were_last_seen() -> None:
    run = Watched()
    run.pods(20, worker("a"), worker("b"), worker("late", phase="Pending"), worker("s", component="scheduler"))
    assert run.figures() == (3, 2, 0, 40, 80)
    run.pods(30, worker("a"))
    assert run.figures() == (3, 2, 0, 60, 120), "one was killed between two looks"
    run.look(31, cluster(), cluster("c-2", asked="1 x 2 threads"))
    assert run.figures()[0] == 4, "each cluster once"


def test_a_worker_that_ended_is_lost_with_its_cause() -> None:
    run = Watched()
    run.pods(20, worker("a", restarts=1, last=OOM))
    run.pods(30, worker("a", restarts=1, last=OOM), worker("b", phase="Failed", status={"reason": "Evicted"}))
    run.pods(40, worker("a", restarts=3, last={"terminated": {"exitCode": 137}}), worker("c", restarts=1))
    found = run.workers.of(ID)
    assert found is not None
    assert found.workers.lost == 5
    assert [text for _, text in found.events] == [
        "Dask cluster c-1 created",
        "worker a lost: out of memory (137)",
        "worker b lost: evicted",
        "worker a lost 2 times: killed by SIGKILL (137)",
        "worker c lost: cause unknown",
    ]


@pytest.mark.parametrize(
    ("of", "pod"),
    [
        (driver("Failed"), {}),
        (driver(deletionTimestamp=at(19).isoformat()), {}),
        (driver(), {"deletionTimestamp": at(19).isoformat()}),
        (driver(run="another"), {}),
    ],
)
def test_a_worker_that_goes_with_its_driver_or_its_cluster_is_not_lost(of: Object, pod: Object) -> None:
    run = Watched()
    run.pods(20, worker("a", restarts=1, last=OOM, **pod), of=of)
    assert run.figures() == (3, 1, 0, 20, 40)


def test_only_a_run_with_a_driver_has_workers_and_only_those_of_its_own_namespace_and_cluster() -> None:
    """The label of a cluster and its pods is the run's own."""
    run = Watched(cluster(run="invented"))
    run.pods(20, worker("a", run="invented"))
    assert run.workers.of("invented") is None
    assert run.workers.of(ID) is None
    run.look(21, cluster("shared", **{"tidepool.dev/shared-cluster": "warm"}), cluster("other"))
    assert run.figures() == (3, 0, 0, 0, 0)
    run.pods(30, worker("elsewhere", namespace="team-b"))
    assert run.figures() == (3, 0, 0, 0, 0)


def test_runs_that_ended_are_forgotten() -> None:
    run = Watched()
    run.look(3601, drivers=())
    assert run.workers.of(ID) is not None
    run.look(3602, drivers=())
    assert run.workers.of(ID) is None


def test_of_an_invented_number_of_clusters_some_are_kept() -> None:
    run = Watched(*(cluster(f"c-{number}", asked="x") for number in range(500)))
    found = run.workers.of(ID)
    assert found is not None
    assert (found.workers.asked, len(found.events)) == (0, 20)


def test_the_report_of_a_dead_driver_has_its_workers_and_says_who_saw_them() -> None:
    run = Watched()
    run.pods(20, worker("a", restarts=1, last=OOM), worker("b"))
    page = run.page()
    for part in (
        "knows of its task runs, and the operator of its Dask workers: it looks every ten seconds",
        "does not know their memory, and counts no pod as lost that was gone in between.",
        "| workers | 3 asked, 2 had, 1 lost |",
        "| core-seconds | 40.0 |",
        "| GiB-seconds | 80.0 |",
        "- +2.0 s: Dask cluster c-1 created",
        "worker a lost: out of memory (137)",
    ):
        assert part in page, page
    assert "largest memory" not in page


@pytest.mark.parametrize(
    ("since", "seen", "words"),
    [
        (-60, True, "Dask workers: it looks"),
        (5, True, "Dask workers since 11:58:05 UTC, when it began: it looks"),
        (-60, False, "its task runs.\n"),
        (5, False, "its task runs; its Dask workers, if it had any, are unknown: the operator began after the run.\n"),
    ],
)
def test_the_report_says_what_is_not_known(since: float, words: str, *, seen: bool) -> None:
    run = Watched(*([] if seen else [cluster(run="another")]), since=since)
    assert words in run.page()
    assert ("## Dask cluster" in run.page()) is seen


def test_a_run_that_never_began_had_no_workers() -> None:
    found = reports.artifact("x", {}, {**RUN, "start_time": None}, [], [], 200, DaskWorkers(at(5)))
    assert "Dask" not in found["data"]


def test_the_loop_over_flow_runs_shows_the_clusters_and_its_reports_have_them(kubernetes: KubernetesServer) -> None:
    def answer(request: str) -> tuple[int, Any]:
        items = (
            [cluster()]
            if "daskclusters" in request
            else [driver() | {"spec": {"nodeName": "n"}}]
            if "pods" in request
            else []
        )
        return 200, {"items": items}

    class Server:
        """A Prefect server with a run that has just crashed."""

        told: DaskWorkers | None = None

        async def read(self, _: datetime) -> list[Any]:
            return []

        async def read_by_id(self, _: set[str]) -> list[Any]:
            return []

        async def set_state(self, _: Decision) -> bool:
            return True

        async def report_end(self, _: FlowRun, workers: DaskWorkers) -> None:
            self.told = workers

        async def log(self, _: Decision) -> None:
            """Take the reason for the log of the run."""

    kubernetes.answers = answer
    server: Any = Server()
    workers = DaskWorkers(at(0))
    crashed = State("", "CRASHED", "Crashed", "its Job was deleted", at(9))
    run = FlowRun(ID, "n", State("1", "RUNNING", "Running", "", at(1)), Policy(), "ns:j", "", "", at(0))

    async def scenario() -> None:
        api = await connect()
        await flow_run_loop.look(api, server, ["ns"], Exchange(), {}, workers)
        await flow_run_loop.carry_out(api, server, [Decision(run, crashed)], workers)

    asyncio.run(scenario())
    found = workers.of(ID)
    assert found is not None
    assert found.workers.asked == 3
    assert server.told is workers
