"""The log of a web server has no traceback for a client that left, and one for a fault of its own."""

from __future__ import annotations

import socket
import struct
from http.server import BaseHTTPRequestHandler
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from tests.polling import until
from tidepool.web_server import WebServer

if TYPE_CHECKING:
    from collections.abc import Iterator


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/fault":
            raise ValueError("a fault")
        self.rfile.read(1)  # until the client leaves


class Counting(WebServer):
    ended = 0

    def shutdown_request(self, request: object) -> None:
        super().shutdown_request(request)  # type: ignore[arg-type]
        self.ended += 1


@pytest.fixture
def server() -> Iterator[Counting]:
    with Counting(("127.0.0.1", 0), Handler) as found:
        thread = Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "said"), [("/left", ""), ("/fault", "ValueError: a fault")])
def test_only_a_fault_of_the_server_is_printed(
    server: Counting, capsys: pytest.CaptureFixture[str], path: str, said: str
) -> None:
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        # Reset, not closed.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: server.ended)
    text = capsys.readouterr().err
    assert said in text
    assert bool(text) is bool(said)
