"""What on-call has beside a Prefect server: the exporter, its alerts and messages, and `tidepool status`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from tests.conftest import Receiver
from tests.drill import runbook
from tests.helm.conftest import CHART
from tests.integration.server_api import ask
from tests.polling import until
from tests.prometheus import prometheus
from tidepool.local import pages
from tidepool.local.processes import Processes
from tidepool.local.server import free_port
from tidepool.operate.exporter.notifications import _ITEM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from tests.prometheus import Prometheus

TOP = runbook.TOP
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
SECONDS = 300
_SHOWN, _WIDTH = 12, 200


class OnCall:
    """What on-call sees of a Prefect server.

    Args:
        api: URL of its API.
        logs: Folder for the logs of the processes that this starts.
        out: Where it is told.
        variables: Environment variables of all processes and commands.
        receiver: Receives the messages.
    """

    def __init__(self, api: str, logs: Path, out: Console, variables: dict[str, str], receiver: Receiver) -> None:
        self.api = api
        self.receiver = receiver
        self.exporter_port = free_port()
        self.prometheus: Prometheus | None = None
        self._out = out
        self._variables = variables
        self._processes = Processes(logs, variables)
        self._exporter: subprocess.Popen[bytes] | None = None
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**kept, **variables, "PATH": path, "NO_COLOR": "1", "COLUMNS": "160"}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `python -m <arguments>` in the repository."""
        return self._processes.start(name, *arguments, cwd=TOP)

    def stop(self) -> None:
        """End the processes that this has started."""
        self._processes.stop_all()

    def start_exporter(self) -> None:
        """Start the exporter, or another one instead of it, which reads all deployments at once."""
        if self._exporter is not None:
            self._processes.stop("exporter")
        self._exporter = self.start("exporter", "tidepool.cli", "exporter", "--port", str(self.exporter_port))
        until(self._has_figures, seconds=SECONDS)

    @contextmanager
    def alerts(self, folder: Path) -> Iterator[None]:
        """Evaluate the alerts for its exporter, where Prometheus is installed; files are in the folder."""
        if shutil.which("prometheus") is None:
            yield
            return
        rules = _shortened(folder, self._variables["TIDEPOOL_REPOSITORY_URL"])
        with prometheus(folder, rules, self.exporter_port) as self.prometheus:
            yield

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request to the API."""
        name, found, password = self._variables.get("PREFECT_API_AUTH_STRING", "").partition(":")
        return ask(self.api, method, path, body, (name, password) if found else None)

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

    def told(self, *words: str) -> dict[str, str]:
        """Wait for a message with these words."""

        def arrived() -> list[dict[str, str]]:
            return [
                each
                for each in self.receiver.got
                if all(word in f"{each['title']}\n{each['message']}" for word in words)
            ]

        return until(arrived, seconds=SECONDS)[0]

    def message(self, *words: str) -> dict[str, str]:
        """Wait for a message with these words, and tell it; the runbook in it has to be a page."""
        found = self.told(*words)
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

    # --- commands and readings ----------------------------------------------------------------------------------------

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
def around(variables: dict[str, str]) -> Iterator[tuple[dict[str, str], Receiver]]:
    """Serve the runbooks and receive messages; yield the variables, with their addresses, and the receiver."""
    with ExitStack() as parts:
        receiver = parts.enter_context(Receiver())
        thread = Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        parts.callback(receiver.shutdown)
        documents = parts.enter_context(pages.served(TOP, free_port()))
        yield (
            {
                **variables,
                "TIDEPOOL_EXPORTER_INTERVAL_SECONDS": "1",
                "TIDEPOOL_REPOSITORY_URL": documents,
                "TIDEPOOL_NOTIFY_URLS": receiver.target,
                "TIDEPOOL_STATUS_TIMEOUT_SECONDS": "30",
            },
            receiver,
        )


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
