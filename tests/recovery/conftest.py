"""A Prefect server on PostgreSQL, as in production: on SQLite an automation may fire more than once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from benchmarks.servers import installed_postgresql, postgresql
from tidepool.local.processes import Processes
from tidepool.local.server import Home, Server, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

# Only these seconds differ from production: of the server's loops, and of `within`.
FAST = {
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "1",
}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server; PREFECT_API_URL points to it meanwhile."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    if installed_postgresql() is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with ExitStack() as stack:
        server = Server(Home(tmp_path_factory.mktemp("prefect")), free_port())
        url, _ = stack.enter_context(postgresql())
        variables = {**server.variables, **FAST, "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        processes = Processes(server.home.logs, variables)
        stack.callback(processes.stop_all)
        server.start(processes, "--no-ui")
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setenv("PREFECT_HOME", str(server.home.prefect))
        patched.setenv("PREFECT_API_URL", server.api)
        patched.setenv("PREFECT_UI_URL", variables["PREFECT_UI_URL"])
        with temporary_settings({PREFECT_API_URL: server.api, PREFECT_UI_URL: variables["PREFECT_UI_URL"]}):
            yield server
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
