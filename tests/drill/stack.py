"""The stack of a drill: a Prefect server, and around it what on-call has, on this machine.

Faster than in production are polling intervals and the `for` of each alert. What Prefect's server decides by itself
(a late run, a work pool that is not ready) takes its time.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psutil

from tests.drill import runbook
from tests.drill.on_call import SECONDS, TOP, OnCall, around
from tests.polling import until
from tidepool.local.processes import Processes
from tidepool.local.server import Home, Server, free_port
from tidepool.operate import engine
from tidepool.testing import migrated

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from tests.conftest import Receiver


POOL = "local"
FAST = {
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "1",
}


class Stack(OnCall):
    """A local stack, and what a drill does with it.

    Args:
        server: The server, not yet started.
        out: Where the drill is told.
        variables: Environment variables of all processes and commands.
        receiver: Receives the messages.
    """

    def __init__(self, server: Server, out: Console, variables: dict[str, str], receiver: Receiver) -> None:
        super().__init__(server.api, server.home.logs, out, variables, receiver)
        self.server = server
        self.folder = server.home.path
        self._of_server = self._processes
        self._worker: subprocess.Popen[bytes] | None = None

    # --- its parts ----------------------------------------------------------------------------------------------------

    def start_all(self) -> None:
        """Start server, deployments, Prefect worker and exporter."""
        # Prefect reads its settings when it is imported, which listing the drills does not need.
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        from tidepool.local.demo import create_work_pool

        self.start_server()
        with temporary_settings({PREFECT_API_URL: self.server.api}), get_client(sync_client=True) as client:
            create_work_pool(client, POOL)
        self.execute("tidepool apply --no-record")
        self.start_worker()
        self.start_exporter()

    def stop(self) -> None:
        """End all processes."""
        super().stop()
        self._of_server.stop_all()

    def start_server(self, **variables: str) -> None:
        """Start the server, or another one instead of it, with further variables."""
        self._of_server.stop_all()
        self._of_server = Processes(self.server.home.logs, {**self._variables, **variables})
        self.server.start(self._of_server)

    def start_worker(self) -> None:
        """Start a Prefect worker, and wait until the pool has one."""
        command = ("worker", "start", "--pool", POOL, "--type", "process", "--install-policy", "never")
        self._worker = self.start("worker", "prefect", *command)
        until(
            lambda: self.ask("GET", f"/work_pools/{POOL}")["status"], lambda status: status == "READY", seconds=SECONDS
        )

    def kill_worker(self) -> None:
        """Kill the Prefect worker."""
        assert self._worker is not None
        self._worker.kill()
        self._processes.stop("worker")

    def drive(self, deployment: str) -> str:
        """Execute a run as its pod on Kubernetes does, kill the flow's process, and return the run."""
        run = self.create(deployment, state={"type": "PENDING"})
        more = {**self._variables, "PREFECT__FLOW_RUN_ID": run}
        driver = Processes(self.server.home.logs, more)
        try:
            driver.start(f"driver-{run}", "tidepool.operate.flow_run", cwd=TOP)
            self.reaches(run, "RUNNING")
            for process in psutil.process_iter(["environ", "name"]):
                mine = (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == run
                if mine and process.info["name"] == engine.NAME:
                    process.kill()
            self.reaches(run, "CRASHED")
        finally:
            driver.stop_all()
        return run

    # --- the server ---------------------------------------------------------------------------------------------------

    def deployment(self, name: str) -> dict[str, Any]:
        """Return a deployment; its flow has the same name."""
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}/{name}")
        return found

    def configure(self, name: str, **parameters: Any) -> None:
        """Change parameters of a deployment."""
        found = self.deployment(name)
        self.ask("PATCH", f"/deployments/{found['id']}", {"parameters": {**found["parameters"], **parameters}})

    def raise_tier(self, name: str) -> None:
        """Make a deployment tier 2: of tier 3 nothing is told. A new exporter reads it at once."""
        found = self.deployment(name)
        tags = ["tier:2", *(each for each in found["tags"] if not each.startswith("tier:"))]
        self.ask("PATCH", f"/deployments/{found['id']}", {"tags": tags})
        self.start_exporter()

    def create(self, name: str, **options: Any) -> str:
        """Create a run of a deployment."""
        return str(self.ask("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", options)["id"])

    def fail(self, name: str, times: int = 2, **options: Any) -> str:
        """Have runs of a deployment fail one after another; return the first."""
        runs = []
        for _ in range(times):
            runs.append(self.create(name, **options))
            self.reaches(runs[-1], "FAILED")
        return runs[0]

    def age(self, run: str, minutes: float) -> None:
        """Make the state of a run older, in the database: the API sets the present time."""
        at = f"{datetime.now(UTC) - timedelta(minutes=minutes):%Y-%m-%d %H:%M:%S.%f}"
        database = sqlite3.connect(self.server.home.prefect / "prefect.db", timeout=60)
        with closing(database), database:
            database.execute(
                "UPDATE flow_run_state SET timestamp=? WHERE id=(SELECT state_id FROM flow_run WHERE id=?)", (at, run)
            )

    @contextmanager
    def within(self, name: str, seconds: float) -> Iterator[None]:
        """Let an automation wait for fewer seconds."""
        [found] = [each for each in self.ask("POST", "/automations/filter", {}) if each["name"] == name]
        body = {key: value for key, value in found.items() if key not in {"id", "created", "updated"}}
        path = f"/automations/{found['id']}"
        self.ask("PUT", path, {**body, "trigger": {**body["trigger"], "within": seconds}})
        yield
        self.ask("PUT", path, body)

    # --- the runbook --------------------------------------------------------------------------------------------------

    def diagnose(self, name: str, **values: str) -> None:
        """Execute the commands under Diagnosis."""
        address = f"{self._variables['TIDEPOOL_REPOSITORY_URL']}/{runbook.path(name)}"
        self.say("runbook", f"{runbook.path(name)}  {self.page(address)}")
        self._execute(name, runbook.DIAGNOSIS, (), values, {})

    def mitigate(
        self, name: str, *causes: str, instead: dict[str, Callable[[], None]] | None = None, **values: str
    ) -> None:
        """Execute the commands under Mitigation for these causes.

        Args:
            name: Name of the runbook.
            causes: Words before the commands.
            instead: What the drill does for a command of kubectl that contains these words.
            values: Values of the blanks.
        """
        self._execute(name, runbook.MITIGATION, causes, values, instead or {})

    def fixed(self, name: str, **values: str) -> None:
        """Execute the commands that show that it is fixed."""
        self._execute(name, runbook.FIXED, (), values, {})

    def _execute(
        self,
        name: str,
        section: str,
        causes: tuple[str, ...],
        values: dict[str, str],
        instead: dict[str, Callable[[], None]],
    ) -> None:
        known = {"work pool": POOL}
        known |= {blank.replace("_", " ").replace("flow run", "flow-run"): value for blank, value in values.items()}
        for block in runbook.chosen(name, section, *causes):
            for command in (runbook.filled(each, known) for each in block.commands):
                if not command.startswith("kubectl"):
                    assert not runbook.BLANK.search(command), f"{command}: the drill has no value for its blank"
                    self.execute(command, told=True)
                    continue
                stand_in = next((act for words, act in instead.items() if words in command), None)
                self.say("  (k8s)", f"{command}{'' if stand_in is None else '  # here: the drill does it'}")
                if stand_in is not None:
                    stand_in()


@contextmanager
def stack(folder: Path, out: Console) -> Iterator[Stack]:
    """Run a stack in an empty folder for the duration of the block."""
    server = Server(Home(folder), free_port())
    shutil.copy(migrated(TOP / ".pytest_cache", folder / "prefect"), server.home.prefect / "prefect.db")
    local = {
        **server.variables,
        **FAST,
        "TIDEPOOL_STORAGE_ROOT": f"file://{folder}/storage",
        "TIDEPOOL_COMPUTE_PROVIDER": "threads",
        "TIDEPOOL_DEPLOY_ENVIRONMENT": "local",
        # A drill is about this machine: what a person's kubeconfig leads to is left alone.
        "KUBECONFIG": str(folder / "no-kubeconfig"),
    }
    with around(local) as (variables, receiver), ExitStack() as parts:
        made = Stack(server, out, variables, receiver)
        parts.callback(made.stop)
        made.say("stack", f"starting; the UI is at {server.url}/v2, logs are in {server.home.logs}")
        made.start_all()
        parts.enter_context(made.alerts(folder))
        yield made
