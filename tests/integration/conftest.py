"""A real Prefect server for all integration tests, and a storage root for each."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

import certifi
import pytest

from tests.databases import migrated
from tests.integration.deploy_support import Proxy, Shop, recorded
from tidepool import settings as settings_module
from tidepool.local.server import Home, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

END = "-----END CERTIFICATE-----\n"


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all migrations of this version of Prefect, to copy."""
    return migrated(tmp_path_factory.mktemp("migrated"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[str]:
    """The API URL of a Prefect server on SQLite, a child process; PREFECT_API_URL points to it meanwhile."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, temporary_settings

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patched:
            # The server runs no code of this repository: measuring its coverage would only slow it down.
            patched.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
            home = Home(tmp_path_factory.mktemp("prefect"))
            shutil.copy(migrated_database, home.prefect / "prefect.db")
            server = stack.enter_context(running_server(home))
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setenv("PREFECT_HOME", str(server.home.prefect))
        patched.setenv("PREFECT_API_URL", server.api)
        # Each client loads the certificates that it may need, 60 ms of CPU time for certifi's; this server needs none.
        one = server.home.path / "one-certificate.pem"
        one.write_text(certifi.contents().split(END)[0] + END)
        patched.setenv("PREFECT_API_SSL_CERT_FILE", str(one))
        with temporary_settings({PREFECT_API_URL: server.api, PREFECT_API_SSL_CERT_FILE: str(one)}):
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


@pytest.fixture
def proxy(prefect_server: str) -> Iterator[Proxy]:
    """The requests to the server."""
    with recorded(prefect_server) as each:
        yield each


@pytest.fixture
def shop(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """An empty repository with a work pool on the server."""
    del proxy  # it reaches the server through it
    made = Shop(tmp_path / "shop", monkeypatch)
    made.create_pool()
    return made
