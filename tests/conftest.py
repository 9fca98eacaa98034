"""What tests at every distance share: a receiver of messages."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from tidepool import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Receiver(ThreadingHTTPServer):
    """A web server that keeps what it is sent and answers as told."""

    def __init__(self) -> None:
        self.got: list[dict[str, str]] = []
        self.answer = 200
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def target(self) -> str:
        return f"json://127.0.0.1:{self.server_port}/s3cret-path"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """The receiver of messages that the targets of `targets` may be."""
    with Receiver() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets TIDEPOOL_NOTIFY_URLS to the given URLs; to none before it is called."""

    def use(*urls: str) -> None:
        monkeypatch.setenv("TIDEPOOL_NOTIFY_URLS", "\n".join(urls))
        settings.settings.cache_clear()

    use()
    yield use
    settings.settings.cache_clear()
