"""Lists of the Prefect server with an entry that it cannot write out: the others are read all the same."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# With more of them it is the server that fails, and not an entry.
MOST = 5


async def answer(ask: Callable[[], Awaitable[Any]]) -> Any:
    """Return the answer to a reading request, which is sent twice if its connection ends.

    After a 500 the server closes the connection, and the next request may have begun to use it.
    """
    import httpx

    try:
        return await ask()
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        return await ask()


async def page(ask: Callable[[int, int], Awaitable[list[Any]]], offset: int, limit: int) -> list[Any]:
    """Return one page of a list, with None for each entry for which the server answers 500.

    Args:
        ask: Requests the part of the list from an offset with a limit.
        offset: Entries before the page.
        limit: Most entries of the page.

    Raises:
        PrefectHTTPStatusError: another status, or more than `MOST` entries cannot be read.
    """
    from prefect.exceptions import PrefectHTTPStatusError

    left = MOST

    async def part(offset: int, limit: int) -> list[Any]:
        nonlocal left
        try:
            return await ask(offset, limit)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != HTTPStatus.INTERNAL_SERVER_ERROR or not left:
                raise
            if limit == 1:
                left -= 1
                return [None]
        half = limit // 2
        first = await part(offset, half)
        return first if len(first) < half else first + await part(offset + half, limit - half)

    return await part(offset, limit)
