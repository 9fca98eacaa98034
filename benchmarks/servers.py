"""Prefect servers for benchmarks, on SQLite or PostgreSQL, with their CPU time."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from tidepool.local.processes import Processes
from tidepool.local.server import Home, free_port
from tidepool.local.server import Server as PrefectServer

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_MORE_SECONDS = 30


class Server:
    """A running Prefect server.

    Args:
        api: URL of its API.
        processes: Roots of its process trees: the server, and PostgreSQL if it uses one.
        database: URL of its PostgreSQL database; empty without.
    """

    def __init__(self, api: str, processes: list[int], database: str = "") -> None:
        self.api = api
        self.database = database
        self._processes = processes

    def cpu_seconds(self) -> float:
        """Add up the CPU time that the server and its database have used so far, seconds."""
        total = 0.0
        for root in self._processes:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(root)
                for one in (process, *process.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        times = one.cpu_times()
                        # Children that ended count too: PostgreSQL starts a process for each connection.
                        total += times.user + times.system + times.children_user + times.children_system
        return total

    def count_task_runs(self, flow_run_id: str, state: str = "COMPLETED") -> int:
        """Count the task runs of a flow run that have that type of state on the server."""
        body = {"flow_runs": {"id": {"any_": [flow_run_id]}}, "task_runs": {"state": {"type": {"any_": [state]}}}}
        answer = httpx.post(f"{self.api}/task_runs/count", json=body, timeout=60)
        answer.raise_for_status()
        return int(answer.json())

    def catch_up(self, flow_run_id: str, task_runs: int) -> int:
        """Wait until that many task runs are recorded as Completed; return how many are lost, when no more arrive."""
        recorded, changed = -1, time.monotonic()
        while (known := self.count_task_runs(flow_run_id)) < task_runs:
            if known != recorded:
                recorded, changed = known, time.monotonic()
            elif time.monotonic() - changed > _NO_MORE_SECONDS:
                return task_runs - known
            time.sleep(0.1)  # between two requests; the deadline is above
        return 0


@contextmanager
def prefect_server(database: str) -> Iterator[Server]:
    """Run a fresh server on `sqlite` or `postgresql`, configured as by the chart; delete its data afterwards."""
    with ExitStack() as stack:
        home = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="tidepool-bench-", ignore_cleanup_errors=True))
        )
        server = PrefectServer(Home(home), free_port())
        variables, roots, url = server.variables, [], ""
        if database == "postgresql":
            url, pid = stack.enter_context(postgresql())
            variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
            roots.append(pid)
        # In the benchmark's session: where the kernel groups processes by session, the server would otherwise get half
        # of the CPU time, however many processes the benchmark runs.
        processes = Processes(server.home.logs, variables, own_sessions=False)
        stack.callback(processes.stop_all)
        roots.append(server.start(processes, "--no-ui").pid)
        yield Server(server.api, roots, url)


def installed_postgresql() -> Path | None:
    """Return the folder of the programs of Debian's newest package `postgresql`, or None."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextmanager
def postgresql() -> Iterator[tuple[str, int]]:
    """Run a separate PostgreSQL by a user who is not root; yield its URL for Prefect, and its process id.

    Raises:
        RuntimeError: it is not installed.
    """
    programs = installed_postgresql()
    if programs is None:
        raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    as_user = ["runuser", "-u", user, "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="tidepool-pg-"))
    port = free_port()
    try:
        if as_user:
            shutil.chown(folder, user)
        data = folder / "data"
        subprocess.run(
            [*as_user, programs / "initdb", "-D", data, "-A", "trust", "-U", "prefect", "-E", "UTF8"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
        control = [*as_user, programs / "pg_ctl", "-D", data, "-w", "-t", "120"]
        subprocess.run(
            [*control, "-l", folder / "log", "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder
        )
        pid = int((data / "postmaster.pid").read_text().split()[0])
        try:
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres", pid
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
