"""The pytest plugin of tidepool: fixtures for tests of flows. pytest loads it wherever tidepool is installed.

`prefect_server` is a real Prefect server for all tests of a session, `storage_root` an empty store for each test, and
with `threads` mapped tasks run in threads of the test's process. Nothing starts, and Prefect is not imported, before a
test asks for one of them. A fixture of a project with one of these names takes precedence.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_END = "-----END CERTIFICATE-----\n"


def migrated(cache: Path, folder: Path) -> Path:
    """Return a database of the Prefect server with all migrations of this version, which take 10 s of CPU time.

    Args:
        cache: The folder that keeps it for later sessions.
        folder: An empty folder to make it in, if there is none yet.
    """
    import subprocess
    import sys
    from importlib.metadata import version

    from tidepool.local.processes import file_lock
    from tidepool.settings import environment

    database = cache / f"prefect-{version('prefect')}.db"
    cache.mkdir(exist_ok=True, parents=True)
    with file_lock(database.with_suffix(".lock"), wait=True):  # pytest-xdist's workers are processes
        if not database.exists():
            kept = {key: value for key, value in environment().items() if not key.startswith(("PREFECT_", "COVERAGE_"))}
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            variables = {**kept, "PREFECT_HOME": str(folder)}
            subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
            shutil.copy(folder / "prefect.db", database.with_suffix(".new"))
            database.with_suffix(".new").replace(database)
    return database


@pytest.fixture(scope="session")
def migrated_database(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a database with all migrations of this version of Prefect, to copy; kept in pytest's cache folder."""
    cache = pytestconfig.rootpath / ".pytest_cache"
    return migrated(cache, tmp_path_factory.mktemp("migrated"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[str]:
    """Give the API URL of a Prefect server on SQLite, a child process; PREFECT_API_URL points to it meanwhile."""
    import certifi
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, temporary_settings

    from tidepool.local.server import Home, running_server

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patched:
            # The server runs no code of a repository: measuring its coverage would only slow it down.
            patched.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
            home = Home(tmp_path_factory.mktemp("prefect"))
            shutil.copy(migrated_database, home.prefect / "prefect.db")
            server = stack.enter_context(running_server(home))
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setenv("PREFECT_HOME", str(server.home.prefect))
        patched.setenv("PREFECT_API_URL", server.api)
        # Each client loads the certificates that it may need, 60 ms of CPU time for certifi's; this server needs none.
        one = server.home.path / "one-certificate.pem"
        one.write_text(certifi.contents().split(_END)[0] + _END)
        patched.setenv("PREFECT_API_SSL_CERT_FILE", str(one))
        with temporary_settings({PREFECT_API_URL: server.api, PREFECT_API_SSL_CERT_FILE: str(one)}):
            yield server.api
        # Send what is still queued while there is a server.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)


@pytest.fixture
def storage_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the URL of an empty storage root; child processes see it too."""
    from tidepool.settings import settings

    root = f"file://{tmp_path}/storage"
    monkeypatch.setenv("TIDEPOOL_STORAGE_ROOT", root)
    settings.cache_clear()
    yield root
    settings.cache_clear()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run mapped tasks in threads: for tests whose subject is not where tasks run."""
    from tidepool.settings import settings

    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "threads")
    settings.cache_clear()
    yield
    settings.cache_clear()
