"""tidepool.upstream.kr8s beside a web server in the Kubernetes API's place."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import kr8s.asyncio
import pytest

from tidepool.upstream import kr8s as upstream
from tidepool.upstream.kr8s import close_connection, connect, require_credentials

if TYPE_CHECKING:
    from pathlib import Path


def test_a_closed_connection_is_closed_at_once_and_can_be_used_again() -> None:
    async def scenario() -> None:
        closed: asyncio.Queue[None] = asyncio.Queue()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                if line == b"\r\n":
                    body = b'{"gitVersion": "v1.34.0"}'
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            writer.close()
            closed.put_nowait(None)

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            connection = await kr8s.asyncio.api(url=f"http://{host}:{port}")
            assert closed.empty()
            await close_connection(connection)
            await asyncio.wait_for(closed.get(), 30)
            assert await connection.version() == {"gitVersion": "v1.34.0"}
            await close_connection(connection)
            await asyncio.wait_for(closed.get(), 30)

    asyncio.run(scenario())


def test_a_connection_that_was_never_opened_can_be_closed() -> None:
    asyncio.run(close_connection(kr8s.asyncio.Api(bypass_factory=True, url="http://127.0.0.1:1")))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a kubeconfig, outside of a pod."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr(upstream, "_SERVICE_ACCOUNT", str(tmp_path / "none"))
    return tmp_path


def test_no_credentials_are_refused_as_by_connecting(home: Path) -> None:
    missing = f"{home}/a:{home}/b"
    for given in ("", missing):
        with pytest.raises(ValueError, match="no Kubernetes credentials: neither a pod's ServiceAccount nor"):
            require_credentials(given)
    with pytest.raises(ValueError, match="no Kubernetes credentials: neither a pod's ServiceAccount nor"):
        asyncio.run(connect())


@pytest.mark.parametrize(("given", "file"), [("", ".kube/config"), ("/none:{home}/b", "b"), ("", "none/token")])
def test_whatever_kr8s_would_read_is_enough(home: Path, given: str, file: str) -> None:
    (home / file).parent.mkdir(exist_ok=True)
    (home / file).touch()
    require_credentials(given.format(home=home))


def test_that_is_known_without_kr8s() -> None:
    script = "import sys, tidepool.upstream.kr8s; sys.exit('kr8s' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
