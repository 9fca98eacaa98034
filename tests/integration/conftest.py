"""A real Prefect server for all integration tests, and a storage root for each."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tidepool import settings as settings_module
from tidepool.local.server import Home, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API URL of a Prefect server on SQLite, a child process; PREFECT_API_URL points to it meanwhile."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patched:
            # The server runs no code of this repository: measuring its coverage would only slow it down.
            patched.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
            server = stack.enter_context(running_server(Home(tmp_path_factory.mktemp("prefect"))))
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setenv("PREFECT_HOME", str(server.home.prefect))
        patched.setenv("PREFECT_API_URL", server.api)
        with temporary_settings({PREFECT_API_URL: server.api}):
            yield server.api
        # Send what is still queued while there is a server.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)


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
