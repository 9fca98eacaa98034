"""Each automation of automations.yaml: its cause fires it once, a healthy run does not, and the message that arrives.

`within` is shorter here; all else is as in the file.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.states import Cancelled, Cancelling, InfrastructurePending, Pending, Running, Scheduled, State, Submitting

from tests.integration.flow_run_process import Pod
from tests.polling import until
from tidepool.deploy.config import automations
from tidepool.operate.sweep.leftovers import Leftover
from tidepool.operate.sweep.prefect_api import FlowRuns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from tests.conftest import Receiver
    from tidepool.local.server import Server

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning"),  # by a plug-in of Apprise
]

TOP = Path(__file__).parents[2]
ENTRIES = {each.name: each for each in automations.load(TOP).automations}
# The shortest that Prefect accepts for what must not happen.
SECONDS = 10
PROBE = "test.probe"


class Alerts:
    """The automations of automations.yaml on a server, and the messages that they send."""

    def __init__(self, server: Server, receiver: Receiver, block_id: str) -> None:
        self.server = server
        self._receiver = receiver
        self._block_id = block_id

    @contextmanager
    def on(self, *names: str, within: float | None = None) -> Iterator[None]:
        """Have the server evaluate these automations, and no others, for the duration of the block."""
        with get_client(sync_client=True) as client:
            created = []
            for name in names:
                model = automations.model(ENTRIES[name], "test", {automations.NOTIFY: self._block_id})
                body = model.model_dump(mode="json", exclude={"owner_resource"})
                if within is not None:
                    body["trigger"]["within"] = within
                created.append(self._create(client, body))
            trigger = {"type": "event", "posture": "Reactive", "expect": [PROBE], "threshold": 1, "within": 0}
            action = {"type": "send-notification", "block_document_id": self._block_id}
            action |= {"subject": "{{ event.resource.id }}", "body": PROBE}
            created.append(self._create(client, {"name": PROBE, "trigger": trigger, "actions": [action]}))
            try:
                self.evaluated()
                yield
            finally:
                for each in created:
                    client.request("DELETE", f"/automations/{each}")

    def _create(self, client: Any, body: dict[str, Any]) -> str:
        return str(client.request("POST", "/automations/", json=body).json()["id"])

    def evaluated(self) -> None:
        """Wait until the server has evaluated what has happened so far, and sent the messages."""
        mark = f"test.{uuid4().hex}"

        def passed() -> bool:
            emit_event(PROBE, resource={"prefect.resource.id": mark})
            return any(mark in each["title"] for each in self._receiver.got)

        until(passed, seconds=60)

    def messages(self) -> list[tuple[str, str]]:
        """Return subject and text of each message that an automation of the file has sent."""
        return [(each["title"], each["message"]) for each in self._receiver.got if PROBE not in each["message"]]

    def link(self, run: FlowRun) -> str:
        """Return the address of a run's page."""
        return f"{self.server.url}/v2/runs/flow-run/{run.id}"


@pytest.fixture
def alerts(prefect_server: Server, receiver: Receiver) -> Alerts:
    from prefect.blocks.notifications import SlackWebhook

    # As `tidepool apply` makes it of TIDEPOOL_NOTIFY_URLS.
    block: Any = SlackWebhook(url=receiver.target)  # type: ignore[arg-type]
    name = automations.notify_block(f"test-{uuid4().hex[:8]}")
    return Alerts(prefect_server, receiver, str(block.save(name, overwrite=True, _sync=True)))


@pytest.fixture
def pod(prefect_server: Server, tmp_path: Path) -> Pod:
    return Pod(tmp_path, prefect_server.api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30")


@pytest.fixture
def new_run(prefect_server: Server) -> Callable[..., FlowRun]:
    """Creates a run of a new deployment, which no process executes, or another one of the same."""
    assert prefect_server.is_healthy()

    def create(name: str, *states: State[Any]) -> FlowRun:
        with get_client(sync_client=True) as client:
            flow_id = client.create_flow_from_name(f"flow-{name}")
            deployment = client.create_deployment(flow_id=flow_id, name=name, entrypoint="flows.py:flow", path=".")
            run = client.create_flow_run_from_deployment(deployment, state=states[0])
            move(run, *states[1:])
            return run

    return create


def move(run: FlowRun, *states: State[Any]) -> None:
    """Set a run's states, as its Prefect worker, its observer or its process do."""
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run.id, state)


def states(run_id: UUID) -> list[str]:
    with get_client(sync_client=True) as client:
        return [str(state.name) for state in client.read_flow_run_states(run_id)]


def lines(*parts: str) -> str:
    return "\n".join(parts)


# --- notify -----------------------------------------------------------------------------------------------------------


