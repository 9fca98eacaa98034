"""A real Prefect server for all integration tests, and a storage root for each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tidepool import settings as settings_module
from tidepool.local.server import RECORD_IN_BATCHES, server_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives a port of this machine that nobody listens on."""
    return _free_port


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API URL of a Prefect server in a process of its own, on SQLite; PREFECT_API_URL points to it meanwhile."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    home = tmp_path_factory.mktemp("prefect")
    port = _free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        **RECORD_IN_BATCHES,
    }
    environment.pop("PREFECT_API_URL", None)
    log = (home / "server.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", *server_arguments(port, "--no-ui")],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                if httpx.get(f"{api}/health", timeout=5).status_code == httpx.codes.OK:
                    break
            except httpx.TransportError:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Prefect server did not start:\n{(home / 'server.log').read_text()[-4000:]}")
            time.sleep(0.2)
        before = {name: os.environ.get(name) for name in ("PREFECT_HOME", "PREFECT_API_URL")}
        os.environ.update(PREFECT_HOME=str(home), PREFECT_API_URL=api)
        with temporary_settings({PREFECT_API_URL: api}):
            yield api
        # What is still to be sent goes out while there is a server.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


@pytest.fixture
def storage_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty storage root; child processes see it too."""
    root = f"file://{tmp_path}/storage"
    monkeypatch.setenv("TIDEPOOL_STORAGE_ROOT", root)
    settings_module.settings.cache_clear()
    yield root
    settings_module.settings.cache_clear()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mapped tasks run in threads: for tests whose subject is not where tasks run."""
    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "threads")
    settings_module.settings.cache_clear()
    yield
    settings_module.settings.cache_clear()
