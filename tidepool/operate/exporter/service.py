"""The process of `tidepool exporter`: reads the Prefect server in the background, and serves what it read last.

A scrape never waits for the server: it gets bytes that were written before.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from tidepool.errors import UsageError
from tidepool.operate import log_lines
from tidepool.operate.exporter.figures import Figures
from tidepool.operate.exporter.notifications import Notifications
from tidepool.operate.exporter.reader import Reader
from tidepool.operate.metrics import EXPORTER, PREFIX
from tidepool.operate.sweep.loop import Problems
from tidepool.operate.sweep.prefect_api import one_pass
from tidepool.settings import settings
from tidepool.web_server import WebServer

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from tidepool.operate.exporter.reader import Reading

# Deployments, flows and work pools: one request for 200 deployments takes the server a second.
INVENTORY_SECONDS = 300.0
# The loop is healthy while it has written a page within this time; a pass takes 20 s at most.
_HEALTHY_SECONDS = 120.0
# A deployment that is not known is looked for so often at most.
_LOOK_SECONDS = 60.0
_AGE = next(each for each in EXPORTER if each.name == "exporter_snapshot_age_seconds")
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_log = logging.getLogger(__name__)


class Snapshot(WebServer):
    """A web server with the last page of figures at `/metrics`, and at `/healthz` whether it is fresh.

    Args:
        host: Address to listen at.
        port: Port to listen at; 0 for any free one.

    Raises:
        UsageError: the port is not available.
    """

    def __init__(self, host: str, port: int) -> None:
        self._page = b""
        self._written: float | None = None
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port") from error

    def write(self, page: bytes) -> None:
        """Replace the page."""
        self._page, self._written = page, time.monotonic()

    def age(self) -> float | None:
        """Return the seconds since the page was written; None before the first."""
        return None if self._written is None else time.monotonic() - self._written

    def page(self) -> bytes:
        """Return the page with its age."""
        name = f"{PREFIX}{_AGE.name}"
        return self._page + f"# HELP {name} {_AGE.text}\n# TYPE {name} gauge\n{name} {self.age() or 0.0:.3f}\n".encode()


class _Handler(BaseHTTPRequestHandler):
    """Answers GET /metrics and GET /healthz."""

    server: Snapshot
    protocol_version = "HTTP/1.1"
    # A client that sends nothing keeps its thread no longer.
    timeout = 60

    def do_GET(self) -> None:
        age = self.server.age()
        if self.path == "/metrics" and age is not None:
            self._answer(HTTPStatus.OK, self.server.page(), _TEXT)
        elif self.path in {"/metrics", "/healthz"}:
            healthy = age is not None and age < _HEALTHY_SECONDS
            text = "no figures yet\n" if age is None else f"the figures are {age:.0f} s old\n"
            self._answer(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, text.encode(), "text/plain")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"the figures are at /metrics\n", "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log no request."""


class Exporter:
    """The loop: reads, and gives each page to the web server.

    Args:
        client: A client of the Prefect server.
        snapshot: The web server.
    """

    def __init__(self, client: PrefectClient, snapshot: Snapshot) -> None:
        self._settings = settings().exporter
        self._snapshot = snapshot
        self._figures = Figures(self._settings.budgets)
        self._reader = Reader(client, self._settings.deployments, self._figures.observe_request, time.time())
        self._inventory_due = 0.0
        self._looked_for = float("-inf")
        self._problems = Problems()
        urls = settings().notify.urls.get_secret_value().split()
        self.notifications = Notifications(self._reader.states, _link, self._figures.count_message) if urls else None

    async def watch(self) -> None:
        """Refresh the page at every polling interval, until cancelled."""
        sending: asyncio.Task[None] | None = None
        while True:
            begun = time.monotonic()
            await self.refresh()
            # A target that does not answer must not hold up the figures.
            if self.notifications and (sending is None or sending.done()):
                sending = asyncio.create_task(self.notifications.send())
            await asyncio.sleep(max(0.0, begun + self._settings.interval_seconds - time.monotonic()))

    async def refresh(self) -> None:
        """Read once and write the page, also when the server does not answer."""
        readings: list[Reading] = []  # none if it fails
        with self._problems.of("Prefect server"):
            async with one_pass():
                readings.append(await self._read())
        if not readings:
            self._figures.fail()
            self._inventory_due = 0.0  # what it asked for may be gone
        self._snapshot.write(self._figures.page())
        for reading in readings:
            with self._problems.of("messages about failed runs"):
                async with one_pass():
                    await self._observe(reading)

    async def _read(self) -> Reading:
        if time.monotonic() >= self._inventory_due:
            await self._reader.read_inventory()
            self._inventory_due = time.monotonic() + INVENTORY_SECONDS
        begun = time.perf_counter()
        reading = await self._reader.refresh()
        self._figures.update(self._reader, reading, time.perf_counter() - begun)
        return reading

    async def _observe(self, reading: Reading) -> None:
        if self.notifications is None:
            return
        known, now = self._reader.inventory.deployments, time.monotonic()
        unknown = await self.notifications.observe(reading.finished, known, self._reader.facts, time.time())
        # A deployment may be new. Those beyond the limit are never known.
        if unknown and "deployments" not in reading.truncated and now - self._looked_for > _LOOK_SECONDS:
            self._inventory_due, self._looked_for = 0.0, now


def _link(run: str) -> str | None:
    from prefect.utilities.urls import url_for

    return url_for("flow-run", obj_id=run)


def serve(host: str, port: int) -> None:
    """Run the exporter until SIGTERM or Ctrl-C.

    Raises:
        UsageError: PREFECT_API_URL is not set, or the port is not available.
    """
    from prefect.settings import PREFECT_API_URL

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    log_lines.install()
    for noisy in ("httpx", "prefect"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not PREFECT_API_URL.value():
        raise UsageError("PREFECT_API_URL is not set: give the address of the Prefect server, http://host:4200/api")
    with Snapshot(host, port) as snapshot:
        threading.Thread(target=snapshot.serve_forever, name="scrapes", daemon=True).start()
        _log.info("figures of %s at http://%s:%s/metrics", PREFECT_API_URL.value(), host, snapshot.server_port)
        asyncio.run(_run(snapshot))
        snapshot.shutdown()


async def _run(snapshot: Snapshot) -> None:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        loop = asyncio.create_task(Exporter(client, snapshot).watch())
        for each in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(each, loop.cancel)
        try:
            await loop
        except asyncio.CancelledError:
            _log.info("the exporter ends")
