"""tidepool.upstream.kr8s beside a web server in the Kubernetes API's place."""

from __future__ import annotations

import asyncio

import kr8s.asyncio

from tidepool.upstream.kr8s import close_connection


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