def test_crash_loop(alerts: Alerts, pod: Pod) -> None:
    """Two crashes of a deployment are not reported, a third one is, and the fourth is not again."""
    with alerts.on("crash-loop"):
        runs = [pod.create(name) for name in ("is_killed", "ends_at_once") * 2]
        for run, process in [(run, pod.start(run)) for run in runs]:
            pod.end(run, process)
        alerts.evaluated()
        assert alerts.messages() == []
        third = pod.execute("is_killed").flow_run
        alerts.evaluated()
        pod.execute("is_killed")
        alerts.evaluated()
    assert third.state is not None
    assert alerts.messages() == [
        (
            "is_killed crashes again and again",
            lines(
                f"Three crashes within an hour, the last one: {third.state.message}",
                alerts.link(third),
                "Runbook: docs/runbooks/crash-loop.md",
            ),
        )
    ]


def test_runs_late(alerts: Alerts, new_run: Callable[..., FlowRun]) -> None:
    """No Prefect worker takes runs that are due: two of one deployment, three of another, and a fourth."""
    due = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=1))

    def late(count: int, name: str) -> list[FlowRun]:
        runs = [new_run(name, due) for _ in range(count)]
        until(lambda: all(states(run.id)[-1] == "Late" for run in runs))
        alerts.evaluated()
        return runs

    with alerts.on("runs-late"):
        late(2, "two-late")
        assert alerts.messages() == []
        three = late(3, "three-late")
        late(1, "three-late")
    [(subject, text)] = alerts.messages()
    assert subject == "three-late is late"
    first, look, link, runbook = text.splitlines()
    cause = "the work pool is paused, has no working worker, or is full."
    assert first == f"Three runs were late within ten minutes: {cause}"
    assert look == "What is wrong now: `tidepool status`"
    assert link in [alerts.link(run) for run in three]
    assert runbook == "Runbook: docs/runbooks/runs-late.md"


def test_nothing_completed_and_nothing_starts(alerts: Alerts) -> None:
    """While runs of ticket-model-evaluation start and end, only the weekly forecast is missed; then all are."""
    names = {
        "no completed ticket-model-evaluation for 30 minutes": (
            "It runs every minute. Runbook: docs/runbooks/no-ticket-model-evaluation.md"
        ),
        "no completed weekly-forecast for eight days": (
            "It runs on Mondays. Runbook: docs/runbooks/no-weekly-forecast.md"
        ),
        "no run started for 15 minutes": "Some deployments run every minute. Runbook: docs/runbooks/no-run-starts.md",
    }
    weekly = "no completed weekly-forecast for eight days"

    @flow(name="ticket-model-evaluation")
    def evaluate() -> None:
        """End at once."""

    def subjects() -> list[str]:
        return [subject for subject, _ in alerts.messages()]

    with alerts.on("no-ticket-model-evaluation", "no-weekly-forecast", "no-run-starts", within=SECONDS):
        until(lambda: evaluate() or subjects().count(weekly), lambda fired: fired == 2)
        assert set(subjects()) == {weekly}
        until(lambda: set(subjects()) == set(names))
    assert dict(alerts.messages()) == names


def test_work_pool_not_ready(alerts: Alerts, tmp_path: Path) -> None:
    """The Prefect worker of one pool is killed, that of another lives."""
    pools = [f"pool-{uuid4().hex[:6]}" for _ in range(2)]
    workers = []

    def status(pool: str) -> str:
        query = {"work_pools": {"name": {"any_": [pool]}}}
        with get_client(sync_client=True) as client:
            return "".join(each["status"] for each in client.request("POST", "/work_pools/filter", json=query).json())

    try:
        for pool in pools:
            command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool]
            environment = {**os.environ, "PREFECT_WORKER_HEARTBEAT_SECONDS": "1"}
            workers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL))
        until(lambda: [status(pool) for pool in pools] == ["READY", "READY"], seconds=120)
        with alerts.on("work-pool-not-ready"):
            workers[0].kill()
            until(lambda: status(pools[0]) == "NOT_READY", seconds=120)
            alerts.evaluated()
            assert status(pools[1]) == "READY"
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    text = "No worker polls it: no new run starts. Runbook: docs/runbooks/work-pool-not-ready.md"
    assert alerts.messages() == [(f"work pool {pools[0]} is not ready", text)]


