"""States of flow runs on a real Prefect server, as the operator's loop sets them from what Kubernetes says."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import kr8s.asyncio
import pytest

from tests.integration.server_api import ask, make_unreadable
from tests.polling import until
from tidepool.errors import UsageError
from tidepool.operate.sweep import flow_run_loop, prefect_api
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.operate.sweep.flow_runs import decisions
from tidepool.operate.sweep.leftovers import Leftover
from tidepool.operate.sweep.loop import Exchange
from tidepool.operate.sweep.observation import Observation
from tidepool.operate.sweep.prefect_api import PrefectServerError, connect, one_pass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.conftest import KubernetesServer

Object = dict[str, Any]
# None of them is seen here.
WORKERS = DaskWorkers(datetime.now(UTC))

MINUTE = timedelta(minutes=1)
OOM = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}


@dataclass
class Server:
    """A Prefect server with one work pool of Kubernetes, and what Kubernetes has for its runs.

    Attributes:
        api: Its URL.
        pool: The work pool's name.
        jobs: The Jobs of namespace `ns`.
        pods: The drivers of that namespace.
    """

    api: str
    pool: str = field(default_factory=lambda: f"pool-{uuid.uuid4().hex[:8]}")
    jobs: list[Object] = field(default_factory=list)
    pods: list[Object] = field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask(self.api, method, path, body)

    def make_pool(self, name: str = "", kind: str = "kubernetes", namespace: str = "ns") -> str:
        variables = {"on_crash": {"default": "none"}, "start_timeout_seconds": {"default": 600}}
        template = {"variables": {"properties": variables}, "job_configuration": {"namespace": namespace}}
        body = {"name": name or self.pool, "type": kind, "base_job_template": template}
        return str(self.ask("POST", "/work_pools/", body)["name"])

    def deployment(self, pool: str = "", **job_variables: Any) -> str:
        flow = self.ask("POST", "/flows/", {"name": "sell"})["id"]
        every_minute = {"interval": 60, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": "UTC"}
        body = {
            "name": f"sell-{uuid.uuid4().hex[:8]}", "flow_id": flow, "work_pool_name": pool or self.pool,
            "job_variables": job_variables, "paused": True, "enforce_parameter_schema": False,
            "schedules": [{"schedule": every_minute, "active": True, "slug": "every-minute"}],
        }  # fmt: skip
        return str(self.ask("POST", "/deployments/", body)["id"])

    def start(self, deployment: str, *states: str, infrastructure: str = "ns:blue-heron", **more: Any) -> str:
        """Create a run, as a Prefect worker and a driver bring it into these states."""
        run = str(self.ask("POST", f"/deployments/{deployment}/create_flow_run", more)["id"])
        self.bring(run, *states, infrastructure=infrastructure)
        return run

    def bring(self, run: str, *states: str, infrastructure: str = "ns:blue-heron", early: bool = False) -> None:
        """Set states; `early`: also before the time for which the run is scheduled."""
        for name in states:
            kind = "PENDING" if name in {"Submitting", "InfrastructurePending"} else name.upper()
            body = {"state": {"type": kind, "name": name}, "force": early}
            answer = self.ask("POST", f"/flow_runs/{run}/set_state", body)
            assert answer["status"] == "ACCEPT", answer
            if infrastructure and name == "Pending":
                self.ask("PATCH", f"/flow_runs/{run}", {"infrastructure_pid": infrastructure})

    def state(self, run: str) -> tuple[str, str]:
        found = self.ask("GET", f"/flow_runs/{run}")["state"]
        return found["name"], found["message"]

    def history(self, run: str) -> list[str]:
        found = self.ask("GET", f"/flow_run_states/?flow_run_id={run}")
        return [each["name"] for each in sorted(found, key=lambda each: each["timestamp"])]

    def job(self, run: str, end: str = "", *, name: str = "blue-heron", age: float = 0) -> None:
        """Let Kubernetes have a Job for a run, from now on."""
        created = datetime.now(UTC) - timedelta(seconds=age)
        labels = {"prefect.io/flow-run-id": run, "app.kubernetes.io/component": "flow-run"}
        metadata = {
            "name": name, "namespace": "ns", "uid": f"uid-{name}", "labels": labels,
            "creationTimestamp": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        }  # fmt: skip
        conditions = [{"type": end, "status": "True", "lastTransitionTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}]
        self.jobs.append({"metadata": metadata, "spec": {}, "status": {"conditions": conditions if end else []}})

    def pod(self, run: str, phase: str, container: Object, *, name: str = "blue-heron") -> None:
        metadata = {
            "name": f"{name}-abcde", "uid": f"uid-{name}-abcde", "labels": {"prefect.io/flow-run-id": run},
            "creationTimestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "ownerReferences": [{"kind": "Job", "name": name, "uid": f"uid-{name}"}],
        }  # fmt: skip
        driver = {"image": "x", "resources": {"limits": {"memory": "1Gi"}}}
        status = {"phase": phase, "containerStatuses": [{"state": container}]}
        self.pods.append({"metadata": metadata, "spec": {"nodeName": "n", "containers": [driver]}, "status": status})

    def forget(self) -> None:
        """Let Kubernetes have nothing any more."""
        self.jobs.clear()
        self.pods.clear()

    def look(self, later: float = 10, *, between: Iterable[tuple[str, str]] = ()) -> None:
        """Decide as the loop would so many seconds from now, and carry it out.

        Args:
            later: Seconds from now.
            between: Runs, and the states that they get after the decision and before it is carried out.
        """

        async def once() -> None:
            async with connect([self.pool], ["ns"]) as server:
                now = datetime.now(UTC) + timedelta(seconds=later)
                async with one_pass():
                    runs = await server.read(now)
                    known = {each["metadata"]["labels"]["prefect.io/flow-run-id"] for each in self.jobs}
                    runs += await server.read_by_id(known - {each.id for each in runs})
                decided = decisions([Observation("ns", tuple(self.jobs), tuple(self.pods))], runs, now)
                for run, name in between:
                    await asyncio.to_thread(self.bring, run, name)
                await flow_run_loop.carry_out(await kr8s.asyncio.api(), server, decided, WORKERS)

        asyncio.run(once())


@pytest.fixture
def server(prefect_server: str, kubernetes: KubernetesServer) -> Server:
    kubernetes.answers = lambda _: (200, {})
    found = Server(prefect_server)
    found.make_pool()
    return found


def deleted(kubernetes: KubernetesServer) -> list[str]:
    return [each.split()[1].rpartition("/")[2] for each in kubernetes.requests if each.startswith("DELETE")]


# --- the driver is gone -----------------------------------------------------------------------------------------------


def test_a_run_whose_driver_died_is_crashed_once_with_the_cause(server: Server) -> None:
    run = server.start(server.deployment(), "Pending", "Submitting", "Running")
    server.job(run, "Failed")
    server.pod(run, "Failed", OOM)
    server.look()
    assert server.state(run) == ("Crashed", "driver out of memory (limit 1Gi); raise memory_limit")
    server.look(20)
    assert server.history(run).count("Crashed") == 1, "who is notified of crashes is notified once"
    (report,) = server.ask("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    assert report["key"].startswith("sell-")
    assert report["data"].startswith("# Crashed: driver out of memory (limit 1Gi); raise memory\\_limit\n")
    assert f"`prefect flow-run retry {run}`" in report["data"]


def test_a_run_that_completed_in_between_stays_completed(server: Server) -> None:
    run = server.start(server.deployment(), "Pending", "Running")
    server.job(run, "Complete")
    server.pod(run, "Succeeded", {"terminated": {"exitCode": 0}})
    server.look(between=[(run, "Completed")])
    assert server.state(run)[0] == "Completed"


def test_a_run_whose_job_is_gone_is_crashed(server: Server) -> None:
    run = server.start(server.deployment(), "Pending", "Running")
    server.look(30)
    assert server.state(run) == ("Crashed", "its Job was deleted")


def test_a_run_that_cannot_be_listed_hides_no_other(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    deployment = server.deployment()
    runs = [server.start(deployment, "Pending", "Running") for _ in range(5)]
    for number, run in enumerate(runs):
        server.job(run, "Failed", name=f"job-{number}")
    try:
        make_unreadable(server.api, runs[2])
        server.look(30)
        assert [server.state(run)[0] for run in runs if run != runs[2]] == ["Crashed"] * 4
        assert "cannot write out 1 of /flow_runs/filter" in caplog.text

        async def once() -> list[str]:
            async with connect([server.pool], ["ns"]) as client, one_pass():
                await client.read(datetime.now(UTC))
                await client.read(datetime.now(UTC))
                return [each.id for each in await client.read_by_id(runs)]

        caplog.clear()
        assert set(asyncio.run(once())) == {*runs} - {runs[2]}
        assert caplog.text.count("cannot write out") == 1, "once for each run, not for each reading"
    finally:
        server.ask("DELETE", f"/flow_runs/{runs[2]}")


def test_runs_of_others_are_left_alone(server: Server) -> None:
    """A pool of processes, one of another cluster, a Job of another namespace, and a run that is executed by hand."""
    process = server.make_pool(f"{server.pool}-process", "process")
    elsewhere = server.make_pool(f"{server.pool}-elsewhere", namespace="other")
    runs = [
        server.start(server.deployment(process), "Pending", "Running"),
        server.start(server.deployment(elsewhere), "Pending", "Running", infrastructure="other:x"),
        server.start(server.deployment(), "Pending", "Running", infrastructure="other:x"),
        server.start(server.deployment(), "Pending", "Running", infrastructure=""),
    ]
    pools = [server.pool, process, elsewhere]

    async def once() -> None:
        async with connect(pools, ["ns"]) as client, one_pass():
            now = datetime.now(UTC) + 10 * MINUTE
            found = await client.read(now)
            assert {each.id for each in found} == set(runs[2:])
            assert await client.read_by_id(runs[:2]) == []
            assert decisions([Observation("ns")], found, now) == []

    asyncio.run(once())


def test_the_last_lines_of_a_driver_are_in_the_runs_log(server: Server) -> None:
    run = server.start(server.deployment(), "Pending", "InfrastructurePending")
    server.job(run, "Failed")
    server.pod(run, "Failed", {"terminated": {"exitCode": 1, "message": "Traceback\nImportError: no flows"}})
    server.look()
    assert server.state(run) == ("Crashed", "driver ended with exit code 1: ImportError: no flows")
    body = {"logs": {"flow_run_id": {"any_": [run]}}}
    entries = until(lambda: server.ask("POST", "/logs/filter", body), lambda found: len(found) == 2)
    assert sorted((each["level"], each["message"]) for each in entries) == [
        (logging.ERROR, "Crashed: driver ended with exit code 1: ImportError: no flows"),
        (logging.ERROR, "The last lines of its driver:\nTraceback\nImportError: no flows"),
    ]


# --- it does not start ------------------------------------------------------------------------------------------------


def waits(server: Server, message: str, **policy: Any) -> str:
    run = server.start(server.deployment(**policy), "Pending", "Submitting")
    server.job(run)
    server.pod(run, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": message}})
    return run


def test_the_reason_for_a_wait_is_the_states_message_and_follows_it(
    server: Server, kubernetes: KubernetesServer
) -> None:
    run = waits(server, "x: not found")
    server.look()
    assert server.state(run) == ("InfrastructurePending", "image x cannot be pulled: not found")
    body = {"logs": {"flow_run_id": {"any_": [run]}}}
    [entry] = until(lambda: server.ask("POST", "/logs/filter", body))
    assert (entry["level"], entry["message"]) == (
        logging.WARNING,
        "InfrastructurePending: image x cannot be pulled: not found",
    )
    server.look(20)
    server.pods[0]["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "InvalidImageName"}}
    server.look(30)
    assert server.state(run) == ("InfrastructureWaiting", "image x cannot be pulled: invalid name")
    server.pods[0]["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "ContainerCreating"}}
    server.look(40)
    assert server.state(run) == ("InfrastructurePending", "its pod starts")
    assert server.history(run)[-4:] == [
        "Submitting",
        "InfrastructurePending",
        "InfrastructureWaiting",
        "InfrastructurePending",
    ]
    server.bring(run, "Running")
    assert deleted(kubernetes) == []


def test_running_that_comes_in_between_is_not_overwritten(server: Server) -> None:
    run = waits(server, "x: not found")
    server.look(between=[(run, "Running")])
    assert server.state(run)[0] == "Running"
    late = waits(server, "x: not found", start_timeout_seconds=30)
    server.look(60, between=[(late, "Running")])
    assert server.state(late)[0] == "Running"


def test_a_run_that_does_not_start_is_crashed_and_its_job_goes(server: Server, kubernetes: KubernetesServer) -> None:
    run = waits(server, "x: not found", start_timeout_seconds=60)
    server.look(50)
    assert server.state(run)[0] == "InfrastructurePending"
    assert deleted(kubernetes) == []
    server.look(70)
    assert server.state(run) == ("Crashed", "did not start within 60 s: image x cannot be pulled: not found")
    assert deleted(kubernetes) == ["blue-heron"]


def test_a_run_whose_job_was_not_made_is_given_to_a_worker_again(server: Server) -> None:
    run = server.start(server.deployment(), "Pending", "Submitting", infrastructure="")
    for attempt in range(1, 4):
        server.look(70)
        assert server.state(run) == ("Scheduled", f"no Prefect worker made its Job within 60 s; attempt {attempt} of 3")
        due = {"work_pool_queue_names": None, "scheduled_before": (datetime.now(UTC) + 2 * MINUTE).isoformat()}
        [offered] = server.ask("POST", f"/work_pools/{server.pool}/get_scheduled_flow_runs", due)
        assert offered["flow_run"]["id"] == run
        server.bring(run, "Pending", infrastructure="")
    server.look(70)
    assert server.state(run) == ("Crashed", "no Prefect worker made its Job in 4 attempts")


# --- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [["Pending"], ["Pending", "InfrastructurePending"], ["Pending", "Running"]], ids=str)
def test_a_run_whose_driver_is_gone_is_cancelled(server: Server, begun: list[str]) -> None:
    run = server.start(server.deployment(on_crash="retry 3"), *begun, "Cancelling")
    server.look(8)
    assert server.state(run) == ("Cancelled", "cancelled; its driver has ended")
    server.look(20)
    assert server.state(run)[0] == "Cancelled", "a person cancelled it: it is not executed again"


def test_a_cancelled_run_loses_the_job_that_cannot_start(server: Server, kubernetes: KubernetesServer) -> None:
    run = waits(server, "x: not found")
    server.bring(run, "Cancelling")
    server.look(3)
    assert deleted(kubernetes) == ["blue-heron"]
    server.forget()
    server.look(8)
    assert server.state(run)[0] == "Cancelled"


# --- policies ---------------------------------------------------------------------------------------------------------


def test_a_crashed_run_is_executed_again_as_the_same_run_two_times(server: Server) -> None:
    run = server.start(server.deployment(on_crash="retry 2"))
    for attempt in range(1, 4):
        server.bring(run, "Pending", "Running", early=attempt > 1)
        assert server.ask("GET", f"/flow_runs/{run}")["run_count"] == attempt
        server.job(run, "Failed", name=f"job-{attempt}")
        server.pod(run, "Failed", OOM, name=f"job-{attempt}")
        server.look()
        assert server.state(run)[0] == "Crashed"
        server.look(20)
        if attempt <= 2:
            message = f"retry {attempt} of 2 after a crash: driver out of memory (limit 1Gi); raise memory_limit"
            assert server.state(run) == ("AwaitingRetry", message)
        server.forget()
    server.look(60)
    assert server.state(run)[0] == "Crashed", "two retries"


@pytest.mark.parametrize("policy", [{}, {"on_crash": "none"}])
def test_without_a_policy_a_crashed_run_stays_crashed(server: Server, policy: Object) -> None:
    run = server.start(server.deployment(**policy), "Pending", "Running", "Crashed")
    server.look(60)
    assert server.state(run)[0] == "Crashed"


def test_a_run_that_was_cancelled_and_crashed_is_not_executed_again(server: Server) -> None:
    run = server.start(server.deployment(on_crash="retry 2"), "Pending", "Running", "Cancelling")
    crashed = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
    server.ask("POST", f"/flow_runs/{run}/set_state", crashed)
    server.look(60)
    assert server.state(run)[0] == "Crashed"


def test_a_run_may_have_another_policy_than_its_deployment(server: Server) -> None:
    deployment = server.deployment(on_crash="retry 2")
    run = server.start(deployment, "Pending", "Running", "Crashed", job_variables={"on_crash": "none"})
    server.look(60)
    assert server.state(run)[0] == "Crashed"


def late_runs(server: Server, policy: str) -> list[str]:
    """The twenty runs of a deployment that were due in the last twenty minutes, oldest first."""
    deployment = server.deployment(after_outage=policy)
    now = datetime.now(UTC)
    span = {"start_time": (now - 20 * MINUTE).isoformat(), "end_time": now.isoformat(), "min_runs": 20, "max_runs": 20}
    server.ask("POST", f"/deployments/{deployment}/schedule", span)
    body = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
    found = [each["id"] for each in server.ask("POST", "/flow_runs/filter", body)]
    assert len(found) == 20
    return found


def look_until_skipped(server: Server, runs: list[str]) -> None:
    """Look as often as the loop does: one whose state has just changed, to Late, is left to the next time."""

    def states() -> set[str]:
        server.look(0)
        return {server.state(each)[0] for each in runs}

    until(states, lambda found: found == {"Skipped"})


def test_of_twenty_late_runs_the_newest_is_executed(server: Server) -> None:
    *older, newest = late_runs(server, "latest")
    look_until_skipped(server, older)
    _, message = server.state(older[0])
    assert message.startswith("skipped by after_outage: latest: late, and a newer run of its schedule is due since ")
    assert server.state(newest)[0] in {"Scheduled", "Late"}


def test_all_or_none_of_the_late_runs_are_executed(server: Server) -> None:
    every = late_runs(server, "all")
    none = late_runs(server, "none")
    look_until_skipped(server, none[:-1])
    assert "Skipped" not in {server.state(each)[0] for each in every}


def test_a_run_is_ended_at_its_maximum_runtime(server: Server, kubernetes: KubernetesServer) -> None:
    run = server.start(server.deployment(max_runtime_seconds=60), "Pending", "Running")
    server.job(run)
    server.pod(run, "Running", {"running": {"startedAt": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}})
    server.look(50)
    assert server.state(run)[0] == "Running"
    server.look(70)
    assert server.state(run) == ("Failed", "ran longer than max_runtime_seconds (60)")
    assert deleted(kubernetes) == ["blue-heron"]


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_the_loop_reads_both_sides_and_tells_them_of_each_other(server: Server, kubernetes: KubernetesServer) -> None:
    deployment = server.deployment()
    lost = server.start(deployment, "Pending", "Running")
    done = server.start(deployment, "Pending", "Running", "Completed", infrastructure="ns:done")
    server.job(lost, "Failed")
    server.pod(lost, "Failed", OOM)
    server.job(done, "Complete", name="done")
    lists = {"jobs": server.jobs, "pods": server.pods}
    kubernetes.answers = lambda request: (
        200,
        {"items": lists.get(request.split()[1].partition("?")[0].rpartition("/")[2], [])},
    )
    exchange = Exchange()
    exchange.removed.append(Leftover("DaskCluster", "ns", f"dask-{server.pool}", "u", "its driver is gone", lost))

    async def scenario() -> None:
        watch = asyncio.create_task(flow_run_loop.watch(["ns"], [server.pool], exchange, WORKERS))
        async with asyncio.timeout(60):
            while (await asyncio.to_thread(server.state, lost))[0] != "Crashed":  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
        assert not watch.done()
        watch.cancel()

    asyncio.run(scenario())
    assert exchange.finished.keys() == {done}
    assert not exchange.removed
    body = {
        "filter": {
            "event": {"name": ["tidepool.cluster.removed"]},
            "resource": {"id": [f"tidepool.dask-cluster.ns.dask-{server.pool}"]},
        }
    }
    [event] = until(lambda: server.ask("POST", "/events/filter", body)["events"])
    assert event["payload"]["reason"] == "its driver is gone"
    assert [each["prefect.resource.id"] for each in event["related"]][:1] == [f"prefect.flow-run.{lost}"]


def test_nothing_is_done_while_kubernetes_cannot_be_read(server: Server, kubernetes: KubernetesServer) -> None:
    run = server.start(server.deployment(), "Pending", "Running")
    kubernetes.answers = lambda request: (503 if "/jobs" in request else 200, {"items": []})

    async def once() -> None:
        api = await kr8s.asyncio.api()
        async with connect([server.pool], ["ns"]) as client:
            await flow_run_loop.look(api, client, ["ns"], Exchange(), {}, WORKERS)

    with pytest.raises(Exception, match="refused to read jobs"):
        asyncio.run(once())
    assert server.state(run)[0] == "Running"


def test_one_decision_that_fails_does_not_keep_the_others(server: Server, kubernetes: KubernetesServer) -> None:
    stuck = waits(server, "x: not found", start_timeout_seconds=30)
    kubernetes.answers = lambda _: (403, {"message": "a policy forbids it"})
    other = server.start(server.deployment(), "Pending", "Running", infrastructure="ns:other")
    server.job(other, "Failed", name="other")
    server.pod(other, "Failed", OOM, name="other")
    with pytest.raises(
        flow_run_loop.DecisionError, match=r"1 decisions not carried out: flow run .*a policy forbids it"
    ):
        server.look(60)
    assert [server.state(each)[0] for each in (stuck, other)] == ["Crashed", "Crashed"]


@pytest.mark.usefixtures("prefect_server")
def test_a_server_that_is_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    async def once() -> None:
        async with connect(["kubernetes"], ["ns"]) as client, one_pass():
            await client.read(datetime.now(UTC))

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        with pytest.raises(PrefectServerError, match=r"^no answer: "):
            asyncio.run(once())
        monkeypatch.setattr(prefect_api, "_PASS_SECONDS", 0.0)
        with pytest.raises(PrefectServerError, match=r"^no answer within 0 s$"):
            asyncio.run(once())
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(UsageError, match="PREFECT_API_URL is not set"):
        asyncio.run(once())
