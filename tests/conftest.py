"""Fixtures of all kinds of tests: a receiver of messages, a Kubernetes API."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tidepool import settings
from tidepool.web_server import WebServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Otherwise each example is timed: a busy machine would fail it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


class Receiver(WebServer):
    """A web server that records requests and answers with a given status."""

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
        """Log nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver of notifications, to use as a target of `targets`."""
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


class KubernetesServer(WebServer):
    """A Kubernetes API that keeps the requests and gives `answers` (status, body), in order or by a function."""

    DISCONNECT = 0
    NO_ANSWER = -1

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] | Callable[[str], tuple[int, Any]] = []
        self.requests: list[str] = []
        self.over = Event()
        super().__init__(("127.0.0.1", 0), KubernetesHandler)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Answer requests inside of the block."""
        thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            self.shutdown()
            thread.join()


class KubernetesHandler(BaseHTTPRequestHandler):
    server: KubernetesServer
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        status, given = 200, {"gitVersion": "v1.34.0"}
        if not self.path.startswith("/version"):
            request = f"{self.command} {self.path} {body}".strip()
            self.server.requests.append(request)
            answers = self.server.answers
            status, given = answers(request) if callable(answers) else answers.pop(0)
        if status == self.server.NO_ANSWER:
            self.server.over.wait(60)
        if status <= 0:
            self.close_connection = True
            return
        text = (given if isinstance(given, str) else json.dumps(given)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """The Kubernetes API of the kubeconfig, with namespace `ns`."""
    with KubernetesServer() as server:
        config = {
            "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "ns"}}],
            "current-context": "x",
            "users": [{"name": "x", "user": {"token": "t"}}],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        with server.answering():
            yield server
