"""The stack of a drill: a Prefect server, and around it what on-call has, on this machine.

Faster than in production are polling intervals and the `for` of each alert. What Prefect's server decides by itself
(a late run, a work pool that is not ready) takes its time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from tests.conftest import Receiver
from tests.drill import runbook
from tests.helm.conftest import CHART
from tests.integration.server_api import ask
from tests.polling import until
from tests.prometheus import prometheus
from tidepool.local import pages
from tidepool.local.processes import Processes
from tidepool.local.server import Home, Server, free_port
from tidepool.operate.exporter.notifications import _ITEM
from tidepool.testing import migrated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from tests.prometheus import Prometheus

TOP = runbook.TOP
POOL = "local"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
FAST = {
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "1",
    "TIDEPOOL_EXPORTER_INTERVAL_SECONDS": "1",
}
SECONDS = 300
_SHOWN, _WIDTH = 12, 200


class Stack:
    """A local stack, and what a drill does with it.

    Args:
        server: The server, not yet started.
        out: Where the drill is told.
        variables: Environment variables of all processes and commands.
        receiver: Receives the messages.
    """

    def __init__(self, server: Server, out: Console, variables: dict[str, str], receiver: Receiver) -> None:
        self.server = server
        self.folder = server.home.path
        self.receiver = receiver
        self.exporter_port = free_port()
        self.prometheus: Prometheus | None = None
        self._out = out
        self._variables = variables
        self._processes = Processes(server.home.logs, variables)
        self._of_server = self._processes
        self._worker: subprocess.Popen[bytes] | None = None
        self._exporter: subprocess.Popen[bytes] | None = None
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**kept, **variables, "PATH": path, "NO_COLOR": "1", "COLUMNS": "160"}

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

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `python -m <arguments>` in the repository."""
        return self._processes.start(name, *arguments, cwd=TOP)

    def stop(self) -> None:
        """End all processes."""
        self._processes.stop_all()
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

    def start_exporter(self) -> None:
        """Start the exporter, or another one instead of it, which reads all deployments at once."""
        if self._exporter is not None:
            self._processes.stop("exporter")
        self._exporter = self.start("exporter", "tidepool.cli", "exporter", "--port", str(self.exporter_port))
        until(self._has_figures, seconds=SECONDS)

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
            for process in psutil.process_iter(["environ", "cmdline"]):
                mine = (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == run
                if mine and "tidepool.operate.engine" in (process.info["cmdline"] or ()):
                    process.kill()
            self.reaches(run, "CRASHED")
        finally:
            driver.stop_all()
        return run

    # --- the server ---------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request to the API."""
        return ask(self.server.api, method, path, body)

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

    def state(self, run: str) -> dict[str, Any]:
        """Return the state of a run."""
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run}")["state"]
        return found

    def reaches(self, run: str, *types: str) -> None:
        """Wait until a run has a state of one of these types.

        Raises:
            AssertionError: it has ended otherwise.
        """
        found = until(lambda: self.state(run), lambda state: state["type"] in {*types, *FINAL}, seconds=SECONDS)
        self.say("run", f"{run[:8]} {found['name']}: {found['message']}")
        assert found["type"] in types, f"run {run} is {found['name']}: {found['message']}"

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

    # --- what on-call sees --------------------------------------------------------------------------------------------

    def say(self, word: str, text: str) -> None:
        """Tell one thing of the drill."""
        self._out.print(f"{word:<10} {text}", markup=False, highlight=False, soft_wrap=True)

    def alert(self, name: str, **labels: str) -> None:
        """Wait until an alert fires; its runbook has to be a page."""
        if self.prometheus is None:
            self.say("alert", f"{name} is not evaluated: needs Debian's prometheus (make debian-tools)")
            return
        found = until(lambda: self._firing(name, labels), seconds=SECONDS)[0]
        self.say(
            "alert", f"{name}: {found['annotations']['summary']}  {self.page(found['annotations']['runbook_url'])}"
        )

    def message(self, *words: str) -> dict[str, str]:
        """Wait for a message with these words; the runbook in it has to be a page."""

        def arrived() -> list[dict[str, str]]:
            return [
                each
                for each in self.receiver.got
                if all(word in f"{each['title']}\n{each['message']}" for word in words)
            ]

        found = until(arrived, seconds=SECONDS)[0]
        self.say("message", f"{found['title']} | {' | '.join(found['message'].split(chr(10)))}")
        for word in found["message"].split():
            if "/docs/runbooks/" in word:
                self.page(word)
        return found

    def status(self, *kinds: str) -> list[dict[str, Any]]:
        """Wait until `tidepool status` has findings of these kinds, and return what is wrong."""

        def wrong() -> list[dict[str, Any]]:
            return [each for each in self._status()["findings"] if each["wrong"]]

        found = until(wrong, lambda now: set(kinds) <= {each["kind"] for each in now}, seconds=SECONDS)
        for each in found:
            self.say("status", f"{each['kind']}  {each['subject']}: {each['text']}  {each['runbook']}")
        return found

    def cause(self, run: str) -> None:
        """Wait for what on-call reads about the end of a run, and compare: it is one sentence.

        Raises:
            AssertionError: it differs between state, report, message and `tidepool status`.
        """
        state = self.state(run)
        sentence, name = state["message"], state["name"]
        told = self.message(f"tidepool status {run[:8]}", "Report: ")
        report = until(lambda: self._report(run), seconds=SECONDS)
        title = re.sub(r"\\([\\`*_\[\]<>])", r"\1", report.splitlines()[0]).removeprefix(f"# {name}: ")
        first = told["message"].splitlines()[0].strip("`").replace("\u200b", "")
        # A message has no arguments of an item, which may be secret (docs/on-call.md).
        wanted = {"report": sentence, "status": sentence, "message": _ITEM.sub("", sentence).replace("`", "'")}
        found = {"report": title, "status": self._status(run)["why"], "message": first}
        assert {source: " ".join(text.split()) for source, text in found.items()} == {
            source: " ".join(text.split()) for source, text in wanted.items()
        }, f"the cause differs from the state's: {sentence}"
        self.say("cause", f"state, report, message and status have the same sentence: {sentence}")
        for url in re.findall(r"\]\((https?://[^)]+)\)", report):
            self.page(url)

    def page(self, url: str) -> str:
        """Return the address of a runbook, which has to be a page; of another link, do not ask."""
        if "/docs/runbooks/" in url:
            httpx.get(url, timeout=10).raise_for_status()
        return url

    def green(self, *alerts: str) -> None:
        """Wait until nothing is wrong any more, and none of these alerts fires."""
        until(lambda: self._status()["wrong"], lambda wrong: not wrong, seconds=SECONDS)
        if self.prometheus is not None:
            for name in alerts:
                until(lambda name=name: self._firing(name, {}), lambda firing: not firing, seconds=SECONDS)
        self.say("green", f"tidepool status finds nothing wrong{''.join(f', {name} does not fire' for name in alerts)}")

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

    def execute(self, command: str, *, told: bool = False) -> str:
        """Execute a command in the repository; that `tidepool status` finds something wrong is not an error of it.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=TOP,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        if told:
            self.say("  $", command)
            for line in done.stdout.strip().splitlines()[:_SHOWN]:
                self.say("", line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…")
        expected = {0, 1} if command.startswith("tidepool status") else {0}
        assert done.returncode in expected, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    # --- readings -----------------------------------------------------------------------------------------------------

    def _status(self, run: str = "") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.execute(f"tidepool status {run} --json"))
        return found

    def _report(self, run: str) -> str:
        body = {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        found = self.ask("POST", "/artifacts/filter", body)
        return next((str(each["data"]) for each in found if str(each["key"]).endswith("-run")), "")

    def _firing(self, name: str, labels: dict[str, str]) -> list[dict[str, Any]]:
        assert self.prometheus is not None
        return [each for each in self.prometheus.alerts(name) if labels.items() <= each["labels"].items()]

    def _has_figures(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.exporter_port}/healthz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


@contextmanager
def stack(folder: Path, out: Console) -> Iterator[Stack]:
    """Run a stack in an empty folder for the duration of the block."""
    with ExitStack() as parts:
        receiver = parts.enter_context(Receiver())
        thread = Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        parts.callback(receiver.shutdown)
        documents = parts.enter_context(pages.served(TOP, free_port()))
        server = Server(Home(folder), free_port())
        shutil.copy(migrated(TOP / ".pytest_cache", folder / "prefect"), server.home.prefect / "prefect.db")
        variables = {
            **server.variables,
            **FAST,
            "TIDEPOOL_REPOSITORY_URL": documents,
            "TIDEPOOL_NOTIFY_URLS": receiver.target,
            "TIDEPOOL_STORAGE_ROOT": f"file://{folder}/storage",
            "TIDEPOOL_COMPUTE_PROVIDER": "threads",
            "TIDEPOOL_DEPLOY_ENVIRONMENT": "local",
            "TIDEPOOL_STATUS_TIMEOUT_SECONDS": "30",
            # A drill is about this machine: what a person's kubeconfig leads to is left alone.
            "KUBECONFIG": str(folder / "no-kubeconfig"),
        }
        made = Stack(server, out, variables, receiver)
        parts.callback(made.stop)
        made.say("stack", f"starting; the UI is at {server.url}/v2, logs are in {server.home.logs}")
        made.start_all()
        if shutil.which("prometheus"):
            rules = _shortened(folder, documents)
            made.prometheus = parts.enter_context(prometheus(folder, rules, made.exporter_port))
        yield made


def _shortened(folder: Path, documents: str) -> Path:
    """Write the rules with a shorter `for`, and with the runbooks' address as the chart gives it."""
    rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text(encoding="utf-8"))
    for rule in rules["groups"][0]["rules"]:
        if "for" in rule:
            rule["for"] = "3s"
        rule["annotations"]["runbook_url"] = f"{documents}/{rule['annotations']['runbook_url']}"
    path = folder / "alerts.yaml"
    path.write_text(yaml.safe_dump(rules))
    return path
