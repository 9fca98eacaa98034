"""A Prefect server on this machine, on SQLite: of the demo, of a single run, of the tests and of the benchmarks.

A repository's is in `.tidepool/`: `prefect/` (the database: the history of runs), `logs/`, `storage/`. The demo keeps a
server up for people and for `tidepool run`; without a demo `tidepool run` starts one for the duration of the run.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from tidepool.errors import TidepoolError, UsageError
from tidepool.local.processes import Processes, end_marked, file_lock
from tidepool.settings import environment, repository

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

# Prefect's default is a transaction per event: a flow of a thousand tasks keeps SQLite locked for minutes, and others
# get 503. In batches the server needs a quarter of the CPU (docs/decisions/0013-*.md).
RECORD_IN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    **{
        f"PREFECT_SERVER_SERVICES_{service}_{size}": "200"
        for service in ("TASK_RUN_RECORDER", "EVENT_PERSISTER")
        for size in ("BATCH_SIZE", "READ_BATCH_SIZE")
    },
}
_START_SECONDS = 180
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Home:
    """The folder of a server's files, created if absent; not in Git."""

    path: Path

    def __post_init__(self) -> None:
        for folder in (self.prefect, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, repository: Path) -> Home:
        """Give the home of a repository."""
        return cls(repository / ".tidepool")

    @property
    def prefect(self) -> Path:
        """PREFECT_HOME: the database, and what Prefect keeps beside it."""
        return self.path / "prefect"

    @property
    def logs(self) -> Path:
        """The output of each process, in a file of its name."""
        return self.path / "logs"

    @property
    def record(self) -> Path:
        """The port and the mark of the running demo, as JSON."""
        return self.path / "demo.json"

    def demo_server(self) -> Server | None:
        """Give the server of the running demo, or None."""
        with file_lock(self.path / "demo.lock") as free:
            if free or not self.record.is_file():
                return None
        server = Server(self, int(json.loads(self.record.read_text())["port"]))
        return server if server.is_healthy() else None

    @contextmanager
    def only_demo(self) -> Iterator[None]:
        """Keep every other demo of this repository out, and clear away what a killed one left behind.

        Raises:
            UsageError: another one is up.
        """
        with file_lock(self.path / "demo.lock") as free:
            if not free:
                server = self.demo_server()
                where = f" at {server.url}" if server else ""
                raise UsageError(f"a demo of this repository is already running{where}; stop it with Ctrl-C there")
            if self.record.is_file():
                end_marked(str(json.loads(self.record.read_text())["mark"]))
                self.record.unlink()
            try:
                yield
            finally:
                self.record.unlink(missing_ok=True)


def demo_api() -> str:
    """Return the URL of the API of this repository's running demo; empty without one."""
    try:
        path = repository() / ".tidepool"
    except UsageError:
        return ""
    # Asked first: `Home` would create the folders.
    server = Home(path).demo_server() if (path / "demo.json").is_file() else None
    return server.api if server else ""


@dataclass(frozen=True)
class Server:
    """A Prefect server that only this machine can reach."""

    home: Home
    port: int

    @property
    def url(self) -> str:
        """The URL of the user interface."""
        return f"http://{_HOST}:{self.port}"

    @property
    def api(self) -> str:
        """The URL of the API."""
        return f"{self.url}/api"

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of the server and of its clients."""
        return {
            "PREFECT_HOME": str(self.home.prefect),
            "PREFECT_API_URL": self.api,
            # Links that Prefect writes lead to the default user interface.
            "PREFECT_UI_URL": f"{self.url}/v2",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            **RECORD_IN_BATCHES,
            # A run must not crash because the machine is loaded.
            "PREFECT_CLIENT_MAX_RETRIES": "15",
            # Both spellings: whichever is set, the lower-case one wins where a library reads both.
            **dict.fromkeys(("NO_PROXY", "no_proxy"), _not_by_proxy(_HOST)),
        }

    def is_healthy(self) -> bool:
        """Ask the server whether it is healthy; False when nothing answers."""
        try:
            with httpx.Client(trust_env=False, timeout=5) as client:  # no proxy
                return client.get(f"{self.api}/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def start(self, processes: Processes, *options: str) -> subprocess.Popen[bytes]:
        """Start the server among the processes, and wait until it answers.

        One start at a time in a home, because the server may have to migrate the database.

        Raises:
            TidepoolError: it ended, or did not answer in time.
        """
        command = ("prefect", "server", "start", "--host", _HOST, "--port", str(self.port), *options)
        with file_lock(self.home.path / "start.lock", wait=True):
            process = processes.start("server", *command, cwd=self.home.path)
            deadline = time.monotonic() + _START_SECONDS
            while not self.is_healthy():
                processes.check()
                if time.monotonic() > deadline:
                    said = processes.output("server") or "none"
                    raise TidepoolError(f"no answer from {self.api} within {_START_SECONDS} s; its output: {said}")
                time.sleep(0.1)
        return process


@contextmanager
def running_server(home: Home) -> Iterator[Server]:
    """Run a Prefect server without its user interface, on any free port, for the duration of the block.

    Raises:
        TidepoolError: it did not start.
    """
    server = Server(home, free_port())
    processes = Processes(home.logs, server.variables)
    try:
        server.start(processes, "--no-ui")
        yield server
    finally:
        processes.stop_all()


def _not_by_proxy(host: str) -> str:
    """Return the hosts that this machine reaches without its proxy, with one more."""
    variables = environment()
    listed = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    known = [each.strip() for each in listed.split(",")]
    return listed if "*" in known or host in known else f"{listed},{host}".lstrip(",")


def free_port(usual: int = 0) -> int:
    """Choose the usual port if it is free, otherwise any free one."""
    with socket.socket() as probe:
        # As servers do: a port whose last connections still time out is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", usual))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
