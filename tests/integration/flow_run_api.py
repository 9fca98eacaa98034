"""The proxy between flow runs and a Prefect server, as the chart configures it: a real HAProxy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tidepool.local.processes import Processes
from tidepool.local.server import Home, Server, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).resolve().parents[2] / "helm" / "tidepool"
PASSWORD = "admin:of the: platform"
TOKENS = ("runs:of the default team%", 'media:"token" $of {media}')
_NAMES = "FLOW_RUN_API_SERVER", "FLOW_RUN_API_TOKEN_0", "FLOW_RUN_API_TOKEN_1"
VALUES = {
    "auth.secretName": "auth",
    "workPool.name": "a pool",
    "flowRuns.namespace": "runs",
    "flowRuns.apiSecret": "runs",
    "flowRuns.readable.variables[0]": "shared",
    "flowRuns.readable.blocks[0]": "secret/shared",
    "teams.media.namespace": "media",
    "teams.media.workPool.name": "media",
    "teams.media.flowRuns.apiSecret": "media",
    "teams.media.flowRuns.readable.variables[0]": "of-media",
    "teams.media.flowRuns.readable.blocks[0]": "secret/of-media",
}


@cache
def files(*values: tuple[str, str]) -> dict[str, str]:
    """Return the proxy's files, by name, as the chart with these values writes them."""
    if missing := [program for program in ("haproxy", "helm") if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)} on PATH")
    options = [f"--set={name}={value}" for name, value in (*values, ("registration.enabled", "false"))]
    command = ["helm", "template", "tidepool", str(CHART), "--namespace=flows", "--kube-version=1.34", *options]
    done = subprocess.run(
        [*command, "--show-only=templates/flow-run-api/configmap.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = yaml.safe_load(done.stdout)["data"]
    return found


@dataclass(frozen=True)
class Proxy:
    """A running proxy.

    Attributes:
        api: Its URL.
        log: Its output: a line for each call that was refused or failed.
    """

    api: str
    log: Path

    def refused(self) -> list[str]:
        """Return the lines of calls that were refused."""
        return [
            line for line in self.log.read_text().splitlines() if re.search(r"flow-run-api team=\S* \S+ 4\d\d ", line)
        ]


@contextmanager
def proxy(folder: Path, server: int, values: dict[str, str] | None = None) -> Iterator[Proxy]:
    """Run the proxy in front of the server at a port of this machine."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(*(VALUES if values is None else values).items()).items():
        moved = text.replace("/etc/flow-run-api", str(folder)).replace(":4201\n", f"127.0.0.1:{port}\n", 1)
        (folder / name).write_text(moved.replace("127.0.0.1:4200", f"127.0.0.1:{server}"))
    log = folder / "haproxy.log"
    secrets = dict(zip(_NAMES, (PASSWORD, *TOKENS), strict=True))
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")],
            env={"PATH": os.environ["PATH"], **secrets},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        running = Proxy(f"http://127.0.0.1:{port}/api", log)
        deadline = time.monotonic() + 10
        while not _answers(running.api):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield running
    finally:
        process.terminate()
        process.wait(10)


def _answers(api: str) -> bool:
    try:
        return bool(httpx.get(f"{api}/health", timeout=5).status_code)
    except httpx.TransportError:
        return False


@contextmanager
def server(folder: Path, database: Path | None = None) -> Iterator[Server]:
    """Run a Prefect server with a password, as the chart starts it for restricted flow runs.

    Args:
        folder: For its files.
        database: A migrated database to copy; without it, the server migrates a new one.
    """
    home = Home(folder)
    if database:
        shutil.copy(database, home.prefect / "prefect.db")
    found = Server(home, free_port())
    processes = Processes(home.logs, {**found.variables, "PREFECT_SERVER_API_AUTH_STRING": PASSWORD})
    try:
        arguments = ("--host", "127.0.0.1", "--port", str(found.port), "--no-ui")
        processes.start("server", "tidepool.operate.server", *arguments, cwd=folder)
        deadline = time.monotonic() + 120
        while not found.is_healthy():
            processes.check()
            assert time.monotonic() < deadline, (home.logs / "server.log").read_text()
            time.sleep(0.1)
        yield found
    finally:
        processes.stop_all()


def variables(api: str, token: str = TOKENS[0]) -> dict[str, str]:
    """Return the variables of a client of an API."""
    return {"PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": token, "PREFECT_CLIENT_MAX_RETRIES": "2"}


def client(api: str, token: str | None = TOKENS[0], **options: Any) -> httpx.Client:
    """Return a client of an API of `/api`, with a token if there is one."""
    auth = tuple(token.split(":", 1)) if token else None
    return httpx.Client(base_url=api, auth=auth, timeout=30, **options)
