"""Private parts of kr8s: its HTTP session."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import kr8s.asyncio


async def close_connection(connection: kr8s.asyncio.Api) -> None:
    """Close the connections to the Kubernetes API, which stay open until the garbage collector finds them otherwise.

    Why: kr8s 0.20.15 closes its session only to open another one.
    Watch: `kr8s._api.Api._session` and its uses.
    Delete when: `Api` has a public `close`.
    """
    if (session := connection._session) is not None:
        await session.aclose()
