"""Lists with entries that the Prefect server cannot write out."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from tidepool.operate import unreadable


class Listing:
    """A list of numbers of which some cannot be read."""

    def __init__(self, size: int, bad: set[int], status: int = 500) -> None:
        self.size, self.bad, self.status, self.asked = size, bad, status, 0

    async def ask(self, offset: int, limit: int) -> list[int]:
        self.asked += 1
        found = [*range(offset, min(offset + limit, self.size))]
        if self.bad & {*found}:
            request = httpx.Request("POST", "http://x/")
            error = httpx.HTTPStatusError("x", request=request, response=httpx.Response(self.status, request=request))
            raise PrefectHTTPStatusError.from_httpx_error(error)
        return found

    def page(self, offset: int = 0) -> list[int | None]:
        return asyncio.run(unreadable.page(self.ask, offset, 200))


@pytest.mark.parametrize("bad", [set(), {0}, {199}, {99, 100}, {3, 50, 51, 120, 199}])
def test_all_others_of_a_page_are_read(bad: set[int]) -> None:
    assert Listing(300, bad).page() == [None if each in bad else each for each in range(200)]


def test_a_page_ends_with_the_list() -> None:
    assert Listing(103, {101}).page() == [*range(101), None, 102]
    assert Listing(103, {102}).page() == [*range(102), None]
    assert Listing(103, {101}).page(101) == [None, 102]
    assert Listing(0, set()).page() == []


def test_one_costs_few_requests() -> None:
    listing = Listing(300, {7})
    listing.page()
    assert listing.asked <= 17


def test_a_server_that_fails_is_not_taken_for_an_entry() -> None:
    listing = Listing(300, {*range(300)})
    with pytest.raises(PrefectHTTPStatusError):
        listing.page()
    assert listing.asked < 30
    with pytest.raises(PrefectHTTPStatusError):
        Listing(300, {7}, status=503).page()


def test_a_connection_that_the_server_has_closed_is_opened_again_once() -> None:
    left = [1]

    async def ask() -> str:
        if left:
            left.pop()
            raise httpx.ReadError("closed")
        return "answer"

    assert asyncio.run(unreadable.answer(ask)) == "answer"
    left.extend([1, 1])
    with pytest.raises(httpx.ReadError):
        asyncio.run(unreadable.answer(ask))