def test_drift_found(alerts: Alerts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what Git has is on the server."""
    from flows.operations.flow import drift_report

    monkeypatch.chdir(TOP)
    with alerts.on("drift-found"):
        found = drift_report("local", end_pauses=False)
        alerts.evaluated()
    [(subject, text)] = alerts.messages()
    assert subject == f"drift: local: {found['differences']} differ from Git"
    assert "deployment `csv-etl/csv-etl`" in text
    assert text.endswith("Runbook: docs/runbooks/drift-found.md")


def test_run_stuck_cancelling(alerts: Alerts, new_run: Callable[..., FlowRun]) -> None:
    """Two runs that were cancelled have no driver that ends; the driver of a third confirms its end."""
    with alerts.on("run-stuck-cancelling", within=SECONDS):
        ended = new_run("ends", Running(), Cancelling())
        stuck = [new_run("stuck", Running(), Cancelling())]
        move(ended, Cancelled())
        until(lambda: len(alerts.messages()) == 1)
        # When the second one fires, the time of the others is over.
        stuck.append(new_run("stuck", Running(), Cancelling()))
        until(lambda: len(alerts.messages()) > 1)
        alerts.evaluated()
    assert alerts.messages() == [
        (
            "flow-stuck is still Cancelling",
            lines(
                f"stuck, run {run.name}: a cancellation takes a minute, this one has taken three.",
                f"What has not ended: `tidepool status {run.id}`",
                alerts.link(run),
                "Runbook: docs/runbooks/run-stuck-cancelling.md",
            ),
        )
        for run in stuck
    ]


def test_run_stuck_pending(alerts: Alerts, new_run: Callable[..., FlowRun]) -> None:
    """The pods of two runs do not start, that of a third does."""
    # The last two take turns, as the operator sets them.
    waiting = (
        Submitting(),
        InfrastructurePending(),
        Pending(name="InfrastructureWaiting"),
    )
    with alerts.on("run-stuck-pending", within=SECONDS):
        starts = new_run("starts", Pending(), *waiting)
        stuck = [new_run("stuck-pending", Pending(), *waiting)]
        move(starts, Running())
        until(lambda: len(alerts.messages()) == 1)
        stuck.append(new_run("stuck-pending", Pending(), *waiting))
        until(lambda: len(alerts.messages()) > 1)
        alerts.evaluated()
    assert alerts.messages() == [
        (
            "flow-stuck-pending has not started",
            lines(
                f"stuck-pending, run {run.name}: Pending for 20 minutes.",
                f"The reason, its Job and pod: `tidepool status {run.id}`",
                alerts.link(run),
                "Runbook: docs/runbooks/run-stuck-pending.md",
            ),
        )
        for run in stuck
    ]
    assert states(stuck[0].id) == ["Pending", "Submitting", "InfrastructurePending", "InfrastructureWaiting"]


def test_cluster_removed(alerts: Alerts) -> None:
    """The operator tells the server of two clusters that it has deleted."""
    removed = [
        Leftover("DaskCluster", "runs", name, "uid", "its driver pod is gone") for name in ("weekly-1", "weekly-2")
    ]

    async def report() -> None:
        async with get_client() as client:
            server = FlowRuns(client, pools=(), namespaces=())
            for cluster in removed:
                await server.report_removed(cluster)

    with alerts.on("cluster-removed"):
        asyncio.run(report())
        alerts.evaluated()
    assert alerts.messages() == [
        (
            f"Dask cluster {cluster.name} was left behind",
            lines("Deleted from namespace runs: its driver pod is gone.", "Runbook: docs/runbooks/cluster-removed.md"),
        )
        for cluster in removed
    ]


# --- repair -----------------------------------------------------------------------------------------------------------


def test_run_without_heartbeat(alerts: Alerts, pod: Pod) -> None:
    """A process is killed and nothing looks after it; another one ends in order."""
    with alerts.on("run-without-heartbeat", within=SECONDS):
        ended = pod.execute("completes").flow_run
        lost = pod.create("waits")
        process = pod.start(lost, module="prefect.engine", PREFECT__FLOW_ENTRYPOINT="flows.py:waits")
        until(pod.hook.exists, seconds=60)
        until(lambda: "prefect.flow-run.heartbeat" in events(lost.id))
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: states(lost.id)[-1] == "Crashed")
        alerts.evaluated()
    assert states(lost.id).count("Crashed") == 1
    assert states(ended.id)[-1] == "Completed"
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(lost.id).state
    assert state is not None
    assert state.message == "No heartbeat for five minutes; the process is presumed lost."


def events(run_id: UUID) -> set[str]:
    query = {"filter": {"resource": {"id": [f"prefect.flow-run.{run_id}"]}}, "limit": 50}
    with get_client(sync_client=True) as client:
        return {each["event"] for each in client.request("POST", "/events/filter", json=query).json()["events"]}


def test_every_automation_is_tried_here() -> None:
    """A test of its name, or of several."""
    tried = set(Path(__file__).read_text().split('"'))
    assert [name for name in ENTRIES if name not in tried] == []
